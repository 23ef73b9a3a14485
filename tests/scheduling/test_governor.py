"""The governor acts: real workers behind a real service, and samples that say how hot it is."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.config import EnginesConfig, GovernorConfig, RepositoryConfig, WorkersConfig
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import InferenceRequest, InferenceResponse, ModelName, Version
from appliance.core.slope import SlopePolicy
from appliance.core.tensor import DataType, Tensor
from appliance.core.thermal import DeviceSample, Level, ThermalSample
from appliance.lifecycle.compilation import ModelCompiler
from appliance.lifecycle.compiler import BuildProgress
from appliance.lifecycle.leaks import RETRY_S, LeakWatch
from appliance.lifecycle.manager import Manager
from appliance.lifecycle.repository import Repository
from appliance.observability.events import Event, EventBus
from appliance.scheduling.governor import GONE_RETRY_S, STALE_S, Governor, policy_of
from appliance.service import Outcome, Service
from appliance.workers.link import Instance
from appliance.workers.supervisor import Supervisor

MODEL = 'engine = "loopback"\n[batching]\nmax_batch_size = 8\nonly_paying_sizes = false\n[worker]\ninstances = 2\n'


class Box:
    """A service with a governor, and a thermometer to lie with."""

    def __init__(self, service: Service, manager: Manager, governor: Governor, events: list[Event]) -> None:
        self.service = service
        self.manager = manager
        self.governor = governor
        self.events = events
        self.second = 0.0

    def at(self, temperature: float, seconds: int = 5) -> None:
        for _ in range(seconds):
            self.second += 1
            device = DeviceSample(device="gpu:0", temperature_c=temperature, slowdown_c=90.0)
            self.governor.observe(ThermalSample(self.second, (device,)))

    async def ask(self, priority: int = 0) -> InferenceResponse:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        data = Tensor("data", DataType.FP32, (1, 4), bytes(16))
        self.service.submit(InferenceRequest(ModelName("echo"), (data,), priority=priority), answer.set_result)
        outcome = await answer
        assert isinstance(outcome, InferenceResponse)
        return outcome


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    (tmp_path / "echo" / "1").mkdir(parents=True)
    (tmp_path / "echo" / "model.toml").write_text(MODEL + '[parameters]\nshape = "4"\n')
    supervisor = Supervisor(max_arena_bytes=1 << 24, on_worker_lost=lambda link, reason: None)
    supervisor.start()
    supervisor.watch()
    events = EventBus()
    heard: list[Event] = []
    events.subscribe(heard.append)
    governor = Governor(policy_of(GovernorConfig()), events)
    manager = Manager(
        Repository(tmp_path),
        supervisor,
        events,
        config=RepositoryConfig(),
        workers=WorkersConfig(),
        drain_timeout_s=5.0,
        governor=governor,
    )
    await manager.load(ModelName("echo"))
    yield Box(Service(manager, events, governor), manager, governor, heard)
    await manager.close(1.0)
    supervisor.close()


async def test_hot_refuses_low_priority_with_the_reason_and_when_to_come_again(box: Box) -> None:
    box.at(85.0)
    await box.ask(1)
    await box.ask()
    with pytest.raises(ApplianceError) as refused:
        await box.ask(9)
    assert refused.value.code is ErrorCode.UNAVAILABLE
    assert "GPU 0 is at 85 °C, 5 °C below its slowdown" in refused.value.message
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1
    assert [event.data["level"] for event in box.events if event.topic == "governor.level"] == ["HOT"]
    assert box.service.statistics()[0].failures["REJECTED"] == 1


async def test_critical_serves_the_highest_class_and_what_cooled_down_serves_everybody(box: Box) -> None:
    box.at(89.0)
    await box.ask(1)
    with pytest.raises(ApplianceError, match="only priority 1 is served"):
        await box.ask()
    box.at(50.0, seconds=120)
    await box.ask(16)
    assert box.service.snapshot()["governor"]["level"] == "NOMINAL"


async def test_fewer_and_smaller_batches_run_when_it_is_squeezed(box: Box) -> None:
    scheduler = box.manager.resolve(ModelName("echo"), Version("")).scheduler
    assert scheduler is not None
    assert scheduler.coalesce_rows == 8
    box.at(86.0)
    limits = scheduler._batcher.limits
    assert (limits.coalesce_rows, limits.max_batches, limits.in_flight_per_worker) == (4, 1, 1)
    await asyncio.gather(*(box.ask(1) for _ in range(20)))
    assert max(box.service.statistics()[0].batches) <= 4
    box.at(50.0, seconds=120)
    limits = scheduler._batcher.limits
    assert (limits.coalesce_rows, limits.max_batches, limits.in_flight_per_worker) == (8, 0, 2)


async def test_an_operator_s_hold_refuses_and_builds_nothing_until_it_is_released_or_over(box: Box) -> None:
    service, clock = box.service, [1000.0]
    box.governor._clock = lambda: clock[0]
    shown = service.hold_governor("hot", 60.0, "the fan is being changed")
    assert (shown["level"], shown["hold"]["seconds_left"]) == ("HOT", 60.0)
    with pytest.raises(ApplianceError, match=r"an operator holds it at HOT \(the fan is being changed\)") as refused:
        await box.ask(9)
    assert (refused.value.code, refused.value.retry_after_s) == (ErrorCode.UNAVAILABLE, 60.0)
    assert not box.governor._cool.is_set()
    await box.ask(1)
    # what the sensors say counts where it is stricter, and comes through in its own words
    box.at(89.0)
    with pytest.raises(ApplianceError, match="GPU 0 is at 89"):
        await box.ask(5)
    box.at(50.0, seconds=120)
    assert box.governor.gates.level is Level.HOT
    clock[0] = 1059.0
    service.tick(box.second)
    assert service.governor()["hold"]["seconds_left"] == 1.0
    clock[0] = 1060.0
    service.tick(box.second)
    await box.ask(9)
    assert service.governor()["hold"] is None
    topics = [event.topic for event in box.events if event.topic.startswith(("governor.", "operator."))]
    assert topics == ["governor.held", "governor.level", "operator.governor.hold", *["governor.level"] * 2,
                      "governor.released", "governor.level"]  # fmt: skip
    assert box.events[-1].data["reason"] == "its time is over"


async def test_a_release_ends_a_hold_and_is_an_action_only_if_there_was_one(box: Box) -> None:
    service = box.service
    service.hold_governor("CRITICAL", 60.0, "maintenance")
    service.hold_governor("WARM", 60.0, "almost done")  # a new one stands in place of the old one
    await box.ask(9)
    assert service.release_governor()["level"] == "NOMINAL"
    assert service.release_governor()["hold"] is None
    assert [event.topic for event in box.events].count("operator.governor.release") == 1
    assert box.governor.judgement.gates == box.governor.gates
    with pytest.raises(ApplianceError, match="only be stricter"):
        service.hold_governor("NOMINAL", 60.0, "silence, please")


async def test_a_hold_without_a_governor_is_unavailable(box: Box) -> None:
    service = Service(box.manager, EventBus())
    for ask in (service.governor, service.release_governor, lambda: service.hold_governor("HOT", 1.0, "x")):
        with pytest.raises(ApplianceError, match="the governor is off"):
            ask()


async def test_samples_that_stay_away_are_a_sensor_that_vanished(box: Box) -> None:
    box.service.tick(1e6)
    assert box.governor.gates.level is Level.NOMINAL
    box.at(50.0)
    for second in range(int(STALE_S), 60):
        box.service.tick(box.second + second)
    assert box.governor.gates.level is Level.WARM


async def test_a_build_waits_while_it_is_warm_and_says_why(box: Box, tmp_path: Path) -> None:
    compiler = ModelCompiler(tmp_path, EnginesConfig(), box.governor)
    said: list[BuildProgress] = []
    box.at(80.0)
    waiting = asyncio.create_task(compiler._cool(said.append))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert "waiting: GPU 0 is at 80 °C" in said[0].phase
    box.at(50.0, seconds=120)
    await asyncio.wait_for(waiting, 5)


async def test_a_worker_is_recycled_under_load_without_losing_a_request(box: Box) -> None:
    version = box.manager.resolve(ModelName("echo"), Version(""))
    assert version.scheduler is not None
    old = {instance.link.pid for instance in version.scheduler.instances.values()}
    stop = asyncio.Event()
    answered = 0

    async def client() -> None:
        nonlocal answered
        while not stop.is_set():
            await box.ask(1)
            answered += 1

    clients = [asyncio.create_task(client()) for _ in range(16)]
    for instance in list(version.scheduler.instances.values()):
        await version.recycle(instance, "a test")
    for _ in range(100):
        await box.ask(1)
    stop.set()
    await asyncio.gather(*clients)
    new = {instance.link.pid for instance in version.scheduler.instances.values()}
    assert len(new) == 2
    assert not new & old
    assert answered > 16
    assert version.statistics.fail.count == 0
    assert [event.topic for event in box.events if event.topic.startswith("worker.")] == ["worker.recycled"] * 2


async def test_a_leak_is_told_and_the_worker_recycled_with_a_day_in_a_moment(box: Box) -> None:
    """The front and one worker leak 20 MiB an hour; the other worker does not, and stays."""
    version = box.manager.resolve(ModelName("echo"), Version(""))
    assert version.scheduler is not None
    leaking, sound = (instance.link.pid for instance in version.scheduler.instances.values())
    now = 0.0
    watch = LeakWatch(
        box.manager.generations,
        box.service._events,
        SlopePolicy(),
        read=lambda pid: int((100 + (20 * now / 3600 if pid in (leaking, os.getpid()) else 0)) * 2**20),
    )
    recycled = asyncio.Event()
    box.service.subscribe(lambda event: recycled.set() if event.topic == "worker.recycled" else None)
    while now < 5 * 3600:
        now += 30
        watch.tick(now)
    await asyncio.wait_for(recycled.wait(), 30)
    await watch.close()
    told = [(event.data["process"], event.data["pid"]) for event in box.events if event.topic == "memory.leak"]
    assert told == [("front", os.getpid()), ("echo/1", leaking)]
    left = {instance.link.pid for instance in version.scheduler.instances.values()}
    assert sound in left
    assert leaking not in left
    assert len(left) == 2
    await box.ask()


async def test_a_recycling_that_fails_is_tried_again_later(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    version = box.manager.resolve(ModelName("echo"), Version(""))
    assert version.scheduler is not None
    leaking, _ = (instance.link.pid for instance in version.scheduler.instances.values())
    now = 0.0
    tries: list[float] = []
    ends = [ApplianceError(ErrorCode.UNAVAILABLE, "no memory for another one"), OSError(24, "Too many open files")]
    recycle = version.recycle

    async def flaky(instance: Instance, reason: str) -> None:
        tries.append(now)
        if len(tries) <= len(ends):
            raise ends[len(tries) - 1]
        await recycle(instance, reason)

    monkeypatch.setattr(version, "recycle", flaky)
    watch = LeakWatch(
        box.manager.generations,
        box.service._events,
        SlopePolicy(),
        read=lambda pid: int((100 + (20 * now / 3600 if pid == leaking else 0)) * 2**20),
    )
    while now < 8 * 3600 and len(tries) < 3:
        now += 30
        watch.tick(now)
        await asyncio.sleep(0)
    assert watch._recycling is not None
    await asyncio.wait_for(watch._recycling, 30)
    assert [later - earlier for earlier, later in itertools.pairwise(tries)] == [RETRY_S, RETRY_S]
    assert leaking not in {instance.link.pid for instance in version.scheduler.instances.values()}
    for _ in range(60):
        now += 30
        watch.tick(now)
    assert len(tries) == 3
    await watch.close()


async def test_a_model_whose_device_is_gone_is_refused_with_the_reason_and_is_not_ready_until_it_is_back(
    box: Box,
) -> None:
    box.governor.condemn({"gpu:0": "it fell off the bus. Reboot the box."})
    await box.ask(16)
    box.governor.condemn({"host": "it burns."})
    with pytest.raises(ApplianceError, match="the host cannot be used: it burns") as refused:
        await box.ask(1)
    assert (refused.value.code, refused.value.retry_after_s) == (ErrorCode.UNAVAILABLE, GONE_RETRY_S)
    assert not box.service.model_ready(ModelName("echo"))
    box.governor.condemn({})
    await box.ask(1)
    assert box.service.model_ready(ModelName("echo"))


def test_where_no_gpu_can_be_used_each_of_them_is_gone_and_the_host_is_not() -> None:
    governor = Governor(policy_of(GovernorConfig()), EventBus())
    governor.condemn({"gpu:*": "driver", "gpu:1": "lost"})
    assert [governor.condemned(device) for device in ("gpu:0", "gpu:1", "host")] == ["driver", "lost", ""]


async def test_each_change_of_the_level_is_as_grave_as_the_level_it_leads_to(box: Box) -> None:
    for temperature in (80.0, 85.0, 89.0):
        box.at(temperature)
    box.at(50.0, seconds=200)
    told = [(e.data["level"], e.data["severity"]) for e in box.events if e.topic == "governor.level"]
    assert told[:3] == [("WARM", "warning"), ("HOT", "error"), ("CRITICAL", "error")]
    assert {severity for _, severity in told[3:]} == {"info"}
