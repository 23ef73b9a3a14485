"""Publishes the service's events: [topic][sequence number][JSON], and a heartbeat that repeats the last number.

A subscriber that sees a gap, also one that only the heartbeat shows, asks for a snapshot over the request socket. PUB drops for a
subscriber that does not read, after `EVENT_HWM` events; nobody else notices. It knows the service and its socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from appliance.protocols import zmq_wire as wire
from appliance.transports.zmq.counters import Counters

if TYPE_CHECKING:
    from appliance.service import InferenceService

log = logging.getLogger(__name__)

EVENT_HWM = 1000
"""Events kept for one subscriber that does not read: less than 1 MB, events are a few hundred bytes."""


class Event(Protocol):
    """What is read of an event."""

    @property
    def topic(self) -> str:
        """Its kind, like "model.state"."""

    @property
    def seq(self) -> int:
        """Its number, without gaps."""

    @property
    def time(self) -> str:
        """ISO 8601, UTC."""

    @property
    def data(self) -> dict[str, Any]:
        """JSON-ready."""


class EventPublisher:
    """Feeds one PUB socket that the caller has bound and will close."""

    def __init__(
        self, socket: zmq.Socket[bytes], service: InferenceService, counters: Counters, *, heartbeat_s: float
    ) -> None:
        self._socket = socket
        self._service = service
        self._counters = counters
        self._heartbeat_s = heartbeat_s
        self._boot = ""
        self._seq = 0
        self._fd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Publish from now on."""
        self._loop = asyncio.get_running_loop()
        self._boot = self._service.describe_server().boot_id
        self._seq = int(self._service.snapshot()["seq"])
        self._unsubscribe = self._service.subscribe(self._publish)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        # a PUB takes in new subscriptions when somebody touches it; without this a subscriber would wait for the next event
        self._loop.add_reader(self._fd, self._socket.getsockopt, zmq.EVENTS)
        self._heartbeat()

    def stop(self) -> None:
        """Publish no more."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if self._timer is not None:
            self._timer.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None

    def _publish(self, event: Event) -> None:
        self._seq = event.seq
        self._send(event.topic, event.time, event.data)

    def _heartbeat(self) -> None:
        assert self._loop is not None
        self._timer = self._loop.call_later(self._heartbeat_s, self._heartbeat)
        self._send(wire.HEARTBEAT_TOPIC, datetime.now(UTC).isoformat(), {"ready": self._service.ready()})

    def _send(self, topic: str, time: str, data: dict[str, Any]) -> None:
        try:
            frames = wire.encode_event(topic, self._seq, {"time": time, "boot": self._boot, "data": data})
            self._socket.send_multipart(frames, zmq.NOBLOCK)
            self._counters.events_published += 1
        except Exception:
            # called from inside the service: an event that cannot be written must not disturb what it tells of
            self._counters.events_failed += 1
            log.exception("zmq_event_failed topic=%s", topic)
