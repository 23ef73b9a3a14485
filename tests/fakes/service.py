"""A service without workers: echoes, delays or fails on command, so that a transport can be tested alone.

It serves one model, `echo` version `1`: every input comes back as an output of the same name. Completion happens on the next turn
of the loop, or when the test calls `release()` after `hold()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from appliance.core.description import (
    IndexEntry,
    ModelDescription,
    ModelStatistics,
    ServerDescription,
    VerificationRecord,
    WorkerDescription,
)
from appliance.core.errors import ApplianceError, ErrorCode, not_found, unavailable
from appliance.core.hold import Hold, make_hold
from appliance.core.request import InferenceRequest, InferenceResponse, ModelName, Timing, Version
from appliance.core.tensor import DataType, TensorSpec


class FakeEvent(msgspec.Struct):
    topic: str
    seq: int
    time: str
    data: dict[str, Any]


class FakeTicket:
    def __init__(self, request: InferenceRequest, done: Callable[[Any], None]) -> None:
        self.request = request
        self.done = done
        self.ended = False


class FakeService:
    def __init__(self) -> None:
        self.requests: list[InferenceRequest] = []
        self.waiting: list[FakeTicket] = []
        self.cancelled: list[InferenceRequest] = []
        self.refusal: ApplianceError | None = None
        self.failure: ApplianceError | None = None
        self.holding = False
        self.draining = False
        self.loaded = True
        self.held: Hold | None = None
        self.report: bytes | None = None
        self.listeners: list[Callable[[Any], None]] = []
        self.seq = 0

    def hold(self) -> None:
        self.holding = True

    def release(self) -> None:
        self.holding = False
        waiting, self.waiting = self.waiting, []
        for ticket in waiting:
            self._finish(ticket)

    def submit(self, request: InferenceRequest, done: Callable[[Any], None]) -> FakeTicket:
        if self.refusal is not None:
            raise self.refusal
        if self.draining:
            raise unavailable("the appliance is shutting down; try again later")
        self._known(request.model, request.version)
        self.requests.append(request)
        ticket = FakeTicket(request, done)
        if self.holding:
            self.waiting.append(ticket)
        else:
            asyncio.get_running_loop().call_soon(self._finish, ticket)
        return ticket

    def _finish(self, ticket: FakeTicket) -> None:
        if ticket.ended:
            return
        ticket.ended = True
        if self.failure is not None:
            ticket.done(self.failure)
            return
        request = ticket.request
        ticket.done(
            InferenceResponse(
                request.model, Version("1"), request.id, request.inputs, Timing(queue_us=12, compute_us=310)
            )
        )

    def cancel(self, ticket: FakeTicket) -> bool:
        if ticket.ended:
            return False
        ticket.ended = True
        self.cancelled.append(ticket.request)
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        ticket.done(ApplianceError(ErrorCode.CANCELLED, "cancelled"))
        return True

    def _known(self, name: str, version: str) -> None:
        if name != "echo":
            raise not_found(f"Request for unknown model: '{name}' is not found")
        if version not in ("", "1"):
            raise not_found(f"Request for unknown model: '{name}' version {version} is not found")
        if not self.loaded:
            raise unavailable(f"model '{name}' is not ready: UNAVAILABLE (unloaded)")

    def describe_server(self) -> ServerDescription:
        return ServerDescription("appliance", "0.1.0", ("binary_tensor_data",), "boot-1")

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.loaded and not self.draining

    def model_ready(self, name: ModelName, version: Version = Version("")) -> bool:
        try:
            self._known(name, version)
        except ApplianceError as error:
            if error.code is ErrorCode.UNAVAILABLE:
                return False
            raise
        return True

    def describe_model(self, name: ModelName, version: Version = Version("")) -> ModelDescription:
        self._known(name, version)
        spec = TensorSpec("x", DataType.FP32, (-1, 4))
        return ModelDescription(
            name=name,
            version=Version("1"),
            versions=(Version("1"),),
            platform="loopback",
            backend="loopback",
            inputs=(spec,),
            outputs=(spec,),
            max_batch_size=8,
            max_queue_delay_us=0,
            instances=1,
            device="cpu",
            provider="loopback",
            labels=("a", "b", "c", "d"),
        )

    async def verification(self, name: ModelName, version: Version = Version("")) -> VerificationRecord:
        self._known(name, version)
        if self.report is None:
            raise not_found(f"model '{name}' version 1 serves as it is: there is no verification")
        return VerificationRecord(name, Version("1"), "int8", "k" * 32, True, msgspec.Raw(self.report))

    def statistics(self, name: ModelName = ModelName(""), version: Version = Version("")) -> list[ModelStatistics]:
        if name:
            self._known(name, version)
        return [ModelStatistics(ModelName("echo"), Version("1"))]

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        state = "READY" if self.loaded else "UNAVAILABLE"
        if ready_only and not self.loaded:
            return []
        return [IndexEntry(ModelName("echo"), "1", state, "" if self.loaded else "unloaded")]

    async def load(self, name: ModelName) -> None:
        if name != "echo":
            raise not_found(f"failed to load '{name}': no such model folder")
        self.loaded = True

    async def unload(self, name: ModelName) -> None:
        if name != "echo":
            raise not_found(f"Request for unknown model: '{name}' is not found")
        self.loaded = False

    def governor(self) -> dict[str, Any]:
        return {"level": "NOMINAL" if self.held is None else self.held.level.name}

    def hold_governor(self, level: str, seconds: float, reason: str) -> dict[str, Any]:
        self.held = make_hold(level, seconds, reason, 0.0)
        return self.governor()

    def release_governor(self) -> dict[str, Any]:
        self.held = None
        return self.governor()

    def workers(self) -> list[WorkerDescription]:
        return []

    def refusals(self) -> dict[tuple[str, str], int]:
        return {}

    def snapshot(self) -> dict[str, Any]:
        return {"seq": self.seq, "boot": "boot-1", "models": [], "status": {}}

    def subscribe(self, listener: Callable[[Any], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def publish(self, topic: str, data: dict[str, Any]) -> None:
        self.seq += 1
        event = FakeEvent(topic, self.seq, datetime.now(UTC).isoformat(), data)
        for listener in list(self.listeners):
            listener(event)
