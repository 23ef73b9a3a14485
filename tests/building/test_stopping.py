"""SIGTERM in a build process: it ends at once, or when what looks for it has ended by itself, and never goes unnoticed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from appliance.building.stopping import STOPPED, Stop


@pytest.fixture
def stop() -> Iterator[Stop]:
    before = signal.getsignal(signal.SIGTERM)
    made = Stop()
    made.listen()
    yield made
    signal.signal(signal.SIGTERM, before)


def test_it_ends_at_once(stop: Stop) -> None:
    with pytest.raises(SystemExit) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == STOPPED


def test_what_looks_for_it_ends_by_itself_first(stop: Stop) -> None:
    steps = []

    def work() -> None:
        with stop.polled():
            signal.raise_signal(signal.SIGTERM)
            stop.check()
            steps.append(stop.asked)

    with pytest.raises(SystemExit):
        work()
    assert steps == [True]


def test_one_that_was_swallowed_is_raised_again(stop: Stop) -> None:
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        stop.check()


def test_nothing_happens_when_nobody_asks(stop: Stop) -> None:
    with stop.polled():
        stop.check()
    stop.check()
    assert not stop.asked
