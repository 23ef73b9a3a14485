"""What a plan computes, where its memory lies, which profile it runs under, and how each kind of failure ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.manifest import OnnxRuntimeManifest
from appliance.core.tensor import DataType
from appliance.engines import cuda, registry
from appliance.engines import tensorrt_library as library
from appliance.engines.base import (
    DeviceFaultError,
    Engine,
    EngineBatch,
    EngineError,
    EngineOptions,
    EngineTensor,
    MissingError,
    OutOfMemoryError,
    OutputMismatchError,
)
from tests.engines.over_stub.conftest import Load
from tests.fakes import tensorrt_runtime as runtime
from tests.fakes.cuda_stub import Stub, tensor

KINDS = {"float32": DataType.FP32, "int64": DataType.INT64, "int32": DataType.INT32, "uint16": DataType.BF16}

AFFINE: dict[str, Any] = {"op": "affine"}
WIDE: dict[str, Any] = {
    "op": "affine",
    "tensors": [tensor("data", (-1, -1)), tensor("result", (-1, -1), "output")],
    "profiles": [{"data": [[1, 1], [1, 4], [4, 8]]}, {"data": [[8, 1], [8, 4], [16, 64]]}],
}
NONZERO: dict[str, Any] = {
    "op": "nonzero",
    "tensors": [
        tensor("data", (-1,)),
        tensor("found", (1, -1), "output", dtype="INT64", data_dependent=True),
        tensor("same", (-1,), "output"),
    ],
    "profiles": [{"data": [[1], [8], [1000]]}],
}
RESHAPE: dict[str, Any] = {
    "op": "reshape",
    "tensors": [
        tensor("data", (-1, 4)),
        tensor("shape", (2,), dtype="INT32", location="HOST"),
        tensor("result", (-1, -1), "output"),
    ],
    "profiles": [{"data": [[1, 4], [2, 4], [4, 4]], "shape.values": [[1, 1], [4, 2], [4, 4]]}],
}


def place(name: str, array: np.ndarray[Any, Any]) -> EngineTensor:
    view = memoryview(array).cast("B") if array.size else memoryview(b"")
    return EngineTensor(name, KINDS[array.dtype.name], array.shape, view, array.__array_interface__["data"][0])


class Slot:
    """Memory of a worker: an input and an output at fixed places."""

    def __init__(self, rows: int, columns: int = 4) -> None:
        self.source = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
        self.target = np.zeros_like(self.source)
        self.batch = EngineBatch(object(), rows, (place("data", self.source),), (place("result", self.target),))

    def check(self, engine: Engine, factor: float = 1.0) -> None:
        self.source += 1
        self.target[:] = -1
        assert engine.run(self.batch) is None
        np.testing.assert_array_equal(self.target, self.source * factor + (factor - 1))


def test_a_plan_says_what_it_takes_and_where_it_runs(load: Load) -> None:
    traits = load(**AFFINE).traits
    assert (traits.platform, traits.backend, traits.provider) == ("tensorrt_plan", "tensorrt", "TensorRT 11.4.0")
    assert traits.inputs[0].shape == traits.outputs[0].shape == (-1, 4)
    assert (traits.batched, traits.max_batch_size) == (True, 32)
    assert traits.details["device"] == "cuda:0 Stub GPU, compute capability 8.9"
    assert traits.device == "cuda:0"
    assert traits.details["profiles"] == "data [1, 4] to [32, 4]"
    assert load(max_batch_size=8, **AFFINE).traits.max_batch_size == 8
    assert load(max_batch_size=64, **AFFINE).traits.max_batch_size == 32, "no profile holds more"
    assert not library.trt.Runtime(library.Messages().logger).engine_host_code_allowed


def test_batches_of_every_size_come_back_again_and_again(load: Load) -> None:
    engine = load(**AFFINE)
    slots = [Slot(rows) for rows in (1, 2, 7, 32)]
    for _ in range(4):
        for slot in slots:
            slot.check(engine, 2)


def test_a_shape_that_comes_again_is_recorded_once_and_launched_from_then_on(load: Load, stub: Stub) -> None:
    engine = load(**AFFINE)
    slot = Slot(3)
    for _ in range(5):
        slot.check(engine, 2)
    assert engine.traits.details["cuda_graphs"] == "1 captured, 0 refused"
    # runs 1 and 2 were queued by the library, and recorded once more; 3, 4 and 5 launch the graph
    assert (stub.count("captures"), stub.count("graph_launches"), stub.count("executables")) == (1, 3, 1)
    other = Slot(3)
    other.check(engine, 2)
    assert stub.count("captures") == 1, "the other slot of the arena takes the same graph"


def test_graphs_can_be_switched_off(load: Load, stub: Stub) -> None:
    engine = load(parameters={"cuda_graphs": "false"}, **AFFINE)
    slot = Slot(3)
    for _ in range(5):
        slot.check(engine, 2)
    assert stub.count("captures") == 0
    assert engine.traits.details["cuda_graphs"] == "off"


def test_no_more_graphs_are_kept_than_their_limit_and_results_stay_right(load: Load, stub: Stub) -> None:
    engine = load(**(WIDE | {"profiles": [{"data": [[1, 1], [1, 4], [4, 64]]}]}))
    slots = [Slot(1, columns) for columns in range(1, 51)]
    for _ in range(3):
        for slot in slots:
            slot.check(engine, 2)
    assert stub.count("captures") > stub.count("executables") == 32
    for slot in slots:
        slot.check(engine, 2)


def test_a_run_over_known_places_asks_the_library_for_nothing_but_to_run(load: Load, stub: Stub) -> None:
    engine = load(parameters={"cuda_graphs": "false"}, **AFFINE)
    slot = Slot(3)
    slot.check(engine, 2)
    context = engine._executions._common.context  # type: ignore[attr-defined]
    context._calls.clear()
    allocated = stub.count("device_bytes"), stub.count("pinned_bytes")
    slot.check(engine, 2)
    assert context._calls == ["execute_async_v3", "infer_shapes"], "the second is the fake's own check"
    assert (stub.count("device_bytes"), stub.count("pinned_bytes")) == allocated


def test_memory_of_the_worker_is_pinned_and_used_where_it_lies(load: Load, stub: Stub) -> None:
    engine = load(**AFFINE)
    arena = np.zeros(4096, np.float32)
    address = arena.__array_interface__["data"][0]
    engine.attach_memory(address, arena.nbytes)
    assert engine.traits.details["host_memory"] == "pinned"
    source, target = arena[:8].reshape(2, 4), arena[1024:1032].reshape(2, 4)
    batch = EngineBatch(1, 2, (place("data", source),), (place("result", target),))
    for number in range(4):
        source[:] = number
        assert engine.run(batch) is None
        assert (target == 2 * number + 1).all()
    assert stub.count("pinned_bytes") == 0, "nothing had to be staged"
    assert stub.count("registered_bytes") == arena.nbytes
    second = np.zeros(64, np.float32)
    engine.attach_memory(second.__array_interface__["data"][0], second.nbytes)
    assert stub.count("registered_bytes") == second.nbytes
    assert engine.run(batch) is None, "memory that is not pinned any more goes through staging"
    assert stub.count("pinned_bytes") > 0


def test_memory_that_cannot_be_pinned_is_staged_and_the_reason_is_kept(load: Load, stub: Stub) -> None:
    engine = load(**AFFINE)
    stub.fail("cuMemHostRegister_v2=801")
    slot = Slot(2)
    engine.attach_memory(slot.source.__array_interface__["data"][0], slot.source.nbytes)
    assert "CUDA_ERROR_NOT_SUPPORTED (801)" in engine.traits.details["host_memory"]
    slot.check(engine, 2)


def test_outputs_stay_with_the_engine_if_nobody_says_where_to(load: Load) -> None:
    engine = load(**AFFINE)
    for rows in (2, 5, 2):
        slot = Slot(rows)
        outputs = engine.run(EngineBatch(None, rows, slot.batch.inputs, None))
        assert outputs is not None
        assert outputs[0].shape == (rows, 4)
        found = np.frombuffer(outputs[0].data, np.float32).reshape(rows, 4)
        np.testing.assert_array_equal(found, slot.source * 2 + 1)


def test_the_profile_that_holds_the_shapes_is_chosen_and_changed_back(load: Load) -> None:
    assert load(**WIDE).traits.max_batch_size == 16
    switches: tuple[dict[str, str], ...] = ({}, {"cuda_graphs": "false"})
    for parameters in switches:
        engine = load(parameters=parameters, **WIDE)
        slots = [Slot(1, 3), Slot(8, 64), Slot(4, 8), Slot(16, 2)]
        for _ in range(3):
            for slot in slots:
                slot.check(engine, 2)


def test_shapes_outside_every_profile_are_refused_and_the_ranges_are_named(load: Load) -> None:
    engine = load(**WIDE)
    with pytest.raises(
        EngineError, match=r"'data' has shape \[4, 9\]; it takes data \[1, 1\] to \[4, 8\]; or data \[8, 1\]"
    ):
        engine.run(Slot(4, 9).batch)
    Slot(4, 8).check(engine, 2)


def test_outputs_whose_size_depends_on_the_data_come_back_in_theirs(load: Load, stub: Stub) -> None:
    engine = load(**NONZERO)
    assert not engine.traits.batched
    assert "'found' depends on the data" in engine.traits.unbatched_reason
    for values in ([0, 5, 0, 7], [0.0] * 4, list(range(1000)), [1]):
        source = np.array(values, np.float32)
        outputs = engine.run(EngineBatch(None, 1, (place("data", source),), None))
        assert outputs is not None
        assert outputs[0].shape == (1, int((source != 0).sum()))
        assert np.frombuffer(outputs[0].data, np.int64).tolist() == np.flatnonzero(source).tolist()
        np.testing.assert_array_equal(np.frombuffer(outputs[1].data, np.float32), source)
    assert stub.count("captures") == 0
    wanted = (place("found", np.zeros((1, 1), np.int64)), place("same", np.zeros(1, np.float32)))
    with pytest.raises(OutputMismatchError, match=r"'found' has shape \[1, -1\]"):
        engine.run(EngineBatch(None, 1, (place("data", source),), wanted))


def test_values_of_a_shape_tensor_are_read_anew_for_every_run(load: Load) -> None:
    engine = load(**RESHAPE)
    assert not engine.traits.batched
    assert "'shape' is a shape tensor" in engine.traits.unbatched_reason
    source, shape = np.arange(8, dtype=np.float32).reshape(2, 4), np.zeros(2, np.int32)
    batch = EngineBatch("same key", 1, (place("data", source), place("shape", shape)), None)
    for wanted in ((4, 2), (2, 4), (4, 2)):
        shape[:] = wanted
        outputs = engine.run(batch)
        assert outputs is not None
        assert outputs[0].shape == wanted
        assert np.frombuffer(outputs[0].data, np.float32).tolist() == list(range(8))
    shape[:] = (3, 3)
    with pytest.raises(EngineError, match="reshape changes volume"):
        engine.run(batch)
    shape[:] = (2, 4)
    assert engine.run(batch) is not None


def test_largest_values_that_do_not_fit_the_largest_shapes_make_room_when_it_is_needed(load: Load, stub: Stub) -> None:
    profile = {"data": [[1, 4], [2, 4], [4, 4]], "shape.values": [[1, 1], [4, 2], [9, 9]]}
    engine = load(**(RESHAPE | {"profiles": [profile]}))
    before = stub.count("device_bytes")
    for rows in (1, 2, 4, 1):
        source, shape = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4), np.array([4, rows], np.int32)
        outputs = engine.run(EngineBatch(None, 1, (place("data", source), place("shape", shape)), None))
        assert outputs is not None
        np.testing.assert_array_equal(np.frombuffer(outputs[0].data, np.float32), source.reshape(-1))
    assert stub.count("device_bytes") - before == 2 * 4 * 4 * 4, "one buffer each for the largest input and output"


def test_an_output_of_another_shape_than_declared_is_a_mismatch(load: Load) -> None:
    tensors = [tensor("data", (-1, 4)), tensor("result", (-1, 1), "output")]
    engine = load(op="row_sums", tensors=tensors)
    with pytest.raises(OutputMismatchError, match=r"has shape \[2, 1\], expected was \[2, 4\]"):
        engine.run(Slot(2).batch)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensors": [tensor("data", (-1, 4), dtype="FP8"), tensor("result", (-1, 4), "output")]}, "'data' is FP8"),
        ({"tensors": [tensor("data", (-1, 4), format="CHW32"), tensor("result", (-1, 4), "output")]}, "format CHW32"),
    ],
)
def test_what_the_protocol_cannot_carry_is_refused_with_what_to_do(load: Load, change: Any, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        load(**change)


def test_bfloat16_passes_as_it_is(load: Load) -> None:
    kinds = {"dtype": "BF16"}
    engine = load(tensors=[tensor("data", (-1, 4), **kinds), tensor("result", (-1, 4), "output", **kinds)])
    assert engine.traits.inputs[0].datatype is DataType.BF16
    source, target = np.array([[1, 2, 3, 4]], np.uint16), np.zeros((1, 4), np.uint16)
    assert engine.run(EngineBatch(1, 1, (place("data", source),), (place("result", target),))) is None
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize(
    ("shape", "profile", "words"),
    [
        ((1, 4), None, "fixed at 1 in this plan"),
        ((), None, "scalar"),
        ((-1, 4), [[1, 4]] * 3, "the plan was built for one row"),
    ],
)
def test_what_cannot_be_batched_says_why(load: Load, shape: tuple[int, ...], profile: Any, words: str) -> None:
    tensors = [tensor("data", shape), tensor("result", shape, "output")]
    traits = load(tensors=tensors, profiles=[{"data": profile}] if profile else []).traits
    assert (traits.batched, traits.max_batch_size) == (False, 1)
    assert words in traits.unbatched_reason


def raw_options(file: Path, device: str = "cuda") -> EngineOptions:
    return EngineOptions("tensorrt", str(file), device, 0, 1, OnnxRuntimeManifest(), {})


def test_a_plan_that_does_not_load_shows_every_line_of_the_library(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "old.plan"
    file.write_bytes(b"made by another version")
    with pytest.raises(EngineError, match=r"INFO: Loaded engine size.*ERROR: IRuntime.*magicTag.*built anew"):
        registry.load(raw_options(file))
    assert stub.leaked() == {}


def test_a_plan_that_does_not_load_on_a_lost_device_is_the_device_s_fault(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "old.plan"
    file.write_bytes(b"made by another version")
    stub.fail("cuStreamSynchronize=700")
    with pytest.raises(DeviceFaultError, match="ILLEGAL_ADDRESS"):
        registry.load(raw_options(file))


@pytest.mark.parametrize("data", [None, b""])
def test_a_plan_that_cannot_be_read_is_refused_without_its_path(stub: Stub, tmp_path: Path, data: bytes | None) -> None:
    file = tmp_path / "gone.plan"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(EngineError, match="the plan cannot be read") as caught:
        registry.load(raw_options(file))
    assert str(tmp_path) not in str(caught.value)
    assert stub.leaked() == {}


def test_a_device_that_is_not_there_is_named_with_those_that_are(load: Load) -> None:
    with pytest.raises(EngineError, match="there is no cuda:3: this machine has 1, from cuda:0 to cuda:0"):
        load(device="cuda:3")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (100, "knows no device .*CUDA_VISIBLE_DEVICES"),
        (999, r"cannot be used: cuInit: .*UNKNOWN \(999\)"),
        (803, "MISMATCH"),
    ],
)
def test_a_driver_that_does_not_begin_is_missing_and_no_device_was_lost(
    load: Load, stub: Stub, code: int, words: str
) -> None:
    stub.fail(f"cuInit={code}")
    with pytest.raises(MissingError, match=words):
        load(**AFFINE)
    assert stub.leaked() == {}


@pytest.mark.parametrize(
    "rule",
    [
        "cuInit=803",
        "cuMemAlloc_v2=2@1",
        "cuMemAlloc_v2=2@2",
        "cuMemAlloc_v2=2@3",
        "cuStreamCreate=2",
        "cuDevicePrimaryCtxRetain=2",
    ],
)
def test_a_load_that_fails_half_way_leaves_nothing_behind_and_the_next_succeeds(
    load: Load, stub: Stub, rule: str
) -> None:
    stub.fail(rule)
    with pytest.raises(EngineError, match=r"OUT_OF_MEMORY|MISMATCH") as caught:
        load(**AFFINE)
    assert not isinstance(caught.value, DeviceFaultError)
    assert stub.leaked() == {}
    stub.fail("")
    Slot(2).check(load(**AFFINE), 2)


def test_no_room_for_the_activations_is_said_with_what_is_free(load: Load) -> None:
    with pytest.raises(EngineError, match=r"no room for 2097152 KiB more: \d+ of 1024 MiB are free"):
        load(device_memory=2 << 30)


@pytest.mark.parametrize(
    "rule", ["cuMemcpyHtoDAsync_v2=2@1", "cuMemcpyDtoHAsync_v2=2@1", "stub_launch=2@1", "cuMemHostAlloc=2@1"]
)
def test_no_memory_at_a_run_is_that_run_s_error_and_the_next_succeeds(load: Load, stub: Stub, rule: str) -> None:
    engine = load(**AFFINE)
    slot = Slot(2)
    if rule != "cuMemHostAlloc=2@1":
        slot.check(engine, 2)
    stub.fail(rule)
    with pytest.raises(EngineError) as caught:
        engine.run(slot.batch)
    assert not isinstance(caught.value, DeviceFaultError)
    for _ in range(4):
        slot.check(engine, 2)


def test_a_batch_that_failed_is_not_given_back_while_the_device_may_still_write_to_it(load: Load, stub: Stub) -> None:
    engine = load(**AFFINE)
    slot = Slot(2)
    slot.check(engine, 2)
    waited = stub.count("synchronizations")
    stub.fail("cuMemcpyDtoHAsync_v2=2@1")
    with pytest.raises(EngineError):
        engine.run(slot.batch)
    assert stub.count("synchronizations") == waited + 1


def test_what_was_half_recorded_is_forgotten(stub: Stub) -> None:
    device = cuda.Device(0)
    device.open()
    address, host = device.allocate(64), device.allocate_pinned(64)

    def enqueue() -> None:
        device.upload(address, host.address, 64)
        raise EngineError("half way")

    with pytest.raises(EngineError, match="half way"):
        device.capture(enqueue)
    assert stub.count("graphs") == 0
    device.upload(address, host.address, 64)
    device.synchronize()
    device.close()
    assert stub.leaked() == {}


def test_no_memory_for_an_output_of_unknown_size_is_that_run_s_error(load: Load, stub: Stub) -> None:
    engine = load(**NONZERO)
    source = np.arange(10, dtype=np.float32)
    batch = EngineBatch(None, 1, (place("data", source),), None)
    stub.fail("cuMemAlloc_v2=2@1")
    with pytest.raises(EngineError, match="the GPU has no room"):
        engine.run(batch)
    stub.fail("")
    outputs = engine.run(batch)
    assert outputs is not None
    assert outputs[0].shape == (1, 9)


STICKY = (214, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999)


@pytest.mark.parametrize("code", STICKY)
def test_what_kills_the_context_is_a_device_fault_in_every_later_call(load: Load, stub: Stub, code: int) -> None:
    engine = load(**AFFINE)
    slot = Slot(2)
    slot.check(engine, 2)
    stub.fail(f"cuStreamSynchronize={code}@1")
    with pytest.raises(
        DeviceFaultError, match=rf"lost to this process: cuStreamSynchronize: CUDA_ERROR_\w+ \({code}\)"
    ):
        engine.run(slot.batch)
    stub.fail("")
    with pytest.raises(DeviceFaultError, match=str(code)):
        engine.run(slot.batch)
    with pytest.raises(DeviceFaultError, match=str(code)):
        engine.close()
    stub.reset()
    Slot(2).check(load(**AFFINE), 2)


@pytest.mark.parametrize("graphs", ["true", "false"])
def test_a_fault_inside_a_kernel_shows_at_its_run_with_or_without_a_graph(load: Load, graphs: str) -> None:
    engine = load(parameters={"cuda_graphs": graphs}, **AFFINE)
    slot = Slot(2)
    for _ in range(3):
        slot.check(engine, 2)
    engine._engine._document["kernel_error"] = 719  # type: ignore[attr-defined]
    with pytest.raises(DeviceFaultError, match="LAUNCH_FAILED"):
        engine.run(slot.batch)


@pytest.mark.parametrize("code", [100, 101, 46, 201, 4, 220, 806, 810, 911])
def test_a_device_that_went_away_is_a_device_fault(load: Load, stub: Stub, code: int) -> None:
    engine = load(**AFFINE)
    slot = Slot(2)
    slot.check(engine, 2)
    stub.fail(f"cuMemcpyHtoDAsync_v2={code}@1")
    with pytest.raises(DeviceFaultError):
        engine.run(slot.batch)


@pytest.mark.parametrize("code", [1, 2, 400, 600, 701, 720, 801, 900])
def test_what_leaves_the_context_alive_is_no_device_fault(code: int) -> None:
    assert type(cuda.failure("cuSomething", code)) is (OutOfMemoryError if code == 2 else EngineError)


def test_a_code_of_a_newer_driver_is_an_error_with_its_number() -> None:
    assert "12345" in str(cuda.failure("cuSomething", 12345))


@pytest.mark.parametrize(
    "rule",
    [
        "cuStreamBeginCapture_v2=900",
        "cuStreamEndCapture=901",
        "cuGraphInstantiateWithFlags=801",
        "stub_launch=900@2",
    ],
)
def test_a_shape_that_cannot_be_recorded_runs_without_and_is_counted(load: Load, stub: Stub, rule: str) -> None:
    engine = load(**AFFINE)
    slot, later = Slot(2), Slot(5)
    slot.check(engine, 2)
    stub.fail(rule)
    slot.check(engine, 2)
    assert engine.traits.details["cuda_graphs"].startswith("0 captured, 1 refused (")
    stub.fail("")
    for _ in range(4):
        slot.check(engine, 2)
        later.check(engine, 2)
    assert engine.traits.details["cuda_graphs"].startswith("1 captured, 1 refused (")
    assert stub.count("graphs") == 0


def test_no_room_for_a_context_of_its_own_leaves_a_shape_with_the_common_one(load: Load) -> None:
    engine = load(contexts=1, **AFFINE)
    slot = Slot(2)
    for _ in range(4):
        slot.check(engine, 2)
    assert "OutOfMemory" in engine.traits.details["cuda_graphs"]


def test_a_fault_while_recording_is_a_device_fault(load: Load, stub: Stub) -> None:
    engine = load(**AFFINE)
    slot = Slot(2)
    slot.check(engine, 2)
    stub.fail("cuStreamEndCapture=700")
    with pytest.raises(DeviceFaultError):
        engine.run(slot.batch)


def test_a_shape_that_the_library_refuses_shows_its_words(load: Load) -> None:
    engine = load(refuse_shape=[3, 4], **AFFINE)
    with pytest.raises(EngineError, match=r"Error Code 3: API Usage Error \(for input data, shape \(3, 4\)"):
        engine.run(Slot(3).batch)
    Slot(2).check(engine, 2)


def test_a_run_that_the_library_refuses_shows_its_words_and_the_next_succeeds(load: Load, stub: Stub) -> None:
    engine = load(**AFFINE)
    slot = Slot(2)
    slot.check(engine, 2)
    stub.fail("stub_launch=701@1")
    with pytest.raises(EngineError, match=r"enqueueV3: Error Code 1: Cuda Runtime \(error 701\)") as caught:
        engine.run(slot.batch)
    assert not isinstance(caught.value, DeviceFaultError)
    slot.check(engine, 2)


def test_a_refusal_on_a_lost_device_is_a_device_fault_with_both_words(load: Load, stub: Stub) -> None:
    engine = load(**AFFINE)
    slot = Slot(2)
    slot.check(engine, 2)
    stub.fail("stub_launch=700@1")
    with pytest.raises(DeviceFaultError, match=r"ILLEGAL_ADDRESS.*TensorRT: IExecutionContext::enqueueV3"):
        engine.run(slot.batch)


def test_everything_is_destroyed_in_the_order_that_the_library_wants(load: Load) -> None:
    runtime.deaths.clear()
    engine = load(**AFFINE)
    slot = Slot(2)
    for _ in range(3):
        slot.check(engine, 2)
    engine.close()
    assert runtime.deaths == ["IExecutionContext", "IExecutionContext", "ICudaEngine", "Runtime"]


def test_two_engines_live_side_by_side_on_one_device(load: Load) -> None:
    first, second = load(**AFFINE), load()
    slot = Slot(4)
    for _ in range(4):
        slot.check(first, 2)
        slot.check(second, 1)
    first.close()
    for _ in range(4):
        slot.check(second, 1)
