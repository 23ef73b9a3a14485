"""Joules by device and model: what a counter counted, split into active, idle and unattributed parts that sum to it exactly.

Pure. Energy is counted in whole microjoules, so that sums are exact. Whoever reads the sensors gives cumulative counters and
each model's cumulative busy time; `EnergyMeter` makes windows of seconds of them, never of one request: NVML's power is an
average over up to a second, and its counter is updated in steps (arXiv 2312.02741).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

Source = Literal["nvml", "ina3221", "rapl", "estimate"]
UJ_PER_J = 1_000_000
J_PER_KWH = 3_600_000
MOST_W = 3_000.0
"""No GPU and no processor takes more: a counter that says so was reset, or read wrongly."""
HOST = "host"
BOARD: Source = "ina3221"
"""Counts the whole board."""


class Counter(msgspec.Struct, frozen=True):
    """What was counted so far. `wrap_uj`: where it starts over (RAPL's max_energy_range_uj), 0: never, or not known now.

    Readings of different epochs cannot be compared: what was used in between is not known.
    """

    counter_uj: int
    wrap_uj: int = 0
    epoch: int = 0


class EnergyReading(msgspec.Struct, frozen=True):
    """A device's counters by name; it used what all of them count. `within`: the device whose reading has this one in it.

    NVML counts millijoules since the driver was loaded (nvmlDeviceGetTotalEnergyConsumption); RAPL microjoules, package by
    package (Linux, Documentation/power/powercap). For INA3221 give the integral of power (`Integrator`).
    """

    counters: Mapping[str, Counter]
    source: Source
    estimated: bool = False
    within: str = ""

    def follows(self, before: EnergyReading) -> bool:
        """Whether the difference of the two means something: the same counters of the same source."""

        def kind(one: EnergyReading) -> tuple[object, ...]:
            return one.source, one.estimated, {name: counter.epoch for name, counter in one.counters.items()}

        return kind(self) == kind(before)


def container(device: str, host_source: str) -> str:
    """The device whose energy has that device's in it; "" if there is none.

    A Jetson's supply rail (INA3221) feeds the whole board, its GPU too; a processor's counter (RAPL) knows no GPU.
    """
    return HOST if device != HOST and host_source == BOARD else ""


class Usage(msgspec.Struct, frozen=True):
    """A model's cumulative seconds in the engine and items answered, on one device."""

    busy_s: float
    items: int


class ModelShare(msgspec.Struct, frozen=True):
    """One model's part of a window."""

    model: str
    active_uj: int
    busy_s: float
    items: int


class EnergyWindow(msgspec.Struct, frozen=True):
    """One device, one window: `idle_uj + unattributed_uj + sum(active_uj) == total_uj`, always."""

    device: str
    source: Source
    estimated: bool
    window_s: float
    total_uj: int
    idle_uj: int
    unattributed_uj: int
    models: tuple[ModelShare, ...]
    within: str = ""


def counter_delta(before: Counter, after: Counter, most_uj: float) -> int | None:
    """What was counted between two readings; None if that is not known: it would be more than `most_uj`.

    A smaller second reading is a wrap where the counter has one, else a reset (the driver was loaded anew): then what it shows
    now is all that is known, and a lower bound.
    """
    wrap_uj = after.wrap_uj or before.wrap_uj
    candidates = [after.counter_uj]
    if after.counter_uj >= before.counter_uj:
        candidates = [after.counter_uj - before.counter_uj]
    elif wrap_uj > before.counter_uj:
        candidates = [after.counter_uj + wrap_uj - before.counter_uj, after.counter_uj]
    return next((delta for delta in candidates if delta <= most_uj), None)


class Integrator:
    """Energy from samples of power by the trapezoid rule: (P0 + P1) / 2 * dt. For INA3221 rails, which have no counter.

    A gap longer than `max_gap_s` counts nothing, since what happened in it is not known, and begins an epoch.
    """

    def __init__(self, max_gap_s: float = 10.0) -> None:
        self.counter_uj = 0
        self.epoch = 0
        self._max_gap_s = max_gap_s
        self._last: tuple[float, float] | None = None
        self._rest = 0.0

    def add(self, monotonic: float, watts: float) -> int:
        """Take a sample; the counter so far. One that is not later than the last is ignored."""
        last = self._last
        if last is not None and monotonic <= last[0]:
            return self.counter_uj
        self._last = (monotonic, watts)
        if last is not None and monotonic - last[0] > self._max_gap_s:
            self.epoch += 1
        elif last is not None:
            self._rest += (last[1] + watts) / 2 * (monotonic - last[0]) * UJ_PER_J
            whole = max(0, int(self._rest))
            self.counter_uj += whole
            self._rest -= whole
        return self.counter_uj


def split(amount: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that sum to the amount: largest remainders get what rounding left over."""
    # as shares, so that neither tiny nor huge weights leave the range of a double
    largest = max(weights, default=0.0)
    if largest <= 0:
        return [0] * len(weights)
    scaled = [weight / largest for weight in weights]
    total = sum(scaled)
    exact = [amount * (weight / total) for weight in scaled]
    parts = [int(share) for share in exact]
    left = amount - sum(parts)
    order = sorted(range(len(weights)), key=lambda index: parts[index] - exact[index])
    for step in range(abs(left)):
        parts[order[step % len(order)]] += 1 if left > 0 else -1
    return parts


def attribute(
    total_uj: int, window_s: float, idle_w: float | None, usage: Mapping[str, Usage]
) -> tuple[int, int, tuple[ModelShare, ...]]:
    """(idle, unattributed, models) of a window's energy; the parts sum to `total_uj`.

    idle = P_idle * dt, at most the total; the rest is split by busy time. Without any busy time the rest is unattributed:
    somebody else used the device. While P_idle is not known yet, only the busy share of the window goes to the models.
    """
    busy = [max(0.0, use.busy_s) for use in usage.values()]
    idle_uj = 0 if idle_w is None else min(total_uj, int(idle_w * window_s * UJ_PER_J))
    rest = total_uj - idle_uj
    share = 1.0 if idle_w is not None else min(1.0, sum(busy) / window_s) if window_s > 0 else 0.0
    active = min(rest, int(rest * share)) if any(busy) else 0
    parts = split(active, busy)
    models = tuple(
        ModelShare(model, part, use.busy_s, use.items) for (model, use), part in zip(usage.items(), parts, strict=True)
    )
    return idle_uj, rest - sum(parts), models


class EnergyMeter:
    """Windows from counters. It owns no clock: `observe` is told the time, in monotonic seconds."""

    def __init__(self, *, idle_windows: int = 32) -> None:
        self._readings: dict[str, tuple[float, EnergyReading]] = {}
        self._usage: dict[str, dict[str, Usage]] = {}
        self._idle: dict[str, deque[float]] = {}
        self._idle_windows = idle_windows

    def idle_w(self, device: str) -> float | None:
        """The median power of the last windows in which no model ran; None before there was one."""
        seen = self._idle.get(device)
        return statistics.median(seen) if seen else None

    def observe(
        self, monotonic: float, device: str, reading: EnergyReading, usage: Mapping[str, Usage]
    ) -> EnergyWindow | None:
        """The window since the last reading of that device; None for the first one, and for one that is not later.

        None, too, for one that does not follow from the last (another source, a counter that came or went, or that says what
        cannot be): then nothing is booked.

        `usage`: by model, cumulative. One that began anew (a worker was replaced) counts from zero.
        """
        before = self._readings.get(device)
        if before is not None and monotonic <= before[0]:
            return None
        earlier = self._usage.get(device, {})
        self._readings[device] = (monotonic, reading)
        self._usage[device] = dict(usage)
        if before is None or not reading.follows(before[1]):
            return None
        window_s = monotonic - before[0]
        most_uj = MOST_W * window_s * UJ_PER_J
        deltas = [
            counter_delta(before[1].counters[name], counter, most_uj) for name, counter in reading.counters.items()
        ]
        known = [delta for delta in deltas if delta is not None]
        if len(known) < len(deltas):
            return None
        total_uj = sum(known)
        used = {model: _since(earlier.get(model), now) for model, now in usage.items()}
        if not any(use.busy_s > 0 for use in used.values()):
            self._idle.setdefault(device, deque(maxlen=self._idle_windows)).append(total_uj / UJ_PER_J / window_s)
        idle_uj, unattributed_uj, models = attribute(total_uj, window_s, self.idle_w(device), used)
        shown = tuple(share for share in models if share.busy_s > 0 or share.items > 0)
        return EnergyWindow(
            *(device, reading.source, reading.estimated, window_s, total_uj, idle_uj, unattributed_uj, shown),
            within=reading.within,
        )


def _since(before: Usage | None, now: Usage) -> Usage:
    if before is None or now.busy_s < before.busy_s or now.items < before.items:
        return now
    return Usage(now.busy_s - before.busy_s, now.items - before.items)


class EnergySum(msgspec.Struct, frozen=True):
    """Energy of one kind: `kind` is total, idle, unattributed or model (then `model` names it).

    `within`: the device whose energy has this in it already; what the box took is the sum without such.
    """

    device: str
    source: str
    estimated: bool
    kind: str
    model: str
    uj: int
    busy_s: float
    items: int
    within: str = ""


def contained(sums: Sequence[EnergySum]) -> list[EnergySum]:
    """The sums, each with the device that it is within."""
    on_board = any(one.device == HOST and one.source == BOARD for one in sums)
    return [msgspec.structs.replace(one, within=container(one.device, BOARD if on_board else "")) for one in sums]


def box_total(sums: Sequence[EnergySum]) -> int:
    """What the box took, in microjoules: what is within something else counts once."""
    return sum(one.uj for one in sums if one.kind == "total" and not one.within)


def price_list(sums: Sequence[EnergySum], price_per_kwh: float, gco2_per_kwh: float) -> list[dict[str, object]]:
    """Each sum with kWh = J / 3.6e6, its cost, its CO2 in grams, and joules per 1,000 inferences = 1000 * J / items."""
    return [
        {
            "device": one.device,
            "within": one.within,
            "source": one.source,
            "estimated": one.estimated,
            "kind": one.kind,
            "model": one.model,
            "joules": one.uj / UJ_PER_J,
            "kwh": one.uj / UJ_PER_J / J_PER_KWH,
            "cost": one.uj / UJ_PER_J / J_PER_KWH * price_per_kwh,
            "gco2": one.uj / UJ_PER_J / J_PER_KWH * gco2_per_kwh,
            "items": one.items,
            "joules_per_1000": one.uj / UJ_PER_J / one.items * 1000 if one.items else None,
        }
        for one in sums
    ]
