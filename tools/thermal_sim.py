#!/usr/bin/env python3
"""A GPU in a hot cabinet, simulated: what heat does to latency, with the governor and without it.

The plant is one thermal resistance and one capacity, C dT/dt = P - (T - T_ambient)/R (the lumped-capacitance model of any heat
transfer text book). At its slowdown temperature the GPU halves its clock, as the hardware does, until it is cooler.
Requests of three priorities go through the real batcher, with the real governor's gates, in simulated time: nothing sleeps.

Prints a table (`--json` for machines) and writes a picture (`--svg FILE`).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
from pathlib import Path

import msgspec

from appliance.core.batcher import Batcher, BatcherLimits, Dispatch, Entry, Expire
from appliance.core.errors import ApplianceError
from appliance.core.thermal import OPEN, DeviceSample, Level, ThermalCore, ThermalPolicy, ThermalSample, Throttle

PRIORITIES = {1: "high", 8: "normal", 12: "low"}


class Plant(msgspec.Struct, kw_only=True):
    """A GPU of 30 W idle and 150 W at full load and clock; its settled temperature is ambient + R * power."""

    ambient_c: float = 45.0
    resistance_c_per_w: float = 0.4
    capacity_j_per_c: float = 250.0
    idle_w: float = 30.0
    full_w: float = 150.0
    slowdown_c: float = 88.0
    release_c: float = 84.0
    slowed_clock: float = 0.5
    temperature_c: float = 55.0
    clock: float = 1.0
    power_w: float = 30.0

    def step(self, seconds: float, busy: float) -> None:
        """Go on by `seconds`, of which the share `busy` was work. Dynamic power falls with about the clock's cube (P ~ f V^2)."""
        self.power_w = self.idle_w + (self.full_w - self.idle_w) * busy * self.clock**3
        settled = self.ambient_c + self.resistance_c_per_w * self.power_w
        decay = math.exp(-seconds / (self.resistance_c_per_w * self.capacity_j_per_c))
        self.temperature_c = settled + (self.temperature_c - settled) * decay

    def throttle(self) -> None:
        """Once a second. NVML's HW slowdown: "reducing the core clocks by a factor of 2 or more" until it is cooler again."""
        if self.temperature_c >= self.slowdown_c:
            self.clock = self.slowed_clock
        elif self.temperature_c < self.release_c:
            self.clock = 1.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Requests a second by priority, their deadline, and how long a batch runs at full clock: fixed part and per row."""

    rates: dict[int, float]
    deadline_s: float = 1.0
    batch_s: float = 0.020
    row_s: float = 0.030
    rows: int = 4


LOAD = Load(rates={1: 4.0, 8: 5.0, 12: 12.0})
"""Three quarters of what the GPU can do at full clock: 21 requests a second for 28.6 that fit in batches of four."""


class Moment(msgspec.Struct, frozen=True):
    """One bin of the picture."""

    time_s: float
    temperature_c: float
    clock: float
    level: int
    p99_ms: dict[str, float]
    goodput: float


class Run(msgspec.Struct, frozen=True):
    """What a run came to. p99 is over the second half, in ms, by priority; goodput: answers in time a second."""

    name: str
    p99_ms: dict[str, float]
    goodput: dict[str, float]
    refused: int
    expired: int
    hottest_c: float
    throttled_share: float
    transitions: int
    transitions_last_quarter: int
    moments: tuple[Moment, ...]


class Simulation:
    """One run. Events are (time, kind, …) on a heap; the plant goes on second by second."""

    def __init__(self, name: str, plant: Plant, load: Load, policy: ThermalPolicy | None, *, seed: int = 1) -> None:
        self.name = name
        self.plant = plant
        self.load = load
        self.core = ThermalCore(policy) if policy is not None else None
        self.gates = OPEN
        self.batcher = Batcher(self._limits())
        self.batcher.add_worker(0)
        self.random = random.Random(seed)
        self.events: list[tuple[float, int, str, int]] = []
        self.order = 0
        self.free_at = 0.0
        self.busy: list[tuple[float, float]] = []
        self.done: list[tuple[float, int, float]] = []
        self.refused = self.expired = 0
        self.levels: list[Level] = []

    def _limits(self) -> BatcherLimits:
        rows = max(1, int(self.load.rows * self.gates.batch_growth))
        staged = 1 if self.gates.concurrency < 1 else 2
        return BatcherLimits(max_batch_size=self.load.rows, coalesce_rows=rows, in_flight_per_worker=staged)

    def _at(self, time_s: float, kind: str, data: int = 0) -> None:
        self.order += 1
        heapq.heappush(self.events, (time_s, self.order, kind, data))

    def run(self, seconds: float, bins: int = 240) -> Run:
        """Simulate so long."""
        for priority, rate in self.load.rates.items():
            self._at(self.random.expovariate(rate), "request", priority)
        self._at(1.0, "second")
        history: list[tuple[float, float, float, int]] = []
        while self.events and self.events[0][0] <= seconds:
            now, _, kind, data = heapq.heappop(self.events)
            if kind == "request":
                self._at(now + self.random.expovariate(self.load.rates[data]), "request", data)
                self._submit(now, data)
            elif kind == "done":
                self._pump(now)  # who is past the deadline has expired, and is no answer
                for entry in self.batcher.batch_done(data, now):
                    if entry is not None:
                        self.done.append((now, entry.priority, now - entry.enqueued_at))
            else:
                self._at(now + 1.0, "second")
                self._second(now)
                history.append((now, self.plant.temperature_c, self.plant.clock, int(self.gates.level)))
            self._pump(now)
        return self._result(seconds, history, bins)

    def _submit(self, now: float, priority: int) -> None:
        if not self.gates.admits(priority):
            self.refused += 1
            return
        self.order += 1
        entry = Entry(
            key=self.order, shape_key=(), rows=1, nbytes=1, priority=priority, deadline=now + self.load.deadline_s,
            stream="", idempotent=True, payload=None,
        )  # fmt: skip
        try:
            self.batcher.enqueue(entry, now)
        except ApplianceError:
            self.refused += 1

    def _pump(self, now: float) -> None:
        for action in self.batcher.poll(now):
            if isinstance(action, Dispatch):
                begins = max(now, self.free_at)
                takes = (self.load.batch_s + self.load.row_s * action.rows) / self.plant.clock
                self.free_at = begins + takes
                self.busy.append((begins, self.free_at))
                self._at(self.free_at, "done", action.batch)
            elif isinstance(action, Expire):
                self.expired += 1

    def _second(self, now: float) -> None:
        """The plant's last second, its throttle, and what the governor makes of a thermometer in whole degrees."""
        worked = sum(max(0.0, min(end, now) - max(begin, now - 1.0)) for begin, end in self.busy)
        self.busy = [(begin, end) for begin, end in self.busy if end > now]
        self.plant.step(1.0, min(1.0, worked))
        self.plant.throttle()
        if self.core is None:
            return
        reading = round(self.plant.temperature_c + self.random.gauss(0, 0.3))
        throttle = frozenset({Throttle.THERMAL_SOFTWARE}) if self.plant.clock < 1 else frozenset()
        sample = DeviceSample(
            device="gpu:0", temperature_c=reading, slowdown_c=self.plant.slowdown_c, throttle=throttle
        )
        self.gates = self.core.observe(ThermalSample(now, (sample,))).gates
        self.batcher.set_limits(self._limits())
        self.levels.append(self.gates.level)

    def _result(self, seconds: float, history: list[tuple[float, float, float, int]], bins: int) -> Run:
        width = max(1, len(history) // bins)
        by_bin: dict[int, list[tuple[int, float]]] = {}
        for when, priority, took in self.done:
            by_bin.setdefault(int((when - 1) // width), []).append((priority, took))
        moments = []
        for index in range(0, len(history), width):
            part = history[index : index + width]
            answers = by_bin.get(index // width, [])
            moments.append(
                Moment(
                    part[0][0],
                    max(temperature for _, temperature, _, _ in part),
                    sum(clock for _, _, clock, _ in part) / len(part),
                    max(level for _, _, _, level in part),
                    {name: p99_ms(answers, number) for number, name in PRIORITIES.items()},
                    len(answers) / len(part),
                )
            )
        half = seconds / 2
        late = [(priority, took) for when, priority, took in self.done if when >= half]
        changes = [index for index in range(1, len(self.levels)) if self.levels[index] is not self.levels[index - 1]]
        return Run(
            self.name,
            {name: p99_ms(late, number) for number, name in PRIORITIES.items()},
            {name: round(sum(at == number for at, _ in late) / half, 2) for number, name in PRIORITIES.items()},
            self.refused,
            self.expired,
            round(max(temperature for _, temperature, _, _ in history), 1),
            round(sum(clock < 0.999 for _, _, clock, _ in history) / len(history), 3),
            len(changes),
            sum(index >= 0.75 * len(self.levels) for index in changes),
            tuple(moments),
        )


def p99_ms(answers: list[tuple[int, float]], priority: int) -> float:
    """The 99th percentile of that priority's times, in ms; NaN without any."""
    times = sorted(took for at, took in answers if at == priority)
    return round(times[min(len(times) - 1, int(0.99 * len(times)))] * 1000, 1) if times else math.nan


def compare(seconds: float, *, ambient_c: float, load: Load = LOAD) -> tuple[Run, Run, Run]:
    """The same load in a cool cabinet, in a hot one without the governor, and there with it."""
    return (
        Simulation("cool", Plant(ambient_c=20.0), load, None).run(seconds),
        Simulation("without governor", Plant(ambient_c=ambient_c), load, None).run(seconds),
        Simulation("with governor", Plant(ambient_c=ambient_c), load, ThermalPolicy()).run(seconds),
    )


def _plain(run: Run) -> dict[str, object]:
    """For JSON, which has no NaN."""
    plain = {key: getattr(run, key) for key in run.__struct_fields__ if key != "moments"}
    return {**plain, "p99_ms": {name: None if math.isnan(ms) else ms for name, ms in run.p99_ms.items()}}


def main() -> int:
    """Compare, tell, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hours", type=float, default=1.0, help="simulated time (default: %(default)s)")
    parser.add_argument("--ambient", type=float, default=45.0, metavar="C", help="in the hot cabinet (%(default)s °C)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    runs = compare(given.hours * 3600, ambient_c=given.ambient)
    if given.svg is not None:
        from thermal_picture import draw

        given.svg.write_text(draw(runs[1:], Plant().slowdown_c, runs[0].p99_ms["high"]))
        print(f"the picture: {given.svg}", file=sys.stderr)
    if given.json:
        rows = [_plain(run) for run in runs]
        print(json.dumps(rows, indent=2))
        return 0
    print(
        f"{'':18}{'p99 ms: high':>14}{'normal':>8}{'low':>8}{'answers/s':>11}{'hottest':>9}{'throttled':>11}{'changes':>9}"
    )
    for run in runs:
        answers = sum(run.goodput.values())
        print(
            f"{run.name:18}{run.p99_ms['high']:14.0f}{run.p99_ms['normal']:8.0f}{run.p99_ms['low']:8.0f}{answers:11.1f}"
            f"{run.hottest_c:7.1f}°C{run.throttled_share:10.0%}{run.transitions:9}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
