"""A source in which everything exists that can: the names that it renders are all the names there are."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import msgspec

from appliance.core import quantities as q
from appliance.core.description import BatchStatistic, DurationStatistic, ModelStatistics, WorkerDescription
from appliance.core.readings import (
    Finding,
    Gpu,
    GpuState,
    MigInstance,
    Reading,
    Severity,
    Snapshot,
    measured,
    missing,
)
from appliance.core.request import ModelName, Version
from appliance.core.states import ModelState
from appliance.observability.energy_totals import EnergyTotals
from appliance.observability.metrics import Metrics
from appliance.observability.metrics_house import ZMQ

NOW_S = 1000.0
UUID = "GPU-340cec52-80ba-c0df-8511-5f9680aae0ed"


class Level(IntEnum):
    NOMINAL = 0
    WARM = 1
    HOT = 2
    CRITICAL = 3


class Gates(msgspec.Struct, frozen=True):
    level: Level = Level.HOT
    max_priority: int = 9
    builds: bool = False
    concurrency: float = 0.5
    batch_growth: float = 1.0


class Device(msgspec.Struct, frozen=True):
    device: str
    level: Level
    headroom_c: float | None


class Judged(msgspec.Struct, frozen=True):
    gates: Gates = Gates()
    devices: tuple[Device, ...] = (Device("gpu:0", Level.HOT, 5.5), Device("host", Level.NOMINAL, None))


class Recorded(msgspec.Struct, frozen=True):
    problem: str = ""
    committed: int = 86_400
    dropped: int = 2
    pruned: int = 1
    series_refused: int = 0
    set_aside: int = 0
    bytes: int = 1 << 20
    committed_at_s: float | None = NOW_S - 0.75


class Share(msgspec.Struct, frozen=True):
    model: str
    active_uj: int


class Window(msgspec.Struct, frozen=True):
    device: str = "gpu:0"
    source: str = "nvml"
    estimated: bool = False
    idle_uj: int = 20_000_000
    unattributed_uj: int = 1_500_000
    models: tuple[Share, ...] = (Share("digits:3", 30_000_000), Share("defects:1", 250_000))
    within: str = ""


class Source:
    def __init__(self) -> None:
        self.model = ModelStatistics(ModelName("digits"), Version("3"), inference_count=100, execution_count=40)
        self.model.success.add(1_000_000, 7)
        self.model.request_times.add(900)
        self.model.batches[4] = BatchStatistic(4, *(DurationStatistic(10, 1_000) for _ in range(3)))

    def statistics(self) -> list[ModelStatistics]:
        return [self.model]

    def workers(self) -> list[WorkerDescription]:
        return [
            WorkerDescription(
                *("digits", "3", 0, 100, "READY", "CPU", 1, 123_456, 50, 8), arena_bytes=8192, slots=2, slots_in_use=1
            )
        ]

    def refusals(self) -> dict[tuple[str, str], int]:
        return {("digits", "RESOURCE_EXHAUSTED"): 3}

    def snapshot(self) -> dict[str, Any]:
        model = {"name": "digits", "version": "3", "detail": "READY", "workers": 1, "instances": 2, "restarts": 1}
        return {"models": [model], "status": {"uptime_s": 12.5, "ready": True, "events": {"model.state": 3}}}


class Http:
    def __init__(self) -> None:
        self.statuses = {200: 10}
        self.refusals = {"body_too_large": 1}
        self.bytes_in_flight = 4096
        self.connections = 2


def labels_of(quantity: q.Quantity) -> tuple[str, ...]:
    return tuple("0" for _ in range(quantity.template.count("{")))


def readings() -> Snapshot:
    """One reading of every quantity, the middle of what is believed, and one that has no value."""
    found: dict[str, Reading] = {}
    for quantity in q.QUANTITIES.values():
        value = round(min(quantity.high, 1000.0) * 0.5 + max(quantity.low, 0.0) * 0.5, 3)
        found[quantity.name(*labels_of(quantity))] = measured(quantity, value, NOW_S)
    found[q.GPU_FAN.name(0, 7)] = missing(q.GPU_FAN, "not supported", NOW_S)
    gpu = Gpu(
        0, UUID, "NVIDIA L4", throttle=("SwPowerCap",), mig=(MigInstance(1, "MIG-1", 1 << 30, 1 << 20),), mig_mode=True
    )
    finding = Finding("driver-drift", Severity.WARNING, "driver", "reboot pending", "Reboot at the next chance.")
    return Snapshot(1, NOW_S - 0.5, 1.7e9, 0.02, found, (gpu,), (finding,), {"nvml": 0.0})


def lost_gpu() -> Snapshot:
    """A GPU that is gone: nothing is known but that."""
    gpu = Gpu(0, UUID, "NVIDIA L4", state=GpuState.LOST, reason="fell off the bus", action="Reboot the box.")
    return Snapshot(1, NOW_S, 1.7e9, 0.02, {q.GPU_POWER.name(0): missing(q.GPU_POWER, "lost", NOW_S)}, (gpu,))


def document(state: ModelState, *, version: str = "3", workers: int = 1, restarts: int = 0) -> dict[str, Any]:
    """One version in the status document."""
    return {
        "name": "digits",
        "version": version,
        "detail": str(state),
        "workers": workers,
        "instances": 1,
        "restarts": restarts,
    }


def metrics(snapshot: Snapshot | None = None) -> Metrics:
    """Everything connected."""
    made = Metrics(Source(), clock=lambda: NOW_S)
    made.http = Http()
    made.zmq = lambda: dict.fromkeys(ZMQ, 5)
    taken = snapshot if snapshot is not None else readings()
    made.readings = lambda: taken
    made.governor = Judged
    made.hold_s = lambda: 90.0
    made.recorder = Recorded
    made.xids = {(0, 31): 1}
    energy = made.energy = EnergyTotals()
    energy.add(Window())
    return made
