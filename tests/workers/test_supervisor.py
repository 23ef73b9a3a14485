"""Real worker processes: started from the template, fed through sealed memory, ended, and mourned exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from appliance.core.admission import Admission
from appliance.core.errors import ApplianceError
from appliance.core.manifest import OnnxRuntimeManifest, WorkerManifest
from appliance.core.request import InferenceRequest, ModelName
from appliance.core.tensor import DataType, Tensor
from appliance.engines.base import EngineOptions
from appliance.workers import arena
from appliance.workers.link import Instance, WorkerLink
from appliance.workers.messages import Done
from appliance.workers.supervisor import Supervisor

MANIFEST = WorkerManifest(busy_poll_us=0)


def options(**parameters: str) -> EngineOptions:
    return EngineOptions("loopback", "", "cpu", 4, 1, OnnxRuntimeManifest(), parameters)


class Owner:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.more = asyncio.Event()

    def batch_done(self, instance: Instance, message: Done, memory: memoryview) -> None:
        assert instance.layout is not None
        base = instance.layout.output_base
        self.heard.append(("done", bytes(memory[base : base + 16])))

    def slot_freed(self, instance: Instance) -> None:
        self.more.set()

    def batch_failed(self, instance: Instance, batch: int, message: str) -> None:
        self.heard.append(("failed", message))

    def worker_lost(self, instance: Instance, reason: str) -> None:
        self.heard.append(("lost", reason))
        self.more.set()

    async def next(self) -> tuple[str, Any]:
        async with asyncio.timeout(30):
            await self.more.wait()
        self.more.clear()
        return self.heard[-1]


def run(instance: Instance, batch: int, command: str | None = None) -> None:
    assert instance.layout is not None
    tensors = [Tensor("data", DataType.FP32, (1, 4), bytes(range(16)))]
    if command is not None:
        text = command.encode()
        tensors.append(Tensor("command", DataType.BYTES, (1, 1), len(text).to_bytes(4, "little") + text))
    fitted = Admission(instance.layout).fit(InferenceRequest(ModelName("m"), tuple(tensors)))
    instance.dispatch(batch, [fitted], 1, time.monotonic())


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    lost: list[WorkerLink] = []
    made = Supervisor(max_arena_bytes=1 << 24, on_worker_lost=lambda link, reason: lost.append(link))
    made.start()
    made.watch()
    yield made
    made.close()
    assert psutil.Process().children(recursive=True) == []


async def test_a_batch_goes_through_shared_memory_and_back(supervisor: Supervisor) -> None:
    instance = await supervisor.open_instance("m:1", options(shape="4"), MANIFEST)
    owner = instance.owner = Owner()
    for batch in range(3):
        run(instance, batch)
        assert await owner.next() == ("done", bytes(range(16)))
    assert instance.batches == 3
    assert set(instance.batch_s) == {1, 2, 4}


async def test_a_death_is_reported_once_with_its_signal(supervisor: Supervisor) -> None:
    instance = await supervisor.open_instance("m:1", options(shape="4"), MANIFEST)
    owner = instance.owner = Owner()
    os.kill(instance.link.pid, signal.SIGKILL)
    assert await owner.next() == ("lost", "its worker was ended by SIGKILL")
    assert supervisor.links == []
    assert len(owner.heard) == 1


async def test_an_answer_sent_before_the_death_still_counts(supervisor: Supervisor) -> None:
    instance = await supervisor.open_instance("m:1", options(shape="4", commands="true"), MANIFEST)
    owner = instance.owner = Owner()
    run(instance, 1, "")
    run(instance, 2, "exit 3")
    async with asyncio.timeout(30):
        while len(owner.heard) < 2:
            await owner.next()
    assert [word for word, _ in owner.heard] == ["done", "lost"]
    assert owner.heard[1][1] == "its worker exited with status 3"


async def test_a_refused_batch_leaves_the_worker_alive(supervisor: Supervisor) -> None:
    instance = await supervisor.open_instance("m:1", options(shape="4", commands="true"), MANIFEST)
    owner = instance.owner = Owner()
    run(instance, 1, "fail")
    assert await owner.next() == ("failed", "loopback was told to fail")
    run(instance, 2, "")
    assert (await owner.next())[0] == "done"


@pytest.mark.parametrize(
    ("how", "words"),
    [("fail", "told to fail"), ("crash", "SIGSEGV"), ("exit", "status 1"), ("hang", "longer than 0.3 s")],
)
async def test_what_cannot_be_loaded_is_unavailable_with_its_reason_and_leaves_no_process(
    supervisor: Supervisor, how: str, words: str
) -> None:
    with pytest.raises(ApplianceError, match=words):
        await supervisor.open_instance("m:1", options(load=how), WorkerManifest(load_budget_ms=300))
    psutil.wait_procs(psutil.Process(supervisor.template_pid).children(), timeout=30)
    assert psutil.Process(supervisor.template_pid).children() == []


async def test_a_load_cancelled_while_its_worker_is_forked_leaves_no_process(supervisor: Supervisor) -> None:
    opening = asyncio.create_task(supervisor.open_instance("m:1", options(load="hang"), MANIFEST))
    await asyncio.sleep(0)  # the template has been asked; its answer can only be read after this turn of the loop
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    # forked one after the other: when the second answers, the first has been there
    second = await supervisor.open_instance("n:1", options(shape="4"), MANIFEST)
    process = psutil.Process(second.link.pid)
    others = [child for child in psutil.Process(supervisor.template_pid).children() if child != process]
    assert psutil.wait_procs(others, timeout=30)[1] == []


async def test_unloading_the_last_model_ends_the_process(supervisor: Supervisor) -> None:
    manifest = WorkerManifest(isolation="device", busy_poll_us=0)
    first = await supervisor.open_instance("a:1", options(shape="4"), manifest)
    second = await supervisor.open_instance("b:1", options(shape="4"), manifest)
    assert first.link is second.link
    process = psutil.Process(first.link.pid)
    supervisor.close_instance(first)
    owner = second.owner = Owner()
    run(second, 1)
    assert (await owner.next())[0] == "done"
    supervisor.close_instance(second)
    assert psutil.wait_procs([process], timeout=30)[1] == []


async def test_a_template_that_dies_is_replaced(supervisor: Supervisor) -> None:
    instance = await supervisor.open_instance("m:1", options(shape="4"), MANIFEST)
    owner = instance.owner = Owner()
    os.kill(supervisor.template_pid, signal.SIGKILL)
    assert (await owner.next())[0] == "lost", "its workers die with it"
    again = await supervisor.open_instance("m:1", options(shape="4"), MANIFEST)
    assert supervisor.template_restarts == 1
    owner = again.owner = Owner()
    run(again, 1)
    assert (await owner.next())[0] == "done"


def test_memory_that_could_be_shrunk_is_not_mapped() -> None:
    descriptor = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, 100)
        with pytest.raises(ValueError, match="not sealed"):
            arena.Mapping(descriptor)
    finally:
        os.close(descriptor)


def test_a_sealed_memory_cannot_be_resized_and_is_not_read_beyond_its_end() -> None:
    descriptor = arena.create("sealed", 100)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 50)
        mapping = arena.Mapping(descriptor)
        for offset, nbytes in ((0, 101), (100, 1), (-1, 1), (0, -1), (1 << 62, 1 << 62)):
            with pytest.raises(ValueError, match="leaves the memory"):
                mapping.slice(offset, nbytes)
        assert len(mapping.slice(40, 60)) == 60
        mapping.close()
    finally:
        os.close(descriptor)
