"""The monitor: snapshots on time whatever hangs, and the driver's events."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from appliance.core.readings import Gpu, GpuState, Part, Reading, Snapshot
from appliance.sensors.monitor import Monitor, merge
from appliance.sensors.nvml import NvmlSampler
from appliance.sensors.nvml_events import DriverEvent, NvmlEvents, StormGuard
from appliance.sensors.xid import XIDS, Remedy, xid
from tests.fakes.nvml import StubNvml

HASTY_S = 0.02
"""An interval whose half is not worth waiting for a sampler that a test keeps from answering."""


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Hanging:
    """Answers while `free` is set."""

    name = "nvml"
    period_s = 0.0

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.samples = 0

    def sample(self, now_s: float) -> Part:
        self.free.wait()
        self.samples += 1
        return Part({"gpu.0.power": Reading(50.0, "W", now_s)}, (Gpu(0, "GPU-a", "card"),))

    def close(self) -> None:
        pass


class Broken:
    name = "broken"
    period_s = 0.0

    def sample(self, now_s: float) -> Part:
        raise RuntimeError("a bug")

    def close(self) -> None:
        pass


def monitor_of(
    *samplers: Hanging | Broken | NvmlSampler, clock: Clock, interval_s: float = 20.0, events: bool = False
) -> Monitor:
    monitor = Monitor(samplers=samplers, clock=clock, interval_s=interval_s, deadline_s=2.0, gpu_events=events)
    for lane in monitor._lanes:
        lane.start()
    return monitor


async def test_a_driver_that_hangs_costs_its_readings_and_no_thread_more() -> None:
    sampler, clock = Hanging(), Clock()
    monitor = monitor_of(sampler, clock=clock)
    assert (await monitor.sample()).value("gpu.0.power") == 50.0
    sampler.free.clear()
    monitor._interval_s = HASTY_S
    clock.now_s += 1
    late = await monitor.sample()
    assert (late.value("gpu.0.power"), late.readings["gpu.0.power"].at_s) == (50.0, 100.0)
    threads = threading.active_count()
    for _ in range(5):
        clock.now_s += 1
        silent = await monitor.sample()
    assert silent.value("gpu.0.power") is None
    assert silent.reason("gpu.0.power") == "the driver has not answered for 5 s"
    assert silent.gpus[0].state is GpuState.SILENT
    assert [finding.code for finding in silent.findings] == ["sensor-silent"]
    assert threading.active_count() <= threads
    sampler.free.set()
    monitor._interval_s = 20.0
    await asyncio.wait_for(monitor._lanes[0].answered.wait(), 5)
    back = await monitor.sample()
    assert (back.value("gpu.0.power"), back.gpus[0].state) == (50.0, GpuState.OK)
    assert await monitor.close() == 0


async def test_the_first_answer_of_a_driver_is_waited_for_longer_than_an_interval() -> None:
    sampler = Hanging()
    sampler.free.clear()
    monitor = monitor_of(sampler, clock=Clock(), interval_s=HASTY_S)
    asyncio.get_running_loop().call_later(10 * HASTY_S, sampler.free.set)
    assert (await monitor.first(30.0)).value("gpu.0.power") == 50.0
    assert await monitor.close() == 0


async def test_a_driver_that_hangs_at_the_start_is_not_waited_for_for_ever() -> None:
    sampler = Hanging()
    sampler.free.clear()
    monitor = monitor_of(sampler, clock=Clock(), interval_s=HASTY_S)
    assert (await monitor.first(HASTY_S)).gpus == ()
    sampler.free.set()
    assert await monitor.close() == 0


async def test_a_thread_that_hangs_at_the_end_is_left_behind_and_counted() -> None:
    sampler = Hanging()
    monitor = monitor_of(sampler, clock=Clock(), interval_s=0.02)
    sampler.free.clear()
    await monitor.sample()
    assert await monitor.close(timeout_s=0.05) == 1
    sampler.free.set()


async def test_a_bug_in_a_sampler_costs_its_readings_only(caplog: pytest.LogCaptureFixture) -> None:
    monitor = monitor_of(Broken(), Hanging(), clock=Clock())
    snapshot = await monitor.sample()
    assert snapshot.value("gpu.0.power") == 50.0
    assert "sensors.sampler_failed" in caplog.text
    await monitor.close()


async def test_snapshots_come_at_the_interval_and_a_listener_that_raises_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = Monitor(samplers=[Hanging()], interval_s=0.01, gpu_events=False)
    seen: list[Snapshot] = []
    enough = asyncio.Event()

    def bad(snapshot: Snapshot) -> None:
        raise ValueError

    def good(snapshot: Snapshot) -> None:
        seen.append(snapshot)
        if len(seen) == 3:
            enough.set()

    monitor.subscribe(bad)
    end = monitor.subscribe(good)
    monitor.start()
    await asyncio.wait_for(enough.wait(), 10)
    end()
    await monitor.close()
    assert [snapshot.number for snapshot in seen[:3]] == [1, 2, 3]
    assert "sensors.listener_failed" in caplog.text


async def test_xid_79_ends_a_gpu_and_xid_31_only_a_process(stub: StubNvml, tmp_path: Path) -> None:
    monitor = Monitor(samplers=[NvmlSampler(root=tmp_path)], interval_s=60)
    events: asyncio.Queue[DriverEvent] = asyncio.Queue()
    monitor.on_event(events.put_nowait)
    first_snapshot: asyncio.Queue[Snapshot] = asyncio.Queue()
    monitor.subscribe(first_snapshot.put_nowait)
    monitor.start()
    await asyncio.wait_for(first_snapshot.get(), 10)
    stub.event(0, 31)
    first = await asyncio.wait_for(events.get(), 10)
    assert (first.kind, first.gpu, first.data) == ("xid", 0, 31)
    snapshot = await monitor.sample()
    assert (snapshot.gpus[0].state, snapshot.findings) == (GpuState.OK, ())
    stub.event(0, 79)
    await asyncio.wait_for(events.get(), 10)
    snapshot = await monitor.sample()
    assert snapshot.gpus[0].state is GpuState.LOST
    assert snapshot.reason("gpu.0.temperature") == "XID 79: the GPU has fallen off the bus"
    assert [finding.code for finding in snapshot.findings] == ["gpu-lost"]
    assert await monitor.close() == 0


async def test_a_real_hang_in_the_driver_is_reported_and_ends(stub: StubNvml, tmp_path: Path) -> None:
    clock = Clock()
    monitor = monitor_of(NvmlSampler(root=tmp_path), clock=clock)
    await monitor.sample()
    stub.set("0.hang.nvmlDeviceGetPowerUsage", 1)
    monitor._interval_s = HASTY_S
    await monitor.sample()
    clock.now_s += 7
    snapshot = await monitor.sample()
    assert snapshot.reason("gpu.0.temperature") == "the driver has not answered for 7 s"
    assert snapshot.silent_s == {"nvml": pytest.approx(7, abs=0.01)}
    assert [finding.message for finding in snapshot.findings] == ["it has not answered for 7 s"]
    stub.close()
    monitor._interval_s = 20.0
    await asyncio.wait_for(monitor._lanes[0].answered.wait(), 5)
    back = await monitor.sample()
    assert (back.value("gpu.0.temperature"), back.silent_s) == (61, {"nvml": 0.0})
    await monitor.close()


async def test_a_storm_of_events_is_counted_and_not_delivered(stub: StubNvml) -> None:
    got: asyncio.Queue[DriverEvent] = asyncio.Queue()
    events = NvmlEvents(got.put_nowait, guard=StormGuard(limit=2))
    for _ in range(5):
        stub.event(0, 13)
    stub.event(0, 43)
    events.start()
    assert [(await asyncio.wait_for(got.get(), 10)).data for _ in range(3)] == [13, 13, 43]
    assert events.guard.held_back(time.monotonic()) == 3
    assert await events.close(5)


def test_after_a_storm_the_next_event_says_how_many_were_held_back() -> None:
    guard = StormGuard(limit=1, window_s=60)
    admitted = [guard.admit(DriverEvent(at_s, "xid", 0, 13)) for at_s in (0, 1, 2, 61)]
    assert [event and event.suppressed for event in admitted] == [0, None, None, 2]


def test_a_storm_is_over_when_a_window_has_passed_without_it() -> None:
    guard = StormGuard(limit=1, window_s=60)
    for at_s in (0, 1, 2):
        guard.admit(DriverEvent(at_s, "xid", 0, 13))
    for at_s in (30, 50):
        guard.admit(DriverEvent(at_s, "xid", 1, 43))
    assert [guard.held_back(now_s) for now_s in (50, 61.9, 62, 109.9, 110, 1e6)] == [3, 3, 1, 1, 0, 0]


async def test_the_finding_of_a_storm_goes_with_it() -> None:
    now_s = 1000.0
    monitor = Monitor(samplers=(), clock=lambda: now_s)
    assert monitor._events is not None
    for _ in range(12):
        monitor._events.guard.admit(DriverEvent(now_s, "xid", 0, 13))
    assert [finding.code for finding in (await monitor.sample()).findings] == ["event-storm"]
    now_s += 61
    assert (await monitor.sample()).findings == ()


def test_nothing_makes_a_lost_gpu_look_alive() -> None:
    lost = Part(
        {"gpu.0.power": Reading(None, "W", 0, "lost")}, (Gpu(0, "a", "Thor", integrated=True, state=GpuState.LOST),)
    )
    well = Part({"gpu.0.power": Reading(None, "W", 0, "?")}, (Gpu(0, "a", "Thor", integrated=True),))
    board = Part({"gpu.0.power": Reading(9.0, "W", 0)}, (Gpu(0, "jetson-gpu", "Thor", integrated=True),))
    assert merge([lost, board])[0]["gpu.0.power"].value is None
    assert merge([well, board])[0]["gpu.0.power"].value == 9.0
    assert [gpu.uuid for gpu in merge([well, board])[1]] == ["a"]


def test_the_important_xids_are_known_and_others_cost_one_worker() -> None:
    known = {13, 31, 43, 45, 48, 61, 62, 63, 64, 74, 79, 92, 94, 95, 109, 119, 120}
    assert known <= set(XIDS)
    assert [xid(number).remedy for number in (31, 48, 79, 64, 999)] == [
        Remedy.APPLICATION, Remedy.RESET, Remedy.REBOOT, Remedy.HARDWARE, Remedy.APPLICATION]  # fmt: skip
    assert all(row.meaning and row.action for row in XIDS.values())


class Counting:
    """Counts how often it is asked."""

    def __init__(self, name: str, period_s: float) -> None:
        self.name, self.period_s, self.samples = name, period_s, 0

    def sample(self, now_s: float) -> Part:
        self.samples += 1
        return Part({f"{self.name}.value": Reading(float(self.samples), "", now_s)})

    def close(self) -> None:
        pass


async def test_slow_samplers_are_asked_once_a_second_and_their_readings_say_how_old_they_are() -> None:
    quick, slow, clock = Counting("quick", 0.0), Counting("slow", 1.0), Clock()
    monitor = Monitor(samplers=(quick, slow), clock=clock, interval_s=20.0, gpu_events=False)
    for lane in monitor._lanes:
        lane.start()
    for _ in range(10):
        snapshot = await monitor.sample()
        clock.now_s += 0.1
    assert (quick.samples, slow.samples) == (10, 1)
    assert snapshot.readings["quick.value"].at_s == pytest.approx(100.9)
    assert snapshot.readings["slow.value"].at_s == 100.0
    assert (await monitor.sample()).readings["slow.value"].value == 2.0
    await monitor.close()


async def test_a_snapshot_waits_for_the_last_of_the_samplers_that_it_asked() -> None:
    late, clock = Hanging(), Clock()
    monitor = Monitor(samplers=(Counting("quick", 0.0), late), clock=clock, interval_s=20.0, gpu_events=False)
    for lane in monitor._lanes:
        lane.start()
    late.free.clear()
    sampling = asyncio.create_task(monitor.sample())
    await asyncio.wait_for(_answer_of(monitor, 0), 5)
    assert not sampling.done()
    # another one in between finds nobody to ask but the quick one, and does not end the first
    await monitor.sample()
    assert not sampling.done()
    late.free.set()
    assert (await asyncio.wait_for(sampling, 5)).value("gpu.0.power") == 50.0
    await monitor.close()


async def _answer_of(monitor: Monitor, lane: int) -> None:
    await asyncio.sleep(0)
    await monitor._lanes[lane].answered.wait()


def test_only_nvml_is_asked_at_each_sample_however_short_the_interval() -> None:
    monitor = Monitor(interval_s=0.1, gpu_events=False)
    assert {sampler.name: sampler.period_s for sampler in monitor._samplers} == {
        "nvml": 0.0,
        "host": 1.0,
        "board": 1.0,
        "storage": 10.0,
    }
