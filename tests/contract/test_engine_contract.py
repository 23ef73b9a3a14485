"""One suite for every engine: what a worker relies on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import appliance  # noqa: F401  before any engine's library
from appliance.core.manifest import OnnxRuntimeManifest
from appliance.core.tensor import DataType
from appliance.engines import registry
from appliance.engines.base import Engine, EngineBatch, EngineError, EngineOptions, EngineTensor
from tests.fakes import cuda_stub


def options(engine: str, model_file: str = "", **changes: Any) -> EngineOptions:
    values: dict[str, Any] = {
        "engine": engine,
        "model_file": model_file,
        "device": "cpu",
        "max_batch_size": 0,
        "cores": 1,
        "onnxruntime": OnnxRuntimeManifest(),
        "parameters": {"shape": "4"} if engine == "loopback" else {},
    }
    return EngineOptions(**(values | changes))


def save(
    path: Path,
    shape: list[Any],
    operator: str = "Identity",
    kind: int = TensorProto.FLOAT,
    out: list[Any] | None = None,
) -> str:
    graph = helper.make_graph(
        [helper.make_node(operator, ["data"], ["result"])],
        "g",
        [helper.make_tensor_value_info("data", kind, shape)],
        [helper.make_tensor_value_info("result", TensorProto.INT64 if operator == "NonZero" else kind, out or shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.fixture(params=["loopback", "onnxruntime", *(["tensorrt"] if cuda_stub.active() else [])])
def identity(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "tensorrt":
        made = registry.load(options("tensorrt", cuda_stub.plan(tmp_path / "m.plan"), device="cuda"))
    else:
        made = registry.load(options(request.param, save(tmp_path / "m.onnx", ["batch", 4])))
    yield made
    made.close()


def place(name: str, array: np.ndarray[Any, Any]) -> EngineTensor:
    view = memoryview(array).cast("B")
    datatype = {"f": DataType.FP32, "i": DataType.INT64}[array.dtype.kind]
    return EngineTensor(name, datatype, array.shape, view, array.__array_interface__["data"][0])


def test_traits_say_what_the_model_takes_and_that_it_can_be_batched(identity: Engine) -> None:
    traits = identity.traits
    assert traits.inputs[0].shape == (-1, 4)
    assert traits.outputs[0].datatype is DataType.FP32
    assert (traits.batched, traits.max_batch_size, traits.unbatched_reason) == (True, 32, "")
    assert traits.device == ("cuda:0" if traits.backend == "tensorrt" else "cpu")


def test_outputs_are_written_where_they_were_asked_for_again_and_again(identity: Engine) -> None:
    source, target = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    name = identity.traits.outputs[0].name
    batch = EngineBatch((0, 3), 3, (place("data", source),), (place(name, target),))
    for number in range(5):
        source[:] = number
        assert identity.run(batch) is None
        np.testing.assert_array_equal(target, source)


def test_memory_may_be_attached_again_while_the_engine_lives(identity: Engine) -> None:
    name = identity.traits.outputs[0].name
    for number in range(3):
        memory = np.zeros((2, 3, 4), np.float32)
        identity.attach_memory(memory.__array_interface__["data"][0], memory.nbytes)
        memory[0] = number + 1
        batch = EngineBatch((number, 0, 3), 3, (place("data", memory[0]),), (place(name, memory[1]),))
        for _ in range(3):
            assert identity.run(batch) is None
            np.testing.assert_array_equal(memory[1], memory[0])
            memory[0] += 1


def test_outputs_of_unknown_size_are_given_back(identity: Engine) -> None:
    source = np.arange(8, dtype=np.float32).reshape(2, 4)
    outputs = identity.run(EngineBatch(None, 2, (place("data", source),), None))
    assert outputs is not None
    assert outputs[0].shape == (2, 4)
    assert bytes(outputs[0].data) == source.tobytes()


Refusal = Callable[[Path], EngineOptions]


@pytest.mark.parametrize(
    "refused",
    [
        lambda tmp: options("onnxruntime", str(tmp / "missing.onnx")),
        lambda tmp: options("loopback", parameters={"typo": "1"}),
        lambda tmp: options("loopback", parameters={"datatype": "FLOAT"}),
        lambda tmp: options("loopback", parameters={"load": "fail"}),
        lambda tmp: options("nothing"),
    ],
)
def test_what_cannot_be_loaded_is_an_engine_error(refused: Refusal, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        registry.load(refused(tmp_path))


def test_a_fixed_batch_axis_is_served_unbatched_and_says_why(tmp_path: Path) -> None:
    traits = registry.load(options("onnxruntime", save(tmp_path / "m.onnx", [1, 4]))).traits
    assert not traits.batched
    assert traits.max_batch_size == 1
    assert "fixed at 1" in traits.unbatched_reason
    assert "dynamic batch axis" in traits.unbatched_reason


def test_bfloat16_and_strings_and_data_dependent_outputs(tmp_path: Path) -> None:
    engine = registry.load(options("onnxruntime", save(tmp_path / "b.onnx", ["n", 2], kind=TensorProto.BFLOAT16)))
    source, target = np.array([[1, 2]], np.uint16), np.zeros((1, 2), np.uint16)
    spots = [
        EngineTensor(name, DataType.BF16, (1, 2), memoryview(array).cast("B"), array.__array_interface__["data"][0])
        for name, array in (("data", source), ("result", target))
    ]
    assert engine.run(EngineBatch(1, 1, (spots[0],), (spots[1],))) is None
    np.testing.assert_array_equal(target, source)

    strings = registry.load(options("onnxruntime", save(tmp_path / "s.onnx", ["n", 1], kind=TensorProto.STRING)))
    wire = b"\x03\x00\x00\x00abc\x00\x00\x00\x00"
    spot = EngineTensor("data", DataType.BYTES, (2, 1), memoryview(wire), 0)
    found = strings.run(EngineBatch(None, 2, (spot,), None))
    assert found is not None
    assert (found[0].shape, bytes(found[0].data)) == ((2, 1), wire)

    nonzero = registry.load(options("onnxruntime", save(tmp_path / "n.onnx", ["n"], "NonZero", out=[1, "found"])))
    assert not nonzero.traits.batched
    values = np.array([0, 5, 0, 7], np.float32)
    found = nonzero.run(EngineBatch(None, 1, (place("data", values),), None))
    assert found is not None
    assert found[0].shape == (1, 2)
    assert np.frombuffer(found[0].data, np.int64).tolist() == [1, 3]
