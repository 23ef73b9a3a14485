"""The page in a real browser: every view, in both languages and themes, live, and through trouble."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from appliance.cli.connection import Appliance
from tests.e2e.house import LONG_S, ROOT, House
from tests.fakes.nvml import StubNvml
from tests.page.conftest import MISSING, Page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

VIEWS = ("overview", "history", "models", "events", "try", "energy")


def ask(house: House, model: str, **inputs: Any) -> None:
    body = {"inputs": [{"name": name, **tensor} for name, tensor in inputs.items()]}
    request = urllib.request.Request(f"{house.http}/v2/models/{model}/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=LONG_S):
        pass


def whip(house: House, command: str) -> None:
    with contextlib.suppress(OSError):
        ask(
            house,
            "whip",
            data={"datatype": "FP32", "shape": [1, 1], "data": [1]},
            command={"datatype": "BYTES", "shape": [1, 1], "data": [command]},
        )


def test_the_overview_says_in_one_sentence_that_all_is_well(page: Page) -> None:
    page.open()
    said = page.shows("All is well", "#verdict")
    assert "2 models answer" in said
    assert "GPU at 61 °C" in said
    assert page.script("return document.getElementById('verdict').className").endswith("good")
    assert "NVIDIA RTX 4000" in page.shows("Temperature")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_view_is_drawn_in_both_languages_and_themes(page: Page, view: str, language: str) -> None:
    page.script(f"localStorage.setItem('language', '{language}'); localStorage.setItem('theme', 'dark')")
    page.open(view)
    words = json.loads((ROOT / "appliance" / "web" / "text" / f"{language}.json").read_text())
    page.shows(words["link.live"], "#link")
    page.until(lambda: page.text("main").strip())
    assert page.script("return document.documentElement.lang") == language
    dark = page.script("return getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.script("return getComputedStyle(document.body).backgroundColor") != dark
    named = page.script(
        "return [...document.body.innerText.matchAll(/\\b(nav|health|models|tile|reading|panel|try|energy|event)\\.[a-z_]+/g)]"
        ".map((match) => match[0])"
    )
    assert [name for name in named if name in words] == [], "a text's name is shown instead of the text"


def test_what_happens_is_seen_while_one_looks(page: Page, watched: House) -> None:
    page.open("models/digits")
    page.shows("Batches by size")
    for _ in range(5):
        ask(watched, "digits", image={"datatype": "FP32", "shape": [1, 28, 28, 1], "data": [0.5] * 784})
    page.until(lambda: page.script("return document.querySelectorAll('.columns rect').length"))
    page.open("events")
    Appliance(watched.http).post("/v2/repository/models/whip/load")
    page.shows("operator.load", "#events")


def test_history_draws_temperature_power_and_the_lanes(page: Page) -> None:
    page.open("history/1h")
    page.until(lambda: page.script("return document.querySelectorAll('#chart .scatterlayer .trace').length") or 0)
    titles = page.script(
        """return [...document.querySelectorAll('#chart .infolayer [class^="g-y"] text')].map((title) => title.textContent)"""
    )
    assert {"Temperature (°C)", "Power (W)", "Memory (GB)", "governor", "throttle"} <= set(titles)
    page.click(".row button:nth-child(3)")
    page.until(lambda: page.driver.current_url.endswith("#history/24h"))
    page.until(lambda: page.script("return document.querySelectorAll('#chart .scatterlayer .trace').length") or 0)


def test_a_dropped_picture_is_answered_with_labels(page: Page) -> None:
    page.open("try/digits")
    page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    page.driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(
        str(ROOT / "models" / "digits" / "samples" / "3.png")
    )
    page.shows("answered in", "#result")
    assert page.text("#result strong") == "3"
    page.script(
        "[...document.querySelectorAll('.row button')].find((button) => button.textContent === 'Python').click()"
    )
    assert 'client.infer("digits"' in page.text("pre[tabindex]")


def test_everything_can_be_reached_by_keyboard(page: Page) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    body = page.driver.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert page.script("return document.activeElement.className") == "skip"
    for _ in range(3):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert page.script("return document.activeElement.hash") == "#models"
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "tr.open[data-key=digits]"))
    page.script("document.querySelector('tr.open[data-key=digits]').focus()")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.shows("Verification")


def test_on_a_tablet_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.driver.set_window_size(768, 1024)
    try:
        for view in VIEWS:
            page.open(view)
            page.until(lambda: page.text("main").strip())
            assert page.script("return document.documentElement.scrollWidth <= innerWidth"), view
    finally:
        page.driver.set_window_size(1280, 900)


def test_a_gpu_that_throttles_turns_the_verdict(page: Page, gpu: StubNvml) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    gpu.set("0.margin", 1)
    gpu.set("0.temperature", 94)
    gpu.set("0.reasons", 0x40)
    page.shows("Critical", "#verdict")
    assert page.script("return document.getElementById('verdict').className").endswith("bad")
    gpu.set("0.margin", 34)
    gpu.set("0.temperature", 61)
    gpu.set("0.reasons", 0)
    page.shows("All is well", "#verdict")
    page.open("events")
    page.shows("governor.level", "#events")


def test_a_model_that_fails_is_named_with_its_reason_and_can_be_loaded_again(page: Page, watched: House) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    for _ in range(2):
        whip(watched, "crash")
    page.shows("quarantined", "#verdict")
    page.open("models")
    page.shows("unavailable")
    page.script("[...document.querySelectorAll('tr[data-key=whip] button')][0].click()")
    page.until(lambda: "quarantined" not in page.text())
    page.open()
    page.shows("All is well", "#verdict")


def test_the_page_outlives_the_appliance_and_finds_it_again(page: Page, watched: House) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    assert watched.stop() == 0
    page.shows("does not answer", "#verdict")
    page.shows("no connection", "#link")
    watched.start()
    page.shows("All is well", "#verdict")
    page.shows("live", "#link")
