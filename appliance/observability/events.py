"""What happened, in order: events with sequence numbers, handed to whoever listens.

A plain fan-out on the event loop. Listeners must not block and must not raise; each bounds its own backlog.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeAlias

import msgspec

log = logging.getLogger(__name__)


class Event(msgspec.Struct, frozen=True):
    """`topic` like "model.state"; `seq` without gaps since the start; `time` ISO 8601 in UTC; `data` ready for JSON."""

    topic: str
    seq: int
    time: str
    data: dict[str, Any]


EventListener: TypeAlias = Callable[[Event], None]


class EventBus:
    """Numbers events and hands them on. `seq` is the last one's number, 0 before the first."""

    def __init__(self) -> None:
        self.seq = 0
        self.counts: dict[str, int] = {}
        self._listeners: list[EventListener] = []

    def publish(self, topic: str, **data: Any) -> None:
        """Tell everyone. A listener that raises is a bug of ours: logged, and the others hear it all the same."""
        self.seq += 1
        self.counts[topic] = self.counts.get(topic, 0) + 1
        event = Event(topic, self.seq, datetime.now(UTC).isoformat(timespec="milliseconds"), data)
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("events.listener_failed")

    def subscribe(self, listener: EventListener) -> Callable[[], None]:
        """Call `listener` for every event from now on; the result ends that, and may be called twice."""
        self._listeners.append(listener)

        def end() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return end
