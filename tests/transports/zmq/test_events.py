"""Events on the PUB socket: framing, numbers, heartbeat, snapshot."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import pytest
import zmq

from tests.transports.zmq.conftest import House, Wire


async def _next(subscriber: Any) -> tuple[str, int, dict[str, Any]]:
    topic, seq, body = await asyncio.wait_for(subscriber.recv_multipart(), 5)
    return topic.decode(), struct.unpack(">Q", seq)[0], json.loads(body)


async def _listening(wire: Wire, endpoint: str, topic: bytes = b"") -> Any:
    """A subscriber whose subscription has arrived: it has seen a heartbeat."""
    subscriber = wire.socket(zmq.SUB, endpoint)
    subscriber.subscribe(b"heartbeat")
    subscriber.subscribe(topic)
    await _next(subscriber)
    subscriber.unsubscribe(b"heartbeat")
    return subscriber


async def _next_but_heartbeats(subscriber: Any) -> tuple[str, int, dict[str, Any]]:
    while True:
        event = await _next(subscriber)
        if event[0] != "heartbeat":
            return event


@pytest.mark.parametrize("face", [2, 3])
async def test_events_come_with_topic_number_and_body(house: House, wire: Wire, face: int) -> None:
    subscriber = await _listening(wire, house.transport.endpoints[face])
    house.service.publish("model.state", {"model": "echo", "state": "READY"})
    house.service.publish("worker.died", {"model": "echo"})
    topic, seq, body = await _next_but_heartbeats(subscriber)
    assert (topic, seq, body["boot"]) == ("model.state", 1, "boot-1")
    assert body["data"] == {"model": "echo", "state": "READY"}
    assert body["time"].startswith("20")
    assert (await _next_but_heartbeats(subscriber))[:2] == ("worker.died", 2)


async def test_subscribing_by_topic_gives_that_topic(house: House, wire: Wire) -> None:
    subscriber = await _listening(wire, house.events, b"worker.")
    house.service.publish("model.state", {})
    house.service.publish("worker.died", {})
    assert (await _next_but_heartbeats(subscriber))[:2] == ("worker.died", 2)


async def test_the_heartbeat_repeats_the_last_number(house: House, wire: Wire) -> None:
    house.service.publish("model.state", {})
    subscriber = wire.socket(zmq.SUB, house.events)
    subscriber.subscribe(b"heartbeat")
    topic, seq, body = await _next(subscriber)
    assert (topic, seq, body["data"]) == ("heartbeat", 1, {"ready": True})
    assert (await _next(subscriber))[1] == 1


async def test_a_snapshot_says_which_events_it_includes(house: House, wire: Wire) -> None:
    subscriber = await _listening(wire, house.events)
    house.service.publish("model.state", {"n": 1})
    snapshot = (await wire.dealer(house.ipc).ask({"op": "snapshot"}))["snapshot"]
    house.service.publish("model.state", {"n": 2})
    first, second = await _next_but_heartbeats(subscriber), await _next_but_heartbeats(subscriber)
    assert first[1] <= snapshot["seq"] < second[1]


async def test_an_event_that_cannot_be_written_disturbs_neither_service_nor_the_next(house: House, wire: Wire) -> None:
    subscriber = await _listening(wire, house.events)
    house.service.publish("model.state", {"bad": object()})
    house.service.publish("model.state", {"n": 2})
    assert (await _next_but_heartbeats(subscriber))[1] == 2
    assert house.transport.counters.events_failed == 1


async def test_after_close_the_service_has_no_listener(house: House) -> None:
    assert len(house.service.listeners) == 1
    await house.transport.close()
    assert house.service.listeners == []
