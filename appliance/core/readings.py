"""A reading: a number that a sensor gave and that can be true, or the reason why there is none. And the shape of one sample.

Pure values; it knows no sensor and no clock. Sensors make them, and the governor, the recorder, metrics and the page read them.
A failing, hanging or lying sensor is a value here, never an exception: whoever reads must look at `value`.
"""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from appliance.core.quantities import Quantity

NOT_AVAILABLE = frozenset({0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF})
"""All bits set: how drivers say "not available" in an unsigned field."""


class Reading(msgspec.Struct, frozen=True):
    """`value` in `unit`, or None with `reason`. `at_s`: monotonic seconds of the attempt; slow readings are repeated with it."""

    value: float | None
    unit: str
    at_s: float
    reason: str = ""


def measured(quantity: Quantity, raw: object, at_s: float, *, scale: float = 1.0) -> Reading:
    """What a sensor said times `scale`, if it can be true for that quantity. Takes any object and never raises."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return missing(quantity, f"the sensor gave {type(raw).__name__} instead of a number", at_s)
    if raw in NOT_AVAILABLE:
        return missing(quantity, f"the sensor gave {raw:#x}, which means not available", at_s)
    try:
        value = float(raw) if scale == 1.0 else raw * scale
    except OverflowError:
        value = math.inf
    if not quantity.low <= value <= quantity.high:  # false for NaN, too
        limits = f"{quantity.low:g} to {quantity.high:g} {quantity.unit}".rstrip()
        return missing(quantity, f"{value:g} {quantity.unit} is not believed: outside {limits}", at_s)
    return Reading(value, quantity.unit, at_s)


def missing(quantity: Quantity, reason: str, at_s: float) -> Reading:
    """No value, and why."""
    return Reading(None, quantity.unit, at_s, reason)


class GpuState(StrEnum):
    """Whether a GPU can be used. LOST and RESET_REQUIRED last until somebody does what `action` says."""

    OK = "OK"
    SILENT = "SILENT"
    RESET_REQUIRED = "RESET_REQUIRED"
    LOST = "LOST"
    ABSENT = "ABSENT"


class GpuProcess(msgspec.Struct, frozen=True):
    """A process on a GPU. `memory_bytes` None: the driver does not say. The instances are None without MIG."""

    pid: int
    memory_bytes: int | None
    gpu_instance: int | None = None
    compute_instance: int | None = None


class MigInstance(msgspec.Struct, frozen=True):
    """One slice of a GPU in MIG mode; its memory in bytes, None where the driver does not say."""

    index: int
    uuid: str
    total_bytes: int | None
    used_bytes: int | None
    processes: tuple[GpuProcess, ...] = ()


class Gpu(msgspec.Struct, frozen=True):
    """One GPU at one moment, beside its readings `gpu.<index>.…`.

    `integrated`: it shares the host's memory, so `gpu.<index>.memory.*` repeats the host's. `throttle`: the reasons, by NVML's
    names, that slow its clocks now. `reason` and `action` are empty while the state is OK. `mig_mode`: whether it is cut into
    instances (None: it cannot be, or does not say); `mig` are those instances.
    """

    index: int
    uuid: str
    name: str
    integrated: bool = False
    state: GpuState = GpuState.OK
    reason: str = ""
    action: str = ""
    throttle: tuple[str, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    mig: tuple[MigInstance, ...] = ()
    mig_mode: bool | None = None


class Severity(StrEnum):
    """How bad a finding is: a critical one keeps the box, or a GPU, from its work."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class Finding(msgspec.Struct, frozen=True):
    """Something an operator must know: a stable `code`, the `subject` ("gpu.0", "host"), what is so, and what to do."""

    code: str
    severity: Severity
    subject: str
    message: str
    action: str


class Part(msgspec.Struct, frozen=True):
    """What one sampler contributes to a snapshot."""

    readings: dict[str, Reading]
    gpus: tuple[Gpu, ...] = ()
    findings: tuple[Finding, ...] = ()


class Snapshot(msgspec.Struct, frozen=True):
    """All readings of one moment, by dotted name; read-only by agreement.

    `monotonic_s` orders, `wall_s` (seconds since the epoch) is for people. `duration_s`: how long sampling took. `silent_s`: by
    the sampler's name, for how long it has owed an answer beyond its deadline; 0 while it answers.
    """

    number: int
    monotonic_s: float
    wall_s: float
    duration_s: float
    readings: dict[str, Reading]
    gpus: tuple[Gpu, ...] = ()
    findings: tuple[Finding, ...] = ()
    silent_s: dict[str, float] = {}

    def value(self, name: str) -> float | None:
        """The value of that reading; None if it is missing or not known here."""
        reading = self.readings.get(name)
        return None if reading is None else reading.value

    def reason(self, name: str) -> str:
        """Why `value` is None; empty if it is not."""
        reading = self.readings.get(name)
        return "nothing reads this here" if reading is None else reading.reason
