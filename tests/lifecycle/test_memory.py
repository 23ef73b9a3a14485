"""The ledger's shell: it measures, keeps what it measured, evicts and refuses."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance.config import RepositoryConfig, WorkersConfig
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.memory_budget import HOST, MIB, WORKER_BYTES, MemoryBudget
from appliance.core.request import ModelName, Version
from appliance.lifecycle.manager import Manager
from appliance.lifecycle.memory import MemoryShortError, ModelMemory, resident_bytes
from appliance.lifecycle.repository import Repository
from appliance.observability.events import Event, EventBus
from appliance.workers.link import Instance, NoRoomError
from appliance.workers.supervisor import Supervisor


class House:
    def __init__(self, folder: Path, capacity: int, weighs: int = 0) -> None:
        self.events: list[Event] = []
        self.evicted: list[tuple[str, str]] = []
        bus = EventBus()
        bus.subscribe(self.events.append)

        def measure(pids: Iterable[int]) -> dict[str, int]:
            return {HOST: weighs * len(list(pids))}

        self.memory = ModelMemory(
            MemoryBudget({HOST: capacity}), bus, peaks=folder / "deep" / "peaks.json", measure=measure
        )

        self.memory.attach(tuple, self.evict)

    async def evict(self, owner: str, wanted_by: str) -> None:
        self.evicted.append((owner, wanted_by))
        self.memory.release(owner)

    async def load(self, owner: str, *, evictable: bool = False) -> None:
        await self.memory.reserve(owner, owner, device=HOST, file_bytes=0, instances=1, evictable=evictable)


async def test_what_does_not_fit_is_refused_with_numbers(tmp_path: Path) -> None:
    house = House(tmp_path, WORKER_BYTES + 10 * MIB)
    await house.load("a/1")
    with pytest.raises(
        ApplianceError, match=r"it needs 0.1 GB on host, 10 MB free: unload a/1 \(0.1 GB\)\?"
    ) as refused:
        await house.load("b/1")
    assert refused.value.code is ErrorCode.UNAVAILABLE
    assert house.events[-1].topic == "memory.refused"


async def test_an_idle_model_that_may_go_makes_room(tmp_path: Path) -> None:
    house = House(tmp_path, WORKER_BYTES + 10 * MIB)
    await house.load("a/1", evictable=True)
    await house.load("b/1")
    assert house.evicted == [("a/1", "b/1")]
    assert [held.owner for held in house.memory.budget.held] == ["b/1"]


async def test_who_comes_of_its_own_accord_has_nobody_unloaded_and_who_is_unloaded_for_another_frees_nothing_for_a_third(
    tmp_path: Path,
) -> None:
    house, freed = House(tmp_path, WORKER_BYTES + 10 * MIB), []
    house.memory.attach(tuple, house.evict, lambda: freed.append(list(house.evicted)))
    await house.load("a/1", evictable=True)
    with pytest.raises(MemoryShortError, match="would need a/1 to be unloaded"):
        await house.memory.reserve("b/1", "b/1", device=HOST, file_bytes=0, instances=1, evictable=False, evict=False)
    assert (house.evicted, freed) == ([], [])
    await house.load("b/1")
    house.memory.release("b/1")
    house.memory.release("b/1")
    assert freed == [[("a/1", "b/1")]] * 2, "once when all had gone that had to, once for b"


async def test_what_was_measured_counts_and_is_there_after_a_restart(tmp_path: Path) -> None:
    house = House(tmp_path, 1 << 40, weighs=500 * MIB)
    await house.load("a/1")
    house.memory.measured("a/1", "a/1", [1, 2])
    assert house.memory.budget.booked(HOST) == 1000 * MIB
    again = House(tmp_path, 1 << 40)
    await again.load("a/1")
    assert again.memory.budget.booked(HOST) == 1100 * MIB


async def test_peaks_that_cannot_be_read_are_as_none(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "peaks.json").write_text("{")
    house = House(tmp_path, 1 << 40)
    await house.load("a/1")
    assert house.memory.budget.booked(HOST) == WORKER_BYTES


def test_a_process_that_is_gone_holds_nothing() -> None:
    assert resident_bytes([2**22 + 1]) == {HOST: 0}


async def test_a_real_model_is_evicted_for_another_and_what_may_not_go_is_refused_for(tmp_path: Path) -> None:
    for name, evictable in (("first", "true"), ("second", "false"), ("third", "false")):
        (tmp_path / "models" / name / "1").mkdir(parents=True)
        (tmp_path / "models" / name / "model.toml").write_text(
            f'engine = "loopback"\n[worker]\nevictable = {evictable}\n[parameters]\nshape = "4"\n'
        )
    supervisor = Supervisor(max_arena_bytes=1 << 24, on_worker_lost=lambda link, reason: None)
    supervisor.start()
    supervisor.watch()
    events = EventBus()
    budget = MemoryBudget({HOST: WORKER_BYTES + MIB})
    manager = Manager(
        Repository(tmp_path / "models"),
        supervisor,
        events,
        config=RepositoryConfig(),
        workers=WorkersConfig(),
        drain_timeout_s=5.0,
        memory=ModelMemory(budget, events, peaks=tmp_path / "peaks.json"),
    )
    try:
        await manager.load(ModelName("first"))
        assert 0 < budget.booked(HOST) < WORKER_BYTES + MIB
        await manager.load(ModelName("second"))
        states = {entry.name: (entry.state, entry.reason) for entry in manager.index(ready_only=False)}
        assert states["second"] == ("READY", "")
        assert states["first"][0] == "UNAVAILABLE"
        assert states["first"][1].startswith("evicted for second/1@")
        with pytest.raises(ApplianceError, match=r"waits for memory: needs .* free: unload second/1@"):
            await manager.load(ModelName("third"))
        await manager.unload(ModelName("third"))
        await manager.unload(ModelName("second"))
        assert budget.held == ()
        await manager.load(ModelName("first"))
        assert manager.resolve(ModelName("first"), Version("")).answering
    finally:
        await manager.close(1.0)
        supervisor.close()
    assert budget.held == ()


class Crowd:
    """Real models that do not all fit at once, with and without somebody who gives memory back."""

    def __init__(self, folder: Path, capacity: int = WORKER_BYTES + MIB, most: int = 0, **evictable: bool) -> None:
        for name, may_go in evictable.items():
            (folder / "models" / name / "1").mkdir(parents=True)
            (folder / "models" / name / "model.toml").write_text(
                f'engine = "loopback"\n[worker]\nevictable = {str(may_go).lower()}\n[parameters]\nshape = "4"\n'
            )
        self.supervisor = Supervisor(max_arena_bytes=1 << 24, on_worker_lost=lambda link, reason: None)
        self.supervisor.start()
        self.supervisor.watch()
        self.events: list[Event] = []
        bus = EventBus()
        bus.subscribe(self.events.append)
        # with the spare on top it fits the next time, too
        self.weighs = WORKER_BYTES * 9 // 10
        self.budget = MemoryBudget({HOST: capacity}, {HOST: most})
        self.room: dict[str, int] = {}
        self.manager = Manager(
            Repository(folder / "models"),
            self.supervisor,
            bus,
            config=RepositoryConfig(),
            workers=WorkersConfig(),
            drain_timeout_s=5.0,
            memory=ModelMemory(
                self.budget,
                bus,
                peaks=folder / "peaks.json",
                measure=lambda pids: {HOST: self.weighs * len(list(pids))},
                room=lambda since_s: self.room,
                taken=lambda pids: {HOST: self.weighs * len(list(pids))},
            ),
        )

    async def load(self, name: str) -> None:
        await self.manager.load(ModelName(name))

    def state(self, name: str) -> tuple[str, str]:
        return next((e.state, e.reason) for e in self.manager.index(ready_only=False) if e.name == name)

    async def ready(self, name: str) -> None:
        model = self.manager.models[ModelName(name)]
        async with asyncio.timeout(20):
            while not model.ready:
                model.changed.clear()
                await model.changed.wait()

    async def looked(self) -> None:
        """Until what waits was looked at, and does not fit."""
        assert self.manager._waiting is not None
        async with asyncio.timeout(20):
            while self.manager._room.is_set() and not self.manager._waiting.done():  # noqa: ASYNC110  its own flag
                await asyncio.sleep(0)

    def told(self, topic: str) -> list[str]:
        return [str(event.data.get("model", event.data.get("owner"))) for event in self.events if event.topic == topic]


@asynccontextmanager
async def crowd_of(folder: Path, capacity: int = WORKER_BYTES + MIB, most: int = 0) -> AsyncIterator[Crowd]:
    made = Crowd(folder, capacity, most, first=False, second=False, third=True)
    try:
        yield made
    finally:
        await made.manager.close(1.0)
        made.supervisor.close()
    assert made.budget.held == ()


@pytest.fixture
async def crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Crowd]:
    monkeypatch.setattr("appliance.lifecycle.model_version.MEMORY_PAUSE_S", 0.01)
    async with crowd_of(tmp_path) as made:
        yield made


async def test_a_version_that_did_not_fit_is_loaded_when_memory_is_given_back(crowd: Crowd) -> None:
    await crowd.load("first")
    with pytest.raises(ApplianceError, match="it is loaded as soon as there is room") as refused:
        await crowd.load("second")
    assert refused.value.code is ErrorCode.UNAVAILABLE
    state, reason = crowd.state("second")
    assert state == "UNAVAILABLE"
    assert re.match(r"waits for memory: needs 0\.1 GB on host, .* free: unload first/1@", reason)
    await crowd.looked()
    assert crowd.told("memory.retried") == []
    await crowd.manager.unload(ModelName("first"))
    await crowd.ready("second")
    assert crowd.state("second") == ("READY", "")
    assert crowd.told("memory.retried") == ["second"]


async def test_a_measured_drop_is_memory_given_back_too(tmp_path: Path) -> None:
    async with crowd_of(tmp_path, 2 * WORKER_BYTES) as crowd:
        # the second one is loaded while the first one is booked with more than it will turn out to take
        crowd.weighs = WORKER_BYTES // 2
        await crowd.load("first")
        crowd.budget.correct(crowd.budget.held[0].owner, {HOST: 2 * WORKER_BYTES})
        with pytest.raises(ApplianceError, match="waits for memory"):
            await crowd.load("second")
        await crowd.looked()
        version = crowd.manager.resolve(ModelName("first"), Version(""))
        assert crowd.manager.memory is not None
        crowd.manager.memory.measured(version.owner, "first", [1])
        await crowd.ready("second")


async def test_memory_that_other_programs_give_back_is_noticed_without_a_word_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.lifecycle.model_version.MEMORY_PAUSE_S", 0.01)
    monkeypatch.setattr("appliance.lifecycle.manager.LOOK_AGAIN_S", 0.01)
    async with crowd_of(tmp_path, MIB, 10 * WORKER_BYTES) as crowd:
        with pytest.raises(
            ApplianceError, match="other programs hold more than they leave: end some, and it is loaded"
        ):
            await crowd.load("first")
        await crowd.looked()
        assert crowd.told("memory.retried") == []
        crowd.room = {HOST: 2 * WORKER_BYTES}
        await crowd.ready("first")
        crowd.room = {HOST: WORKER_BYTES + MIB}
        await crowd.load("second")
        crowd.room = {HOST: MIB}
        with pytest.raises(ApplianceError, match="waits for memory"):
            await crowd.load("third")


async def test_a_try_of_its_own_accord_unloads_nobody(crowd: Crowd) -> None:
    await crowd.load("first")
    with pytest.raises(ApplianceError):
        await crowd.load("second")
    await crowd.manager.unload(ModelName("second"))
    await crowd.manager.unload(ModelName("first"))
    await crowd.load("third")
    crowd.manager.resolve(ModelName("third"), Version("")).statistics.last_inference_ms = 1
    assert crowd.told("memory.evicted") == []
    await crowd.load("second")  # somebody asks: the idle one that may go makes room
    assert crowd.told("memory.evicted")
    with pytest.raises(ApplianceError):
        await crowd.load("first")
    assert crowd.state("first")[1].startswith("waits for memory")
    crowd.manager._memory_freed()
    await crowd.looked()
    assert crowd.told("memory.retried") == [], "it does not fit, so nothing was tried"


async def test_what_is_unloaded_waits_no_longer(crowd: Crowd) -> None:
    await crowd.load("first")
    with pytest.raises(ApplianceError):
        await crowd.load("second")
    await crowd.manager.unload(ModelName("second"))
    await crowd.manager.unload(ModelName("first"))
    await crowd.looked()
    assert crowd.told("memory.retried") == []
    assert crowd.state("second")[0] == "UNAVAILABLE"


async def test_what_never_fits_does_not_wait(tmp_path: Path) -> None:
    async with crowd_of(tmp_path, MIB) as crowd:
        with pytest.raises(ApplianceError, match="more than the 1 MB that may be used there at all") as refused:
            await crowd.load("first")
        assert refused.value.code is ErrorCode.INVALID_ARGUMENT
        assert crowd.state("first")[1].startswith("it does not fit into memory")


async def test_an_engine_that_found_no_memory_is_tried_again_each_time_later(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = crowd.supervisor.open_instance, 0

    async def short(*arguments: Any) -> Instance:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise NoRoomError(ErrorCode.UNAVAILABLE, "CUDA failure 2: out of memory")
        return await real(*arguments)

    monkeypatch.setattr(crowd.supervisor, "open_instance", short)
    with pytest.raises(ApplianceError, match="waits for memory: CUDA failure 2: out of memory"):
        await crowd.load("first")
    await crowd.ready("first")
    assert (tries, crowd.told("memory.retried")) == (4, ["first"] * 3)
    reasons = [event.data["tries"] for event in crowd.events if event.topic == "memory.retried"]
    assert reasons == [1, 2, 3]


async def test_two_workers_that_are_opened_at_once_are_both_ended_by_an_unload(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recycling beside a replacement."""
    await crowd.load("first")
    version = crowd.manager.resolve(ModelName("first"), Version(""))
    opening, ended = asyncio.Semaphore(0), []

    async def never(*arguments: Any) -> Instance:
        opening.release()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(arguments[0])
        raise AssertionError("nobody sets it")

    monkeypatch.setattr(crowd.supervisor, "open_instance", never)
    assert version.scheduler is not None
    [instance] = version.scheduler.instances.values()
    recycling = asyncio.create_task(version.recycle(instance, "it leaks"))
    await opening.acquire()
    version._own(version._replace(1, 0.0), "replace")
    await opening.acquire()
    assert len(version._opening) == 2
    [replacing] = version._tasks
    await crowd.manager.unload(ModelName("first"))
    with pytest.raises(ApplianceError, match="it was unloaded while it was loaded"):
        await asyncio.wait_for(recycling, 5)
    await asyncio.wait([replacing], timeout=5)
    assert replacing.cancelled()
    assert (ended, version._opening) == (["first:1"] * 2, set())


async def test_what_a_gpu_without_memory_of_its_own_needs_is_booked_on_the_host(tmp_path: Path) -> None:
    budget = MemoryBudget({HOST: WORKER_BYTES + 30 * MIB})
    peaks = tmp_path / "peaks.json"
    memory = ModelMemory(budget, EventBus(), peaks=peaks, integrated=frozenset({"gpu:0"}))
    await memory.reserve("a", "a", device="gpu:0", file_bytes=10 * MIB, instances=1, evictable=False)
    assert [held.bytes_by_device for held in budget.held] == [{HOST: WORKER_BYTES + 20 * MIB}]
    with pytest.raises(ApplianceError, match="on host"):
        await memory.reserve("b", "b", device="gpu:0", file_bytes=10 * MIB, instances=1, evictable=False)
