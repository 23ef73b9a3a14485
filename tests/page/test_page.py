"""The page in a real browser: every view, in both languages and themes, live, and through trouble."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
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


DRAWN = """
  const chart = document.getElementById('chart'), axis = chart?._fullLayout?.xaxis;
  if (!axis || !chart.data) return null;
  const at = (x) => axis.d2c(x);
  return {
    samples: chart.data.filter((trace) => trace.mode === 'lines').flatMap((trace) => trace.x.map(at)),
    marks: chart.layout.annotations.map((mark) => [at(mark.x), mark.hovertext]),
    lines: chart.layout.shapes.map((line) => at(line.x0)),
    lanes: chart.data.filter((trace) => trace.type === 'bar').map((bar) => [bar.name, bar.width, bar.offset]),
  };
"""


def test_marks_are_where_the_samples_of_their_time_are(page: Page, watched: House) -> None:
    Appliance(watched.http).post("/v2/repository/models/whip/load")
    page.open("history/1h")
    assert page.script("return new Date(0).getTimezoneOffset()") == -480

    def drawn() -> Any:
        found = page.script(DRAWN)
        return found and any(text.startswith("operator.action") for _, text in found["marks"]) and found

    found = page.until(drawn)
    first, last = min(found["samples"]), max(found["samples"])
    assert found["marks"]
    assert all(first <= when <= last + 10_000 for when, _ in found["marks"])
    assert found["lines"][: len(found["marks"])] == [when for when, _ in found["marks"]]
    assert {offset for _, _, offset in found["lanes"]} == {0}, "a bar begins at its moment"


def test_an_hour_is_read_once_and_then_only_what_is_new(page: Page) -> None:
    page.open("history/1h")
    page.until(lambda: page.script(DRAWN))
    asked = "return performance.getEntriesByType('resource').map((one) => one.name)"
    page.script("performance.clearResourceTimings()")
    before = max(page.script(DRAWN)["samples"])
    page.until(lambda: max(page.script(DRAWN)["samples"]) > before)
    queries = [parse_qs(urlsplit(address).query) for address in page.script(asked) if "/history?" in address]
    assert queries
    assert all(float(query["since"][0]) > time.time() - 60 and query["step"] for query in queries)
    line = "document.getElementById('chart').data.find((trace) => trace.mode === 'lines')"
    samples = page.script(f"return {line}.x.map(Number)")
    assert samples == sorted(set(samples)), "each moment once"


def test_a_window_that_is_zoomed_into_asks_for_its_own_marks(page: Page) -> None:
    page.open("history/24h")
    page.until(lambda: page.script(DRAWN))
    page.script(
        "performance.clearResourceTimings();"
        "Plotly.relayout('chart', { 'xaxis.range[0]': '2026-03-02', 'xaxis.range[1]': '2026-03-03 12:00' })"
    )
    addresses = "return performance.getEntriesByType('resource').map((one) => one.name)"

    def asked(what: str) -> dict[str, list[str]] | None:
        found = [address for address in page.script(addresses) if f"/{what}?" in address]
        return parse_qs(urlsplit(found[0]).query) if found else None

    begin = 1772380800  # midnight in Shanghai
    for what in ("history", "events"):
        query = page.until(lambda what=what: asked(what))
        assert (float(query["since"][0]), float(query["until"][0])) == (begin, begin + 36 * 3600), what
        if what == "events":
            assert {"clock.step", "requests.refused", "operator", "recorder", "memory.refused", "config"} <= set(
                query["kind"][0].split(",")
            )


def test_many_events_of_a_kind_leave_room_for_the_others(page: Page) -> None:
    page.open()
    page.shows("live", "#link")
    kept = page.driver.execute_async_script(
        """
        const done = arguments[0], refused = Array.from({ length: 400 }, (_, id) => ({ topic: "requests.refused", id }));
        import('/page/views/history.js').then((view) => done(view.fewest([...refused, { topic: "worker.lost", id: 400 }])));
        """
    )
    assert [one["id"] for one in kept] == [*range(15), 400]


def test_the_chart_outlives_the_appliance(page: Page, watched: House) -> None:
    page.open("history/1h")
    marks = "document.getElementById('chart').layout.annotations.map((mark) => mark.hovertext)"
    starts = f"return {marks}.filter((text) => text.startsWith('daemon.start')).length"
    page.until(lambda: page.script(DRAWN))
    before = page.script(starts)
    assert watched.stop() == 0
    page.shows("no connection", "#link")
    assert page.script(DRAWN), "what it said last stays"
    watched.start()
    page.until(lambda: page.script(DRAWN) and page.script(starts) > before)


def test_lanes_and_requests_are_asked_for_however_many_sensors_there_are(page: Page) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    asked = page.driver.execute_async_script(
        """
        const done = arguments[0], asked = [], fetched = window.fetch;
        window.fetch = (path, ...more) => { asked.push(String(path)); return fetched(path, ...more); };
        Promise.all([import('/page/store.js'), import('/page/views/history.js')]).then(([{ store }, view]) => {
          for (let index = 0; index < 150; index++) store.snapshot.readings[`host.temperature.s${index}`] = 40;
          const end = view.render(document.getElementById('main'), ['1h']);
          setTimeout(() => { end(); window.fetch = fetched; done(asked.filter((path) => path.includes('/history?'))); }, 1500);
        });
        """
    )
    names = [parse_qs(urlsplit(path).query)["names"][0].split(",") for path in asked]
    assert {"gpu.0.throttle", "governor.level", "requests.rate", "requests.p99"} <= set(names[0])
    assert all(len(some) <= 64 for some in names)
    assert {f"host.temperature.s{index}" for index in range(150)} <= {name for some in names for name in some}


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


def test_the_python_call_that_is_shown_runs(page: Page, watched: House) -> None:
    page.open("try/digits")
    page.shows("The same from a program")
    page.script(
        "[...document.querySelectorAll('.row button')].find((button) => button.textContent === 'Python').click()"
    )
    tcp = next(address for address in watched.addresses if address.startswith("tcp:"))
    shown = page.text("pre[tabindex]")
    assert tcp in shown
    called = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, timeout=LONG_S, check=False)
    assert called.returncode == 0, called.stderr
    assert called.stdout.count(".") >= 10, "ten probabilities"


def test_a_call_goes_where_programs_can_ask(page: Page) -> None:
    page.open("try/digits")
    page.shows("live", "#link")
    found = page.driver.execute_async_script(
        """
        const done = arguments[0];
        import('/page/views/try.js').then(({ endpoint }) => done([
          endpoint(["ipc:///run/a.sock", "tcp://0.0.0.0:5570"], "box"),
          endpoint(["ipc:///run/a.sock", "tcp://10.0.0.7:1"], "box"),
          endpoint(["tcp://[::]:9"], "[fe80::1]"),
          endpoint(["ipc:///run/a.sock"], "box"),
          endpoint([], "box"),
        ]));
        """
    )
    assert found == ["tcp://box:5570", "tcp://10.0.0.7:1", "tcp://[fe80::1]:9", "ipc:///run/a.sock", ""]


def test_a_call_names_every_input_in_types_that_exist(page: Page) -> None:
    page.open("try/digits")
    page.shows("live", "#link")
    texts: dict[str, str] = page.driver.execute_async_script(
        """
        const done = arguments[0], input = (name, datatype, shape) => ({ name, datatype, shape });
        const some = [["a", "INT64", [-1, 2]], ["b", "BOOL", [2]], ["c", "BYTES", [3]]].map((one) => input(...one));
        const half = [["h", "FP16", [1, 2]], ["q", "BF16", [2]]].map((one) => input(...one));
        import('/page/views/try.js').then(({ calls }) => {
          const made = (inputs) => calls("m", { inputs, outputs: [{ name: "y" }] }, "http://box", "tcp://box:1");
          const json = made(some), bare = made(half);
          done({ curl: json.curl, Python: json.Python, cpp: json["C++"], half: bare.Python, bare: bare.curl });
        });
        """
    )
    written = texts["curl"].split("python3 -c '")[1].split("'")[0]
    told = subprocess.run([sys.executable, "-c", written], capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == {
        "inputs": [
            {"name": "a", "datatype": "INT64", "shape": [1, 2], "data": [0, 0]},
            {"name": "b", "datatype": "BOOL", "shape": [2], "data": [False, False]},
            {"name": "c", "datatype": "BYTES", "shape": [3], "data": ["", "", ""]},
        ]
    }
    given: dict[str, Any] = {}
    for text in (texts["Python"], texts["half"]):
        inputs = text.partition("inputs = ")[2].partition("    result")[0]
        given |= eval(inputs, {"np": np})
    assert {name: (str(array.dtype), array.shape) for name, array in given.items()} == {
        "a": ("int64", (1, 2)),
        "b": ("bool", (2,)),
        "c": ("object", (3,)),
        "h": ("float16", (1, 2)),
        "q": ("float32", (2,)),
    }
    assert "one FP32 input" in texts["cpp"]
    assert "which JSON cannot carry" in texts["bare"]


def test_a_call_is_copied_without_the_clipboard_of_secure_pages(page: Page) -> None:
    page.open("try/digits")
    page.shows("The same from a program")
    page.script(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true });"
        "document.addEventListener('copy', () => { window.taken = getSelection().toString(); });"
    )
    page.click("#copy")
    page.shows("Copied", "#copy")
    assert page.script("return window.taken") == page.text("pre[tabindex]")


def test_the_verdict_is_read_out_when_it_is_news_and_marks_the_tab(page: Page, gpu: StubNvml) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    assert page.driver.title == "Overview · appliance"
    page.script(
        "window.said = [];"
        "new MutationObserver(() => window.said.push(document.getElementById('said').textContent))"
        ".observe(document.getElementById('said'), { childList: true, characterData: true, subtree: true });"
    )
    for temperature in (62, 63):
        gpu.set("0.temperature", temperature)
        page.shows(f"GPU at {temperature} °C", "#verdict")
    assert page.script("return window.said") == [], "a number is no news"
    assert page.script("return document.querySelectorAll('#verdict[aria-live], #verdict [aria-live]').length") == 0
    gpu.set("0.margin", 1)
    gpu.set("0.temperature", 94)
    page.shows("Critical", "#verdict")
    assert page.driver.title == "⚠ Overview · appliance"
    assert "Critical" in page.script("return window.said.at(-1)")
    gpu.set("0.margin", 34)
    gpu.set("0.temperature", 61)
    page.shows("All is well", "#verdict")
    assert page.driver.title == "Overview · appliance"


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


TOO_WIDE = """
  const found = document.documentElement.scrollWidth > document.documentElement.clientWidth ? ["the page"] : [];
  for (const one of document.querySelectorAll('.wide')) if (one.scrollWidth > one.clientWidth) found.push(one.innerText);
  const chart = document.querySelector('#chart .main-svg'), panel = document.querySelector('.panel:has(#chart)');
  if (chart && chart.getBoundingClientRect().right > panel.getBoundingClientRect().right) found.push("the chart");
  return found;
"""


@pytest.mark.parametrize("language", ["en", "zh"])
def test_on_a_tablet_nothing_is_wider_than_the_screen(page: Page, watched: House, language: str) -> None:
    ask(watched, "digits", image={"datatype": "FP32", "shape": [1, 28, 28, 1], "data": [0.5] * 784})
    page.script(f"localStorage.setItem('language', '{language}')")
    page.driver.set_window_size(768, 1024)
    try:
        for view in (*VIEWS, "models/digits"):
            page.driver.get("about:blank")
            page.open(view)
            page.until(lambda: page.text("main").strip())
            if view == "history":
                page.until(lambda: page.script(DRAWN))
            if view.startswith("models"):
                page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "tr.open[data-key=digits] button"))
            assert page.script(TOO_WIDE) == [], view
    finally:
        page.driver.set_window_size(1280, 900)


def test_why_a_model_does_not_serve_has_the_table_s_width(page: Page) -> None:
    page.driver.set_window_size(768, 1024)
    try:
        page.open("models")
        page.shows("digits")
        page.script(
            """
            const done = arguments[0], reason = "the file of the model cannot be read: " + "it ends before its end. ".repeat(8);
            window.end = null;
            import('/page/dom.js').then(({ h, table, breakable }) => {
              const cells = ["camera-of-line-7", "1", "READY", breakable("CPUExecutionProvider"), "12.5"];
              const titles = ["Model", "Version", "State", "Engine", "Requests/s"].map((title) => ({ title, text: true }));
              document.getElementById('main').replaceChildren(h("div", { id: "made" },
                table(titles, [{ cells, onclick: () => { window.opened = true; }, note: reason }, { cells }], "")));
            });
            """
        )
        page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#made tr.note"))
        wide, table, lines = page.script(
            "const note = document.querySelector('#made tr.note td');"
            "return [note.offsetWidth, note.closest('table').offsetWidth, note.offsetHeight / 22]"
        )
        assert wide == table
        assert lines < 5
        assert page.script("return document.querySelectorAll('#made tr.note').length") == 1
        page.click("#made tr.note td")
        assert page.script("return window.opened")
        assert page.text("#made td:nth-child(4)") == "CPUExecutionProvider"
    finally:
        page.driver.set_window_size(1280, 900)


def test_a_lane_has_holes_only_where_nothing_was_recorded(page: Page) -> None:
    page.open("history/1h")
    page.until(lambda: page.script(DRAWN))
    holes = page.script(
        """
        return document.getElementById('chart').data.filter((trace) => trace.type === 'bar').map(({ x, width }) =>
          x.slice(1).map((next, index) => next - x[index] - width[index]).filter((hole) => Math.abs(hole) > 1 && hole < 5000));
        """
    )
    assert len(holes) >= 2
    assert not any(holes)
    found = page.driver.execute_async_script(
        """
        const done = arguments[0];
        import('/page/views/history.js').then(({ lengths }) => done([
          lengths([0, 1, 2, 4, 5, 30, 31], 1), lengths([0, 10, 20, 30, 300], 1), lengths([0, 60, 120, 300], 60),
          lengths([7], 1), lengths([], 1),
        ]));
        """
    )
    assert found == [[1, 1, 2, 1, 1, 1, 1], [10, 10, 10, 1, 1], [60, 60, 60, 60], [1], []]


def test_a_recorder_that_does_not_record_is_something_to_know(page: Page) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    found = page.driver.execute_async_script(
        """
        const done = arguments[0];
        Promise.all([import('/page/store.js'), import('/page/health.js')]).then(([{ store }, { health }]) =>
          done(health({ ...store.snapshot, recorder: { ...store.snapshot.recorder, problem: "no room" } })));
        """
    )
    assert found["severity"] == "notice"
    assert [one["text"] for one in found["found"]] == ["The flight recorder does not record: no room"]


def test_what_is_empty_keeps_the_panel_s_distance(page: Page) -> None:
    page.open("energy")
    page.shows("live", "#link")
    padding = page.script(
        "const made = document.createElement('p'); made.className = 'panel empty'; document.body.append(made);"
        "return getComputedStyle(made).paddingLeft"
    )
    assert float(padding.removesuffix("px")) > 10


def test_a_call_says_whose_its_address_is(page: Page) -> None:
    page.open("try/digits")
    page.shows("The same from a program")
    assert "zmq" not in page.text("section")
    page.script("[...document.querySelectorAll('.row button')].find((button) => button.textContent === 'C++').click()")
    page.shows("That address is this machine's alone; [zmq] tcp", "section")
    found = page.driver.execute_async_script(
        """
        const done = arguments[0], tcp = ["127.0.0.1", "0.0.0.0", "10.0.0.7"].map((one) => ["ipc:///a", `tcp://${one}:1`]);
        import('/page/views/try.js').then(({ local }) => done([...tcp, ["ipc:///a"], ["tcp://[::1]:1"], []].map(local)));
        """
    )
    assert found == [True, False, False, True, True, False]


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


def test_a_folder_that_is_wrong_is_named_without_a_version_that_it_does_not_have(page: Page) -> None:
    page.open("events")
    page.shows("live", "#link")
    texts = page.driver.execute_async_script(
        """
        const done = arguments[0], wrong = { model: "q", version: "", state: "FAILED", reason: "no TOML" };
        Promise.all([import('/page/views/events.js'), import('/page/health.js')]).then(([{ describe }, { health }]) => done([
          describe({ topic: "model.state", data: wrong }),
          describe({ topic: "config.reloaded", data: { needs_restart: [] } }),
          describe({ topic: "config.reloaded", data: { needs_restart: ["http.port"] } }),
          health({ status: { requests_per_s: 0 }, models: [{ ...wrong, name: "q", detail: "FAILED" }] }).found[0].text,
        ]));
        """
    )
    assert texts == ["q: FAILED no TOML", "", 'needs_restart ["http.port"]', "q does not serve: no TOML"]


def test_the_page_outlives_the_appliance_and_finds_it_again(page: Page, watched: House) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    assert watched.stop() == 0
    page.shows("does not answer", "#verdict")
    page.shows("no connection", "#link")
    watched.start()
    page.shows("All is well", "#verdict")
    page.shows("live", "#link")


def told(page: Page, topic: str) -> int:
    """How often the events' list has a topic that begins so."""
    topics: list[str] = page.script(
        "return [...document.querySelectorAll('#events summary span')].map((one) => one.textContent)"
    )
    return sum(one.startswith(topic) for one in topics)


def test_a_page_that_stays_open_learns_of_a_restart(page: Page, watched: House) -> None:
    page.open("events")
    page.shows("daemon.start", "#events")
    before = told(page, "daemon.start")
    assert watched.stop() == 0
    page.shows("no connection", "#link")
    watched.start()
    page.until(lambda: told(page, "daemon.start") == before + 1)
    shown = page.script(
        "return [...document.querySelectorAll('#events details')].map((one) => one.querySelector('time').dateTime)"
    )
    assert shown == sorted(shown, reverse=True)


def test_an_event_that_was_seen_live_and_is_recorded_is_shown_once(page: Page, watched: House) -> None:
    page.open("events")
    page.shows("live", "#link")
    page.shows("daemon.start", "#events")
    before = told(page, "operator.")
    Appliance(watched.http).post("/v2/repository/models/whip/load")
    page.until(lambda: told(page, "operator.") == before + 1)
    assert watched.stop() == 0
    page.shows("no connection", "#link")
    known = told(page, "daemon.start")
    watched.start()
    page.until(lambda: told(page, "daemon.start") == known + 1)
    assert told(page, "operator.") == before + 1


def test_an_appliance_that_falls_silent_is_not_called_well(page: Page, watched: House) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    os.kill(watched.pid, signal.SIGSTOP)
    try:
        page.shows("does not answer", "#verdict")
        page.shows("no connection", "#link")
    finally:
        os.kill(watched.pid, signal.SIGCONT)
    page.shows("All is well", "#verdict")
    page.shows("live", "#link")
