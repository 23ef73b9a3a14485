"""Events: numbered without gaps, and no listener can harm another."""

from __future__ import annotations

import pytest

from appliance.observability.events import Event, EventBus


def test_events_are_numbered_and_counted_and_end_with_the_subscription() -> None:
    bus = EventBus()
    heard: list[Event] = []
    end = bus.subscribe(heard.append)
    bus.publish("model.state", model="m")
    bus.publish("model.state", model="n")
    end()
    end()
    bus.publish("other")
    assert [(event.seq, event.topic, event.data["model"]) for event in heard] == [
        (1, "model.state", "m"),
        (2, "model.state", "n"),
    ]
    assert bus.seq == 3
    assert bus.counts == {"model.state": 2, "other": 1}


def test_a_listener_that_raises_is_logged_and_the_next_one_hears(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("mine")

    bus.subscribe(broken)
    bus.subscribe(heard.append)
    bus.publish("x")
    assert len(heard) == 1
    assert "events.listener_failed" in caplog.text
