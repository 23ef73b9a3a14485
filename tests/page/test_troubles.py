"""Every trouble of the table in a real browser: the overview's sentence, colour, findings with what to do, and tiles, while it
lasts and after it; and what the view over time keeps of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.house import House
from tests.e2e.troubles import TROUBLES, Box, Trouble, arrived, healthy
from tests.page.conftest import MISSING, Page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = Box(Path(tmp_path_factory.mktemp("troubles")))
    try:
        yield box.start()
    finally:
        box.finish()


@pytest.fixture(scope="module")
def watched(played: Box) -> House:
    """What the page of these tests looks at."""
    return played.house


@pytest.fixture
def box(played: Box) -> Box:
    """The box in good health."""
    try:
        played.until(healthy)
    except AssertionError:  # what one test left behind must not fail the next
        played.heal()
    return played


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_the_overview_shows_a_trouble_and_its_end(page: Page, box: Box, trouble: Trouble) -> None:
    page.open()
    page.shows("All is well", "#verdict")
    box.begin(trouble)
    box.until(arrived(trouble))
    # some begin with a restart, under the eyes of the page
    page.shows("one model answers" if trouble.gpu_refusal else "2 models answer", "#verdict")
    page.shows(trouble.sentence, "#verdict")
    for words in trouble.shown:
        page.shows(words, "#verdict")
    for words in trouble.view:
        page.shows(words)
    assert page.script("return document.getElementById('verdict').className").endswith(trouble.page)
    box.end(trouble)
    said = page.shows("All is well: 2 models answer", "#verdict")
    assert page.script("return document.getElementById('verdict').className").endswith("good")
    assert not any(words in said for words in trouble.shown)


LANE = """
  const chart = document.getElementById('chart');
  const found = (chart?.data ?? []).filter((trace) => trace.type === 'bar' && trace.name.endsWith(arguments[0]));
  return found.flatMap((trace) => trace.text.map((text, index) => [text, trace.marker.color[index]]));
"""
MARKS = "return (document.getElementById('chart')?.layout?.annotations ?? []).map((mark) => mark.hovertext)"


def test_heat_leaves_its_lanes_and_its_marks_in_the_view_over_time(page: Page, box: Box) -> None:
    trouble = next(one for one in TROUBLES if one.name == "throttled")
    box.begin(trouble)
    box.until(arrived(trouble))
    page.open("history/1h")
    colours: dict[str, str] = page.script(
        "const style = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(['bad', 'good', 'soft'].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]))"
    )

    def lane(name: str) -> dict[str, set[str]]:
        told: dict[str, set[str]] = {}
        for text, colour in page.script(LANE, name):
            told.setdefault(text, set()).add(colour)
        return told

    throttle: Any = page.until(lambda: "throttled" in lane("throttle") and lane("throttle"))
    assert throttle["throttled"] == {colours["bad"]}
    governor: Any = page.until(lambda: "Hot" in lane("Governor") and lane("Governor"))
    assert governor["Hot"] == {"#d9652b"}
    marks = page.script(MARKS)
    assert any("GPU 0 is slowed: SwThermalSlowdown" in mark for mark in marks), marks
    assert any(mark.startswith("governor.level: HOT GPU 0 is at 90 °C") for mark in marks), marks
    box.end(trouble)
    box.until(healthy)
    page.until(lambda: "not throttled" in lane("throttle") and "Nominal" in lane("Governor"))
    page.until(lambda: any("GPU 0 runs at full speed again" in mark for mark in page.script(MARKS)))
    assert "throttled" in lane("throttle"), "what was is kept"
