"""Publishes the service's events: [topic][sequence number][JSON], and a heartbeat that repeats the last number.

A subscriber that sees a gap, also one that only the heartbeat shows, asks for a snapshot over the request socket. PUB drops for a
subscriber that does not read, after `EVENT_HWM` events; nobody else notices. It knows the service and its socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import zmq

from appliance.protocols import zmq_wire as wire
from appliance.transports.zmq.counters import Counters

if TYPE_CHECKING:
    from appliance.observability.events import Event
    from appliance.service import InferenceService

log = logging.getLogger(__name__)

EVENT_HWM = 1000
"""Events kept for one subscriber that does not read: less than 1 MB, events are a few hundred bytes."""


class EventPublisher:
    """Feeds one PUB socket that the caller has bound and will close.

    libzmq takes in new subscriptions when the socket sends, before it looks who gets the message: nothing needs watching.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], service: InferenceService, counters: Counters, *, heartbeat_s: float
    ) -> None:
        self._socket = socket
        self._service = service
        self._counters = counters
        self._heartbeat_s = heartbeat_s
        self._boot = ""
        self._seq = 0
        self._timer: asyncio.TimerHandle | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Publish from now on."""
        self._loop = asyncio.get_running_loop()
        self._boot = self._service.describe_server().boot_id
        self._seq = int(self._service.snapshot()["seq"])
        self._unsubscribe = self._service.subscribe(self._publish)
        self._heartbeat()

    def stop(self) -> None:
        """Publish no more."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if self._timer is not None:
            self._timer.cancel()

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
            log.exception("zmq.event_failed", extra={"fields": {"topic": topic}})
