"""From the house's events to the recorder: which are kept, how grave they are, and which are an operator's.

Knows events only by their shape (`observability` is a neighbour that this room does not import); the daemon connects the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

NOT_KEPT = frozenset({"model.progress"})
"""Told a hundred times a build; its end is a model.state."""

SEVERITIES = {
    "worker.lost": "error",
    "requests.refused": "warning",
    "memory.leak": "warning",
    "memory.refused": "warning",
    "engine.gave_out": "warning",
    "worker.recycled": "warning",
    "config.refused": "error",
}


class Happened(Protocol):
    """An event of the house."""

    @property
    def topic(self) -> str:
        """Like "model.state"."""

    @property
    def data(self) -> dict[str, Any]:
        """Its fields."""


class Sink(Protocol):
    """The recorder, as far as this needs it."""

    def record_event(self, kind: str, severity: str = "info", fields: dict[str, Any] | None = None) -> None:
        """See `Recorder.record_event`."""

    def record_action(self, actor: str, action: str, fields: dict[str, Any] | None = None) -> None:
        """See `Recorder.record_action`."""


def as_recorded(topic: str, data: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Kind, severity and fields that an event has in the record. What an operator did has one kind, and its name as a field."""
    fields = dict(data)
    if topic.startswith("operator."):
        action = topic.removeprefix("operator.")
        return "operator.action", "info", {"actor": fields.pop("actor", "local"), "action": action, **fields}
    severity = SEVERITIES.get(topic, "info")
    if fields.get("state") == "FAILED":
        severity = "error"
    return topic, str(fields.get("severity", severity)), fields


def listener(sink: Sink) -> Callable[[Happened], None]:
    """What to subscribe to the events. Never blocks, as listeners must not."""

    def record(event: Happened) -> None:
        if event.topic in NOT_KEPT:
            return
        if event.topic.startswith("operator."):
            fields = dict(event.data)
            actor = str(fields.pop("actor", "local"))
            sink.record_action(actor, event.topic.removeprefix("operator."), fields)
            return
        sink.record_event(*as_recorded(event.topic, event.data))

    return record
