"""The ledger's shell: it measures, keeps what it measured, evicts and refuses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from appliance.config import RepositoryConfig, WorkersConfig
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.memory_budget import HOST, MIB, WORKER_BYTES, MemoryBudget
from appliance.core.request import ModelName, Version
from appliance.lifecycle.manager import Manager
from appliance.lifecycle.memory import ModelMemory, resident_bytes
from appliance.lifecycle.repository import Repository
from appliance.observability.events import Event, EventBus
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
        with pytest.raises(ApplianceError, match=r"does not fit into memory: it needs .* free: unload second/1@"):
            await manager.load(ModelName("third"))
        await manager.unload(ModelName("second"))
        assert budget.held == ()
        await manager.load(ModelName("first"))
        assert manager.resolve(ModelName("first"), Version("")).answering
    finally:
        await manager.close(1.0)
        supervisor.close()
    assert budget.held == ()


async def test_what_a_gpu_without_memory_of_its_own_needs_is_booked_on_the_host(tmp_path: Path) -> None:
    budget = MemoryBudget({HOST: WORKER_BYTES + 30 * MIB})
    peaks = tmp_path / "peaks.json"
    memory = ModelMemory(budget, EventBus(), peaks=peaks, integrated=frozenset({"gpu:0"}))
    await memory.reserve("a", "a", device="gpu:0", file_bytes=10 * MIB, instances=1, evictable=False)
    assert [held.bytes_by_device for held in budget.held] == [{HOST: WORKER_BYTES + 20 * MIB}]
    with pytest.raises(ApplianceError, match="on host"):
        await memory.reserve("b", "b", device="gpu:0", file_bytes=10 * MIB, instances=1, evictable=False)
