"""A worker process that runs a plan, over the stub driver and the fake runtime: memory, graphs, and a sticky error for real."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from appliance.core.admission import Admission
from appliance.core.errors import ApplianceError
from appliance.core.manifest import OnnxRuntimeManifest
from appliance.core.request import InferenceRequest, ModelName
from appliance.core.tensor import DataType, Tensor
from appliance.engines.base import EngineOptions
from appliance.workers.link import Instance, LoadRefusedError
from appliance.workers.supervisor import Supervisor
from tests.fakes import cuda_stub
from tests.workers.test_supervisor import MANIFEST, Owner


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stub's folder, in the environment of every process that is started from here."""
    folder = cuda_stub.build(tmp_path / "stub")
    for name, value in cuda_stub.environment(folder).items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
async def supervisor(stub: Path) -> AsyncIterator[Supervisor]:
    made = Supervisor(max_arena_bytes=1 << 24, on_worker_lost=lambda link, reason: None)
    made.start()
    made.watch()
    yield made
    made.close()
    assert psutil.Process().children(recursive=True) == []


def options(file: str) -> EngineOptions:
    return EngineOptions("tensorrt", file, "cuda", 0, 1, OnnxRuntimeManifest(), {})


def run(instance: Instance, batch: int, rows: np.ndarray) -> None:  # type: ignore[type-arg]
    assert instance.layout is not None
    data = Tensor("data", DataType.FP32, rows.shape, rows.tobytes())
    fitted = Admission(instance.layout).fit(InferenceRequest(ModelName("m"), (data,)))
    instance.dispatch(batch, [fitted], len(rows), time.monotonic())


async def test_a_plan_is_warmed_up_with_graphs_and_runs_from_pinned_memory(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    file = cuda_stub.plan(tmp_path / "m.plan", op="affine")
    instance = await supervisor.open_instance("m:1", options(file), MANIFEST)
    assert instance.traits.provider == "TensorRT 11.4.0"
    assert instance.traits.details["host_memory"] == "pinned"
    sizes = len(instance.batch_s)
    assert instance.traits.details["cuda_graphs"] == f"{sizes} captured, 0 refused", "one for each size of the warm-up"
    owner = instance.owner = Owner()
    for batch in range(6):
        row = np.full((1, 4), batch, np.float32)
        run(instance, batch, row)
        assert await owner.next() == ("done", (2 * row + 1).tobytes())


async def test_a_sticky_error_ends_the_worker_with_the_driver_s_words_and_the_next_one_works(
    supervisor: Supervisor, stub: Path, tmp_path: Path
) -> None:
    file = cuda_stub.plan(tmp_path / "m.plan", op="affine")
    row = np.ones((1, 4), np.float32)
    instance = await supervisor.open_instance("m:1", options(file), MANIFEST)
    owner = instance.owner = Owner()
    process = psutil.Process(instance.link.pid)
    (stub / "failures").write_text("cuStreamSynchronize=700@1")
    run(instance, 1, row)
    word, reason = await owner.next()
    assert word == "lost"
    assert "cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700)" in reason
    psutil.wait_procs([process], timeout=30)
    assert not process.is_running(), "it did not leave the device"
    (stub / "failures").write_text("")
    again = await supervisor.open_instance("m:1", options(file), MANIFEST)
    owner = again.owner = Owner()
    run(again, 1, row)
    assert await owner.next() == ("done", (2 * row + 1).tobytes())


async def test_no_memory_for_a_batch_fails_that_batch_alone(supervisor: Supervisor, stub: Path, tmp_path: Path) -> None:
    file = cuda_stub.plan(tmp_path / "m.plan", op="affine")
    row = np.ones((1, 4), np.float32)
    instance = await supervisor.open_instance("m:1", options(file), MANIFEST)
    owner = instance.owner = Owner()
    (stub / "failures").write_text("cuMemcpyHtoDAsync_v2=2@1")
    run(instance, 1, row)
    word, reason = await owner.next()
    assert (word, "OUT_OF_MEMORY" in reason) == ("failed", True)
    run(instance, 2, row)
    assert (await owner.next())[0] == "done"


@pytest.mark.parametrize("rule", ["cuMemAlloc_v2=2@1", "cuMemAlloc_v2=2@2", "cuStreamCreate=2"])
async def test_no_memory_for_a_load_is_told_apart_from_a_plan_that_does_not_fit(
    supervisor: Supervisor, stub: Path, tmp_path: Path, rule: str
) -> None:
    file = cuda_stub.plan(tmp_path / "m.plan", op="affine")
    (stub / "failures").write_text(rule)
    with pytest.raises(ApplianceError, match="OUT_OF_MEMORY") as caught:
        await supervisor.open_instance("m:1", options(file), MANIFEST)
    assert not isinstance(caught.value, LoadRefusedError)
    (stub / "failures").write_text("")
    assert (await supervisor.open_instance("m:1", options(file), MANIFEST)).batch_s
    (tmp_path / "other.plan").write_bytes(b"of another version")
    with pytest.raises(LoadRefusedError, match="have it built anew"):
        await supervisor.open_instance("m:1", options(str(tmp_path / "other.plan")), MANIFEST)


async def test_a_library_that_is_gone_says_nothing_against_the_plan(supervisor: Supervisor, tmp_path: Path) -> None:
    file = cuda_stub.plan(tmp_path / "m.plan", op="affine")
    missing = msgspec.structs.replace(options(file), device="cuda:7")
    with pytest.raises(ApplianceError, match="there is no cuda:7") as caught:
        await supervisor.open_instance("m:1", missing, MANIFEST)
    assert not isinstance(caught.value, LoadRefusedError)


async def test_where_memory_ends_in_the_warm_up_batches_stay_that_small(
    supervisor: Supervisor, stub: Path, tmp_path: Path
) -> None:
    file = cuda_stub.plan(tmp_path / "m.plan", op="affine", no_room_for=16)
    instance = await supervisor.open_instance("m:1", options(file), MANIFEST)
    assert instance.traits.batched
    assert sorted(instance.batch_s) == [1, 2, 4, 8]


async def test_outputs_that_do_not_follow_the_batch_are_served_unbatched_from_a_second_arena(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    tensors = [cuda_stub.tensor("data", (-1, 4)), cuda_stub.tensor("result", (1, 4), "output")]
    file = cuda_stub.plan(tmp_path / "m.plan", tensors=tensors, profiles=[{"data": [[1, 4], [1, 4], [1, 4]]}])
    instance = await supervisor.open_instance("m:1", options(file), MANIFEST)
    assert not instance.traits.batched
    owner = instance.owner = Owner()
    row = np.arange(4, dtype=np.float32).reshape(1, 4)
    run(instance, 1, row)
    assert await owner.next() == ("done", row.tobytes())
