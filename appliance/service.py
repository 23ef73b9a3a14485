"""The use cases, transport-neutral: infer, describe, ready, index, load, unload, statistics, snapshot.

Transports call this and nothing below it. It knows no HTTP status and no frame; it raises `ApplianceError` or gives values from
`core`. Everything here runs on the one event loop that owns all mutable state.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import msgspec
import psutil

from appliance import __version__
from appliance.core.batcher import Entry
from appliance.core.description import (
    IndexEntry,
    ModelDescription,
    ModelStatistics,
    ServerDescription,
    VerificationRecord,
    WorkerDescription,
)
from appliance.core.energy import EnergySum
from appliance.core.errors import ApplianceError, ErrorCode, unavailable
from appliance.core.request import InferenceRequest, InferenceResponse, ModelName, Version
from appliance.core.states import ModelState, public_state
from appliance.core.watchdog import Pulse
from appliance.health import Health
from appliance.lifecycle.manager import Manager
from appliance.lifecycle.model_version import ModelVersion
from appliance.observability.events import Event, EventBus, EventListener
from appliance.observability.requests import RequestLog
from appliance.scheduling.governor import Governor
from appliance.scheduling.scheduler import Job

__all__ = ["Done", "Event", "EventListener", "InferenceService", "Outcome", "Records", "Service", "Ticket"]

Outcome: TypeAlias = InferenceResponse | ApplianceError
Done: TypeAlias = Callable[[Outcome], None]


class Ticket(Protocol):
    """An admitted request, to be given back to `cancel`."""


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

    async def verification(self, name: ModelName, version: Version = Version("")) -> VerificationRecord:
        """What the gate found of what serves, or of an engine that was built and must not; NOT_FOUND in words: nothing kept."""

    async def unload(self, name: ModelName) -> None:
        """Drain and unload all versions; returns when they are gone. NOT_FOUND for an unknown model."""

    def governor(self) -> dict[str, Any]:
        """The governor's part of the status document. UNAVAILABLE if it is off."""

    def hold_governor(self, level: str, seconds: float, reason: str) -> dict[str, Any]:
        """An operator wants at least that level for so long; as `governor`. INVALID_ARGUMENT for what is not a hold."""

    def release_governor(self) -> dict[str, Any]:
        """End an operator's hold, if there is one; as `governor`."""

    def workers(self) -> list[WorkerDescription]:
        """The worker processes."""

    def snapshot(self) -> dict[str, Any]:
        """Everything a late subscriber needs, JSON-ready: {"seq": last event's, "boot": …, "models": […], "status": …}."""

    def subscribe(self, listener: EventListener) -> Callable[[], None]:
        """Call `listener` for every event from now on; the result ends the subscription."""


class Records(Protocol):
    """What was recorded, for the transports. Calls belong in a thread; UNAVAILABLE if it cannot be read."""

    def events(
        self, *, since: float = ..., until: float = ..., kind: str = ..., limit: int = ..., after_id: int = ...
    ) -> list[dict[str, Any]]:
        """The newest events of that time (seconds since 1970), oldest first."""

    def series(self) -> list[str]:
        """The names of all readings."""

    def history(
        self, names: Sequence[str], *, since: float, until: float = ..., step_s: float = ..., points: int = ...
    ) -> dict[str, Any]:
        """Columns of minimum, mean and maximum by name."""

    def energy(self, *, since: float = ..., until: float = ...) -> list[EnergySum]:
        """Energy by device and model."""

    def audit(self, *, limit: int = ...) -> dict[str, Any]:
        """The chain's verdict and its newest entries."""


EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""Triton's names of the protocol extensions that work here."""

DRAIN_RETRY_S = 2.0
"""What a client is told to wait while we shut down: about what a restart takes."""

RATE_WINDOW_S = 10

RECENT_TICKS = 30
"""Ticks, of a second each, after which a new window of recent times begins: percentiles are those of the last 30 to 60 s."""


class Service:
    """The real one: admission by state, everything else by the manager and its versions."""

    def __init__(
        self, manager: Manager, events: EventBus, governor: Governor | None = None, health: Health | None = None
    ) -> None:
        self._governor = governor
        self._health = health
        self.draining = False
        self.recorder: Callable[[], Mapping[str, Any]] | None = None
        self.endpoints: Mapping[str, Sequence[str]] = {}
        self._manager = manager
        self._events = events
        self._boot_id = uuid.uuid4().hex
        self._started = time.monotonic()
        self._log = RequestLog("request.refused")
        self._refused: Counter[tuple[str, str]] = Counter()
        self._refused_before: Counter[tuple[str, str]] = Counter()
        self._totals: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW_S + 1)
        self._ticks = 0

    def submit(self, request: InferenceRequest, done: Done) -> Ticket:
        """See `InferenceService.submit`."""
        try:
            if self.draining:
                raise unavailable("the appliance is shutting down; try again in a moment", retry_after_s=DRAIN_RETRY_S)
            version = self._manager.resolve(request.model, request.version)
            scheduler = version.scheduler
            if scheduler is None:
                raise version.not_ready()
            return cast("Ticket", scheduler.submit(request, done, time.monotonic()))
        except ApplianceError as error:
            # a name that does not exist here is a client's invention, and must not become a key of ours
            model = request.model if error.code is not ErrorCode.NOT_FOUND else ModelName("")
            self._refused[model, str(error.code)] += 1
            self._log.add(error, model=request.model, request_id=request.id, key=model)
            raise

    def cancel(self, ticket: Ticket) -> bool:
        """See `InferenceService.cancel`."""
        entry = cast("Entry", ticket)
        job: Job = entry.payload
        return job.scheduler.cancel(entry)

    def describe_server(self) -> ServerDescription:
        """See `InferenceService.describe_server`."""
        return ServerDescription("appliance", __version__, EXTENSIONS, self._boot_id)

    def live(self) -> bool:
        """See `InferenceService.live`."""
        return True

    def ready(self) -> bool:
        """See `InferenceService.ready`."""
        return not self.draining and self._manager.ready

    def model_ready(self, name: ModelName, version: Version = Version("")) -> bool:
        """See `InferenceService.model_ready`."""
        if not self._manager.known(name, version):
            self._manager.resolve(name, version)  # raises NOT_FOUND, in its own words
        try:
            return self._manager.resolve(name, version).answering and not self.draining
        except ApplianceError:
            return False

    def describe_model(self, name: ModelName, version: Version = Version("")) -> ModelDescription:
        """See `InferenceService.describe_model`."""
        return self._manager.resolve(name, version).describe(self._manager.versions(name))

    def statistics(self, name: ModelName = ModelName(""), version: Version = Version("")) -> list[ModelStatistics]:
        """See `InferenceService.statistics`."""
        if name and not self._manager.known(name, version):
            self._manager.resolve(name, version)  # raises NOT_FOUND, in its own words
        found = []
        for generation in self._served():
            if name in ("", generation.name) and version in ("", generation.version):
                scheduler = generation.scheduler
                generation.statistics.pending = scheduler.pending if scheduler is not None else 0
                generation.statistics.pending_bytes = scheduler.pending_bytes if scheduler is not None else 0
                found.append(generation.statistics)
        return found

    def _served(self) -> list[ModelVersion]:
        return [
            generation
            for generation in self._manager.generations()
            if generation.state in (ModelState.READY, ModelState.DRAINING)
        ]

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        """See `InferenceService.index`."""
        return self._manager.index(ready_only=ready_only)

    async def verification(self, name: ModelName, version: Version = Version("")) -> VerificationRecord:
        """See `InferenceService.verification`."""
        return await self._manager.verification(name, version)

    async def load(self, name: ModelName) -> None:
        """See `InferenceService.load`."""
        self._refuse_while_draining()
        self._events.publish("operator.load", model=name)
        await self._manager.load(name)

    async def unload(self, name: ModelName) -> None:
        """See `InferenceService.unload`."""
        self._refuse_while_draining()
        self._events.publish("operator.unload", model=name)
        await self._manager.unload(name)

    def governor(self) -> dict[str, Any]:
        """See `InferenceService.governor`."""
        return self._governing().snapshot()

    def hold_governor(self, level: str, seconds: float, reason: str) -> dict[str, Any]:
        """See `InferenceService.hold_governor`."""
        governor = self._governing()
        governor.hold(level, seconds, reason)
        self._events.publish("operator.governor.hold", level=level.upper(), seconds=seconds, reason=reason)
        return governor.snapshot()

    def release_governor(self) -> dict[str, Any]:
        """See `InferenceService.release_governor`."""
        governor = self._governing()
        if governor.release():
            self._events.publish("operator.governor.release")
        return governor.snapshot()

    def _governing(self) -> Governor:
        if self._governor is None:
            raise unavailable("the governor is off; [governor] enabled = true switches it on", retry_after_s=60.0)
        return self._governor

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise unavailable("the appliance is shutting down; nothing is loaded or unloaded any more")

    def workers(self) -> list[WorkerDescription]:
        """See `InferenceService.workers`."""
        described = []
        for generation in self._manager.generations():
            for worker in generation.workers():
                try:
                    rss = psutil.Process(worker.pid).memory_info().rss
                except psutil.Error:
                    rss = 0  # it ended between the two lines
                described.append(msgspec.structs.replace(worker, rss_bytes=rss))
        return described

    def refusals(self) -> Mapping[tuple[str, str], int]:
        """Requests refused since the start, by model ("" if there is no such model) and error code."""
        return self._refused

    def pulses(self) -> list[Pulse]:
        """What the required models that are READY have done until now, for the watchdog."""
        found = []
        for generation in self._manager.generations():
            scheduler = generation.scheduler
            if (
                generation.name in self._manager.required
                and generation.state is ModelState.READY
                and scheduler is not None
            ):
                worker, statistics = generation.manifest.worker, generation.statistics
                found.append(
                    Pulse(
                        f"{generation.name}:{generation.version}",
                        workers=len(scheduler.instances),
                        waiting=scheduler.pending,
                        ended=statistics.success.count + statistics.fail.count,
                        patience_s=(worker.load_budget_ms + 2 * worker.run_budget_ms) / 1000,
                    )
                )
        return found

    def tick(self, now: float) -> None:
        """Once a second: remember the totals, for the request rate, and tell what was refused meanwhile, by model and code."""
        self._totals.append((now, self._total()))
        self._ticks += 1
        if self._ticks % RECENT_TICKS == 0:
            for generation in self._manager.generations():
                generation.statistics.recent_times.turn()
        if self._governor is not None:
            self._governor.tick(now)
        for (model, code), count in (self._refused - self._refused_before).items():
            self._events.publish("requests.refused", model=model, code=code, count=count)
        self._refused_before = self._refused.copy()

    def _total(self) -> int:
        return sum(
            generation.statistics.success.count + generation.statistics.fail.count
            for generation in self._manager.generations()
        )

    @property
    def requests_per_s(self) -> float:
        """Answered requests a second, over the last ten seconds."""
        if len(self._totals) < 2:
            return 0.0
        (begun, first), (ended, last) = self._totals[0], self._totals[-1]
        return max(0.0, (last - first) / (ended - begun)) if ended > begun else 0.0

    def status_line(self) -> str:
        """One line for humans: "3 models ready, 1 failed, 61 °C, 41 req/s"; the temperature where it is known."""
        states = [generation.state for generation in self._manager.generations()]
        ready = states.count(ModelState.READY)
        failed = states.count(ModelState.FAILED) + len(self._manager.unservable())
        parts = ["draining" if self.draining else f"{ready} model{'s' if ready != 1 else ''} ready"]
        if failed:
            parts.append(f"{failed} failed")
        hottest = self._health.hottest() if self._health is not None else None
        if hottest is not None:
            parts.append(f"{hottest:.0f} °C")
        return ", ".join([*parts, f"{self.requests_per_s:.0f} req/s"])

    def figures(self) -> dict[str, float]:
        """What is recorded each second of the serving: requests a second, the slowest model's p99 in µs, the governor's level."""
        found = {"requests.rate": self.requests_per_s}
        slowest = max((version.statistics.recent_times.percentile(0.99) for version in self._served()), default=0)
        if slowest:
            found["requests.p99"] = float(slowest)
        if self._governor is not None:
            found["governor.level"] = float(self._governor.gates.level)
        return found

    def snapshot(self) -> dict[str, Any]:
        """See `InferenceService.snapshot`."""
        return {
            "seq": self._events.seq,
            "boot": self._boot_id,
            "models": [
                *(_model_document(generation) for generation in self._manager.generations()),
                *(_unservable_document(*entry) for entry in self._manager.unservable()),
            ],
            "status": {
                "name": "appliance",
                "version": __version__,
                "line": self.status_line(),
                "ready": self.ready(),
                "draining": self.draining,
                "uptime_s": round(time.monotonic() - self._started, 1),
                "requests_per_s": round(self.requests_per_s, 1),
                "events": dict(self._events.counts),
            },
            "repository": self._manager.repository,
            "endpoints": self.endpoints,
            **({"governor": self._governor.snapshot()} if self._governor is not None else {}),
            **({"memory": self._manager.memory.budget.document()} if self._manager.memory is not None else {}),
            **({"recorder": self.recorder()} if self.recorder is not None else {}),
            **(self._health.document() if self._health is not None else {}),
        }

    def subscribe(self, listener: EventListener) -> Callable[[], None]:
        """See `InferenceService.subscribe`."""
        return self._events.subscribe(listener)


def _model_document(generation: ModelVersion) -> dict[str, Any]:
    """One version in the status document: its state, its counters, and its times of the last minute in microseconds."""
    return {
        "name": generation.name,
        "version": generation.version,
        "state": public_state(generation.state),
        "detail": str(generation.state),
        "reason": generation.reason,
        "restarts": generation.restarts,
        "answering": generation.answering,
        "instances": generation.manifest.worker.instances,
        "workers": len(generation.scheduler.instances) if generation.scheduler is not None else 0,
        "pending": generation.scheduler.pending if generation.scheduler is not None else 0,
        "provider": generation.provider,
        "engine": generation.artifact.label if generation.artifact is not None else "",
        "verification": generation.artifact.summary if generation.artifact is not None else "",
        **_document_of(generation.statistics),
    }


def _unservable_document(name: ModelName, version: Version, reason: str) -> dict[str, Any]:
    """The same for what is so wrong on disk that it never became a version with a life: FAILED, and nothing was ever counted."""
    return {
        "name": name,
        "version": version,
        "state": public_state(ModelState.FAILED),
        "detail": str(ModelState.FAILED),
        "reason": reason,
        "restarts": 0,
        "answering": False,
        "instances": 0,
        "workers": 0,
        "pending": 0,
        "provider": "",
        "engine": "",
        "verification": "",
        **_document_of(ModelStatistics(name, version)),
    }


def _document_of(statistics: ModelStatistics) -> dict[str, Any]:
    recent = statistics.recent_times
    return {
        "inference_count": statistics.inference_count,
        "execution_count": statistics.execution_count,
        "success": statistics.success.count,
        "fail": statistics.fail.count,
        "failures": dict(statistics.failures),
        "p50_us": recent.percentile(0.50),
        "p95_us": recent.percentile(0.95),
        "p99_us": recent.percentile(0.99),
        "queue_ns": statistics.queue.ns,
        "compute_ns": statistics.compute_infer.ns,
        "batches": {str(size): batch.compute_infer.count for size, batch in sorted(statistics.batches.items())},
    }


def _conforms(service: Service) -> InferenceService:
    """Held by the type checker: the real service is what transports expect."""
    return service
