"""A kept engine that does not load here any more, or whose worker dies, never ends in a dead line: the model serves as it is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import msgspec
import pytest

from appliance.config import RepositoryConfig, WorkersConfig
from appliance.core.errors import ApplianceError
from appliance.core.memory_budget import HOST, MIB, WORKER_BYTES, MemoryBudget, Need
from appliance.core.request import ModelName, Version
from appliance.core.states import ModelState
from appliance.lifecycle.compiler import Artifact
from appliance.lifecycle.manager import Manager
from appliance.lifecycle.memory import ModelMemory
from appliance.lifecycle.repository import Repository
from appliance.observability.events import Event, EventBus
from appliance.workers.supervisor import Supervisor
from tests.fakes.compiler import FakeCompiler

ECHO = ModelName("echo")
GOOD = Artifact("loopback", "", "good", "better", verified=True)
STALE = Artifact("onnxruntime", "/nowhere/model.plan", "stale", "better", verified=True)
"""An engine whose file the library does not take."""


def weigh(pids: Iterable[int]) -> dict[str, int]:
    return {HOST: WORKER_BYTES * len(list(pids))}


class Box:
    """A manager with one loopback model, and what it published."""

    def __init__(
        self, folder: Path, compiler: FakeCompiler, memory: MemoryBudget | None = None, instances: int = 1
    ) -> None:
        self.folder = folder
        (folder / "echo" / "1").mkdir(parents=True)
        (folder / "echo" / "model.toml").write_text(
            f'engine = "loopback"\n[worker]\ninstances = {instances}\n[parameters]\nshape = "4"\n'
        )
        self.events = EventBus()
        self.supervisor = Supervisor(max_arena_bytes=1 << 24, on_worker_lost=lambda _link, _reason: None)
        self.compiler = compiler
        self.manager = Manager(
            Repository(folder),
            self.supervisor,
            self.events,
            config=RepositoryConfig(path=str(folder)),
            workers=WorkersConfig(crash_limit=1),
            drain_timeout_s=5,
            compiler=compiler,
            memory=ModelMemory(memory, self.events, peaks=folder.parent / "peaks.json", measure=weigh)
            if memory
            else None,
        )

    async def until(self, true: Callable[[], bool]) -> None:
        """Until it is so after some event."""
        changed = asyncio.Event()

        def heard(_event: Event) -> None:
            changed.set()

        end = self.events.subscribe(heard)
        try:
            async with asyncio.timeout(30):
                while not true():
                    await changed.wait()
                    changed.clear()
                    # what follows from the event is done by tasks
                    await asyncio.sleep(0)
        finally:
            end()

    @property
    def serving(self) -> str:
        """The engine that answers: its label, "as it is", or nothing."""
        model = self.manager.models.get(ECHO)
        if model is None or model.newest is None:
            return ""
        artifact = model.newest.artifact
        return artifact.key if artifact is not None else "as it is"

    @property
    def reason(self) -> str:
        return self.manager.index(ready_only=False)[0].reason


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Box]]:
    boxes: list[Box] = []

    def made(compiler: FakeCompiler, memory: MemoryBudget | None = None, instances: int = 1) -> Box:
        boxes.append(Box(tmp_path / "models", compiler, memory, instances))
        boxes[-1].supervisor.start()
        boxes[-1].supervisor.watch()
        return boxes[-1]

    yield made
    for box in boxes:
        await box.manager.close(1)
        box.supervisor.close()


async def test_an_engine_that_does_not_load_any_more_is_discarded_and_made_anew_while_the_model_serves(
    make: Callable[..., Box],
) -> None:
    box = make(FakeCompiler(STALE, made=GOOD))
    await box.manager.load(ECHO)
    assert box.serving == "as it is"
    assert [key for key, _ in box.compiler.discarded] == ["stale"]
    await box.until(lambda: "BUILDING" in box.reason)
    box.compiler.release.set()
    await box.until(lambda: box.serving == "good")
    assert box.compiler.builds == 1


async def test_where_it_cannot_be_made_anew_the_model_goes_on_as_it_is_and_says_why(
    make: Callable[..., Box],
) -> None:
    box = make(FakeCompiler(STALE, made="there is no GPU"))
    box.compiler.release.set()
    await box.manager.load(ECHO)
    await box.until(lambda: "FAILED" in box.reason)
    assert box.serving == "as it is"
    assert box.reason == "better: FAILED there is no GPU"


async def test_an_engine_whose_worker_keeps_dying_is_replaced_by_the_model_as_it_is(
    make: Callable[..., Box],
) -> None:
    box = make(FakeCompiler(GOOD))
    await box.manager.load(ECHO)
    assert box.serving == "good"
    generation = box.manager.resolve(ECHO, Version("1"))
    generation._quarantine("SIGSEGV")
    await box.until(lambda: box.serving == "as it is")
    # its file is good: it is kept, shown with its reason, and not built in a circle
    assert "better: FAILED quarantined" in box.reason
    assert (box.compiler.discarded, box.compiler.builds) == ([], 0)
    assert [entry.state for entry in box.manager.index(ready_only=False)] == ["READY"]


@pytest.mark.parametrize("instances", [1, 2])
async def test_an_engine_that_was_altered_while_it_served_is_not_loaded_for_a_worker_that_died_and_is_made_anew(
    make: Callable[..., Box], instances: int
) -> None:
    box = make(FakeCompiler(GOOD, made=msgspec.structs.replace(GOOD, key="anew")), instances=instances)
    await box.manager.load(ECHO)
    before = box.manager.resolve(ECHO, Version("1"))
    box.compiler.altered.add(GOOD.key)
    os.kill(before.workers()[0].pid, signal.SIGKILL)
    await box.until(lambda: box.serving == "as it is")
    assert before.restarts == 0
    assert "altered since it was made" in before.reason
    assert [key for key, _ in box.compiler.discarded] == [GOOD.key]
    box.compiler.release.set()
    await box.until(lambda: box.serving == "anew")


async def test_an_engine_that_was_altered_is_not_loaded_when_a_worker_is_recycled_and_the_old_worker_goes_on(
    make: Callable[..., Box],
) -> None:
    box = make(FakeCompiler(GOOD))
    await box.manager.load(ECHO)
    generation = box.manager.resolve(ECHO, Version("1"))
    pids = [worker.pid for worker in generation.workers()]
    box.compiler.altered.add(GOOD.key)
    assert generation.scheduler is not None
    with pytest.raises(ApplianceError, match="altered since it was made"):
        await generation.recycle(next(iter(generation.scheduler.instances.values())), "a leak")
    assert box.serving == GOOD.key
    assert [worker.pid for worker in generation.workers()] == pids


async def test_an_engine_that_was_built_and_does_not_load_is_discarded_and_nothing_changes(
    make: Callable[..., Box],
) -> None:
    box = make(FakeCompiler(None, made=STALE))
    await box.manager.load(ECHO)
    box.compiler.release.set()
    await box.until(lambda: "FAILED" in box.reason and bool(box.compiler.discarded))
    assert box.serving == "as it is"
    assert box.manager.models[ECHO].generations[next(iter(box.manager.models[ECHO].aspired))].state is ModelState.READY


async def test_an_engine_that_was_built_and_finds_no_memory_beside_what_serves_waits_for_it_and_then_serves(
    make: Callable[..., Box], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.lifecycle.builds.LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr("appliance.lifecycle.model_version.MEMORY_PAUSE_S", 0.01)
    memory = MemoryBudget({HOST: 2 * WORKER_BYTES + MIB})
    memory.reserve("somebody else", Need({HOST: WORKER_BYTES}))
    box = make(FakeCompiler(None, made=GOOD), memory)
    await box.manager.load(ECHO)
    box.compiler.release.set()
    await box.until(lambda: "waits for memory" in box.reason)
    assert box.serving == "as it is"
    memory.release("somebody else")
    await box.until(lambda: box.serving == "good")
    assert (box.compiler.builds, box.compiler.discarded) == (1, [])
    assert [held.owner.partition("/")[0] for held in memory.held] == ["echo"]


async def test_an_engine_that_waits_for_memory_waits_no_longer_when_its_model_is_unloaded(
    make: Callable[..., Box],
) -> None:
    memory = MemoryBudget({HOST: WORKER_BYTES + MIB})
    box = make(FakeCompiler(None, made=GOOD), memory)
    await box.manager.load(ECHO)
    box.compiler.release.set()
    # it could never fit beside the other, but would alone
    await box.until(lambda: "waits for memory" in box.reason)
    await box.manager.unload(ECHO)
    assert (memory.held, box.serving) == ((), "")


async def test_an_engine_that_was_replaced_or_unloaded_is_not_in_use_any_more(make: Callable[..., Box]) -> None:
    box = make(FakeCompiler(GOOD, made=msgspec.structs.replace(GOOD, key="anew")))
    box.compiler.release.set()
    await box.manager.load(ECHO)
    assert box.manager._engines_in_use() == {"good"}
    box.compiler.kept = None
    manifest = box.folder / "echo" / "model.toml"
    manifest.write_text(f'description = "other"\n{manifest.read_text()}')
    await box.manager.load(ECHO)
    await asyncio.gather(*box.manager.models[ECHO].builds)
    assert (box.serving, box.compiler.pruned) == ("anew", [frozenset({"anew"})])
    await box.manager.unload(ECHO)
    assert box.manager._engines_in_use() == frozenset()


async def test_an_engine_that_was_evicted_is_not_in_use_any_more(make: Callable[..., Box]) -> None:
    box = make(FakeCompiler(GOOD))
    await box.manager.load(ECHO)
    await box.manager._evict(box.manager.resolve(ECHO, Version("1")).owner, "another")
    assert box.manager._engines_in_use() == frozenset()


async def test_an_engine_that_was_found_is_in_use_before_it_is_loaded(make: Callable[..., Box]) -> None:
    box = make(FakeCompiler(GOOD))
    folder = box.manager._repository.read(ECHO)
    assert folder is not None
    model = box.manager._model(ECHO)
    await box.manager._builds.find(model, folder)
    assert box.manager._engines_in_use() == {"good"}
