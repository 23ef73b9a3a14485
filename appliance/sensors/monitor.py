"""Samples everything at an interval and hands each snapshot to its subscribers: the owner of all sensor threads.

On the event loop. A sampler that does not answer in time costs its own readings and nothing else: its last values stand until the
deadline, then they are missing, with how long it has been silent. Decides nothing; the governor and the page do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from appliance.core import quantities as q
from appliance.core.readings import Finding, Gpu, GpuState, Part, Reading, Severity, Snapshot, missing
from appliance.sensors import fans
from appliance.sensors.base import Sampler
from appliance.sensors.board import BoardSampler
from appliance.sensors.host import HostSampler
from appliance.sensors.lane import Lane
from appliance.sensors.nvml import NvmlSampler
from appliance.sensors.nvml_events import DriverEvent, NvmlEvents
from appliance.sensors.storage import StorageSampler
from appliance.sensors.xid import SEVERITIES, Remedy

log = logging.getLogger(__name__)

SnapshotListener: TypeAlias = Callable[[Snapshot], None]
EventListener: TypeAlias = Callable[[DriverEvent], None]

FALLEN_OFF = 79
STICKY = frozenset({Remedy.RESET, Remedy.REBOOT, Remedy.HARDWARE})
NOTHING = Part({})
SILENT_ACTION = "If it stays, the driver hangs: reboot the box."


class Monitor:
    """`latest` is the last snapshot, None before the first. Listeners run on the loop and must not block.

    `processes` is asked before each sample for the names and pids of our own processes. `deadline_s`: how long a sampler's last
    values stand in for an answer that is late.
    """

    def __init__(
        self,
        *,
        interval_s: float = 1.0,
        deadline_s: float = 2.0,
        root: Path = Path("/"),
        folders: Mapping[str, Path] | None = None,
        processes: Callable[[], Mapping[str, int]] = dict,
        samplers: Sequence[Sampler] | None = None,
        gpu_events: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.latest: Snapshot | None = None
        self._interval_s, self._deadline_s, self._clock, self._processes = interval_s, deadline_s, clock, processes
        if samplers is None:
            samplers = (
                NvmlSampler(root=root),
                HostSampler(root=root),
                BoardSampler(root=root),
                StorageSampler(folders or {}, root=root),
            )
        self._samplers = tuple(samplers)
        self._lanes = [Lane(sampler, self._answered) for sampler in samplers]
        self._waits: list[_Wait] = []
        self._still = Part({})
        self._still_parts: list[Part] = []
        self._events = NvmlEvents(self._event) if gpu_events else None
        self._listeners: list[SnapshotListener] = []
        self._event_listeners: list[EventListener] = []
        self._xids: dict[tuple[int, int], Finding] = {}
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._next_s = 0.0
        self._closed = False

    def start(self) -> None:
        """Start the threads and the sampling."""
        for lane in self._lanes:
            lane.start()
        if self._events is not None:
            self._events.start()
        self._next_s = self._clock()
        self._timer = asyncio.get_running_loop().call_later(0, self._tick)

    async def close(self, timeout_s: float = 2.0) -> int:
        """End everything. The number of threads that hang and were left behind."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for wait in self._waits:
            wait.late.cancel()
        self._waits.clear()
        endings = [lane.close(timeout_s) for lane in self._lanes]
        if self._events is not None:
            endings.append(self._events.close(timeout_s))
        return (await asyncio.gather(*endings)).count(False)

    def subscribe(self, listener: SnapshotListener) -> Callable[[], None]:
        """Call it for every snapshot; the result ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def on_event(self, listener: EventListener) -> Callable[[], None]:
        """Call it for every event of the driver that is not held back; the result ends that."""
        self._event_listeners.append(listener)
        return lambda: self._event_listeners.remove(listener) if listener in self._event_listeners else None

    def reopen(self) -> None:
        """Look for GPUs anew: somebody has reset one."""
        self._xids.clear()
        for sampler in self._samplers:
            if isinstance(sampler, NvmlSampler):
                sampler.reopen()

    async def first(self, patience_s: float) -> Snapshot:
        """A snapshot with the first answer of NVIDIA's driver, if that comes in time: one that nobody used yet is loaded by the
        first who asks, which takes seconds.
        """
        for lane in self._lanes:
            if lane.name == NvmlSampler.name and lane.ask(self._clock()):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(lane.answered.wait(), patience_s)
        return await self.sample()

    async def sample(self) -> Snapshot:
        """One snapshot now; what the task does at each interval. Does not wait for what is being sampled already."""
        started = self._clock()
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask(started, lambda: None if answered.done() else answered.set_result(None))
        await answered
        return self._snapshot(started)

    def _snapshot(self, started: float) -> Snapshot:
        """What the lanes have now."""
        now = self._clock()
        parts = [self._part(lane, now) for lane in self._lanes]
        self._number += 1
        readings, gpus = self._merged(parts)
        findings = [finding for part in parts for finding in part.findings]
        self.latest = Snapshot(
            number=self._number,
            monotonic_s=now,
            wall_s=time.time(),
            duration_s=now - started,
            readings=readings,
            gpus=gpus,
            findings=(*findings, *self._xids.values(), *self._storms(now), *fans.stopped(readings, gpus)),
            silent_s={lane.name: self._overdue_s(lane, now) for lane in self._lanes},
        )
        return self.latest

    def _ask(self, now_s: float, done: Callable[[], None]) -> None:
        """Ask the lanes whose time it is; `done` is called when the last of them has answered, or after half an interval."""
        for sampler, lane in zip(self._samplers, self._lanes, strict=True):
            if isinstance(sampler, HostSampler) and lane.ready(now_s):
                sampler.wanted = self._processes()
        # a lane that was late before is not waited for again
        asked = [lane for lane in self._lanes if lane.ask(now_s)]
        if not asked:
            done()
            return
        wait = _Wait(asked, done)
        wait.late = asyncio.get_running_loop().call_later(min(self._deadline_s, self._interval_s / 2), self._over, wait)
        self._waits.append(wait)

    def _over(self, wait: _Wait) -> None:
        wait.late.cancel()
        self._waits.remove(wait)
        wait.done()

    def _answered(self) -> None:
        """A lane has answered; the last one that was asked ends the waiting."""
        for wait in tuple(self._waits):
            if all(lane.answered.is_set() for lane in wait.asked):
                self._over(wait)

    def _merged(self, parts: list[Part]) -> tuple[dict[str, Reading], tuple[Gpu, ...]]:
        """`merge`; what the slow lanes gave together is kept until one of them gives something else."""
        if not parts:
            return {}, ()
        rest = parts[1:]
        if len(rest) != len(self._still_parts) or any(a is not b for a, b in zip(rest, self._still_parts, strict=True)):
            self._still, self._still_parts = Part(*merge(rest)), rest
        return merge((parts[0], self._still))

    def _tick(self) -> None:
        """Callbacks rather than a task: ten times a second, waking one costs more than what is read."""
        self._ask(started := self._clock(), lambda: self._deliver(started))

    def _deliver(self, started: float) -> None:
        try:
            snapshot = self._snapshot(started)
            for listener in tuple(self._listeners):
                try:
                    listener(snapshot)
                except Exception:
                    log.exception("sensors.listener_failed")
        finally:
            # a sample that took too long is left out, not made up for
            now = self._clock()
            self._next_s = max(self._next_s + self._interval_s, now)
            if not self._closed:
                self._timer = asyncio.get_running_loop().call_later(self._next_s - now, self._tick)

    def _overdue_s(self, lane: Lane, now_s: float) -> float:
        silent_s = lane.silent_s(now_s)
        return silent_s if silent_s > self._deadline_s else 0.0

    def _part(self, lane: Lane, now_s: float) -> Part:
        silent_s = self._overdue_s(lane, now_s)
        part = lane.part or NOTHING
        if not silent_s:
            return part
        who = "the driver" if lane.name == "nvml" else f"the {lane.name} sensors"
        reason = f"{who} has not answered for {silent_s:.0f} s".replace("sensors has", "sensors have")
        readings = {name: _silent(name, reading, reason, now_s) for name, reading in part.readings.items()}
        gpus = tuple(_silent_gpu(gpu, reason) for gpu in part.gpus)
        severity = Severity.CRITICAL if lane.name == "nvml" else Severity.WARNING
        message = reason.replace(who, "it", 1) if lane.name == "nvml" else reason
        finding = Finding("sensor-silent", severity, lane.name, message, SILENT_ACTION)
        return Part(readings, gpus, (*part.findings, finding))

    def _event(self, event: DriverEvent) -> None:
        row = event.xid
        # of a GPU that is gone its own state tells, and lasts as long
        if row is not None and row.remedy in STICKY and row.number != FALLEN_OFF and event.gpu >= 0:
            message = f"XID {row.number}: {row.meaning}"
            self._xids[event.gpu, row.number] = Finding(
                "gpu-xid", SEVERITIES[row.remedy], f"gpu.{event.gpu}", message, row.action
            )
        if row is not None and row.number == FALLEN_OFF and event.gpu >= 0:
            for sampler in self._samplers:
                if isinstance(sampler, NvmlSampler):
                    sampler.mark_lost(event.gpu, f"XID {FALLEN_OFF}: {row.meaning}")
        for listener in tuple(self._event_listeners):
            try:
                listener(event)
            except Exception:
                log.exception("sensors.listener_failed")

    def _storms(self, now_s: float) -> tuple[Finding, ...]:
        held = 0 if self._events is None else self._events.guard.held_back(now_s)
        if not held:
            return ()
        message = f"the NVIDIA driver repeats itself: {held} events were counted and not reported"
        return (Finding("event-storm", Severity.WARNING, "driver", message, "See `journalctl -k` for NVRM lines."),)


def merge(parts: Sequence[Part]) -> tuple[dict[str, Reading], tuple[Gpu, ...]]:
    """All readings and GPUs; what an earlier part lacks a later one fills, so that a Jetson's files mend NVML's holes.

    Only of a GPU that shares the host's memory and is well: nothing may make a lost one look alive.
    """
    readings: dict[str, Reading] = {}
    gpus: dict[int, Gpu] = {}
    for part in parts:
        for gpu in part.gpus:
            gpus.setdefault(gpu.index, gpu)
        holes = [name for name in readings.keys() & part.readings.keys() if readings[name].value is None]
        readings = part.readings | readings
        if not holes:
            continue
        closed = tuple(
            f"gpu.{gpu.index}." for gpu in gpus.values() if gpu.state is not GpuState.OK or not gpu.integrated
        )
        for name in holes:
            if part.readings[name].value is not None and not name.startswith(closed):
                readings[name] = part.readings[name]
    return readings, tuple(gpus.values())


class _Wait:
    """Lanes that were asked together, and what to do when the last one has answered, or is late."""

    late: asyncio.TimerHandle

    def __init__(self, asked: list[Lane], done: Callable[[], None]) -> None:
        self.asked = asked
        self.done = done


def _silent(name: str, reading: Reading, reason: str, now_s: float) -> Reading:
    found = q.quantity_of(name)
    return missing(found[0], reason, now_s) if found else Reading(None, reading.unit, now_s, reason)


def _silent_gpu(gpu: Gpu, reason: str) -> Gpu:
    if gpu.state is not GpuState.OK:
        return gpu
    return Gpu(gpu.index, gpu.uuid, gpu.name, gpu.integrated, GpuState.SILENT, reason, SILENT_ACTION)
