"""The use cases, transport-neutral: infer, describe, ready, index, load, unload, statistics, snapshot.

Transports call this and nothing below it. It knows no HTTP status and no frame; it raises `ApplianceError` or gives values from
`core`. Everything here runs on the one event loop that owns all mutable state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from appliance.core.description import (
    IndexEntry,
    ModelDescription,
    ModelStatistics,
    ServerDescription,
    WorkerDescription,
)
from appliance.core.errors import ApplianceError
from appliance.core.request import InferenceRequest, InferenceResponse, ModelName, Version

Outcome: TypeAlias = InferenceResponse | ApplianceError
Done: TypeAlias = Callable[[Outcome], None]
EventListener: TypeAlias = Callable[["Event"], None]


class Ticket(Protocol):
    """An admitted request, to be given back to `cancel`."""


class Event(Protocol):
    """Something that happened: `topic` like "model.state", `seq` without gaps, `data` JSON-ready, `time` ISO 8601 UTC."""

    topic: str
    seq: int
    time: str
    data: dict[str, Any]


class InferenceService(Protocol):
    """What the transports need. `service.Service` is the real one, `tests/fakes/service.py` the fake."""

    def submit(self, request: InferenceRequest, done: Done) -> Ticket:
        """Admit a request; `done` is called exactly once, later, on the loop (never from inside this call).

        Raises ApplianceError, and never calls `done`, when the request is refused: NOT_FOUND (model, version),
        INVALID_ARGUMENT (does not fit the model), RESOURCE_EXHAUSTED (queue), UNAVAILABLE (loading, draining).
        """

    def cancel(self, ticket: Ticket) -> bool:
        """The caller is gone or lost interest. True if the request had not ended; `done` then gets CANCELLED."""

    def describe_server(self) -> ServerDescription:
        """Our name, release, boot id and the extensions that exist."""

    def live(self) -> bool:
        """The loop turns; answering is the proof."""

    def ready(self) -> bool:
        """Every model that should be served is READY, and we are not draining."""

    def model_ready(self, name: ModelName, version: Version = Version("")) -> bool:
        """NOT_FOUND for an unknown model or version, else whether it answers now."""

    def describe_model(self, name: ModelName, version: Version = Version("")) -> ModelDescription:
        """NOT_FOUND for an unknown one, UNAVAILABLE (with its reason) for one that is not READY."""

    def statistics(self, name: ModelName = ModelName(""), version: Version = Version("")) -> list[ModelStatistics]:
        """Of all versions loaded, of one model, or of one version; NOT_FOUND for an unknown one."""

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        """Every model folder and loaded version."""

    async def load(self, name: ModelName) -> None:
        """Read the model's folder anew and load what it aspires to; returns when READY.

        NOT_FOUND if there is no such folder; INVALID_ARGUMENT / UNAVAILABLE with a message that starts
        "failed to load 'NAME'" otherwise. The version that served before goes on serving until the new one is READY.
        """

    async def unload(self, name: ModelName) -> None:
        """Drain and unload all versions; returns when they are gone. NOT_FOUND for an unknown model."""

    def workers(self) -> list[WorkerDescription]:
        """The worker processes."""

    def snapshot(self) -> dict[str, Any]:
        """Everything a late subscriber needs, JSON-ready: {"seq": last event's, "boot": …, "models": […], "status": …}."""

    def subscribe(self, listener: EventListener) -> Callable[[], None]:
        """Call `listener` for every event from now on; the result ends the subscription."""
