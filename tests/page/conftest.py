"""A real Chromium before a real appliance on a box with a scripted GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.e2e.house import LONG_S, House
from tests.fakes.nvml import StubNvml

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = (
    ""
    if BROWSER and DRIVER and not StubNvml.missing()
    else "needs Chromium and its driver (apt-get install chromium chromium-driver) and gcc"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
    "--lang=en",
)
T = TypeVar("T")


class Page:
    """The browser, as a test uses it: it waits for what a reader would see."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        self.address = address
        self.requested: set[str] = set()

    def open(self, view: str = "overview") -> Page:
        self.driver.get(f"{self.address}/#{view}")
        return self

    def until(self, condition: Callable[[], T]) -> T:
        return WebDriverWait(self.driver, LONG_S, 0.05).until(lambda _: condition())

    def text(self, selector: str = "main") -> str:
        found: str = self.driver.execute_script(
            "return document.querySelector(arguments[0])?.innerText ?? ''", selector
        )
        return found

    def shows(self, words: str, selector: str = "main") -> str:
        """The text there, once those words are in it."""
        try:
            return self.until(lambda: words in self.text(selector) and self.text(selector))
        except Exception as error:
            raise AssertionError(f"{words!r} is not in: {self.text(selector)!r}") from error

    def click(self, selector: str) -> None:
        self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, selector))
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def complaints(self) -> list[str]:
        """What the console holds that is no expected answer of the appliance."""
        expected = (
            "status of 404",
            "status of 503",
            "ERR_CONNECTION_REFUSED",
            "ERR_INCOMPLETE_CHUNKED_ENCODING",
            # the chart library brings the styles of maps, which the policy refuses and nobody here needs
            "plotly.js 20 Applying inline style",
        )
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if not any(words in entry["message"] for words in expected)
        ]

    def hosts(self) -> set[str]:
        """Every host that the browser asked for anything."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if url.startswith("http"):
                    self.requested.add(url.split("/")[2])
        return self.requested


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubNvml]:
    stub = StubNvml(tmp_path_factory.mktemp("nvml")).start()
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, gpu: StubNvml) -> Iterator[House]:
    house = House(Path(tmp_path_factory.mktemp("page")) / "house")
    house.digits()
    house.loopback("whip", shape="-1", commands="true")
    house.environment = gpu.environment()
    house.settings["sensors"] = {"interval_s": 0.2}
    house.settings["governor"] = {"dwell_s": 0.2, "max_dwell_s": 0.4, "lookahead_s": 0.0}
    house.settings["workers"] = {"crash_limit": 2, "crash_window_s": 3600.0}
    house.start()
    # the port stays the same when it is started again under the page
    house.settings["http"] = {"port": int(house.http.rpartition(":")[2])}
    yield house
    house.finish()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # a reader far from UTC, without summer time: what is drawn in the wrong zone is hours off
    service = Service(DRIVER or "", env={**os.environ, "TZ": "Asia/Shanghai"})
    made = webdriver.Chrome(options=options, service=service)
    yield made
    made.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, watched: House) -> Iterator[Page]:
    """A fresh page: no kept language or theme. Whatever the test does, the console stays clean and nobody outside is asked."""
    made = Page(driver, watched.http)
    driver.get(f"{watched.http}/page/icon.svg")
    driver.execute_script("localStorage.clear()")
    yield made
    assert made.complaints() == []
    assert made.hosts() <= {watched.http.removeprefix("http://")}
