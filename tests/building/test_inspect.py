"""Inspection: what is in a model file, and an exact message for anything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from appliance.building.inspect import InspectError, inspect

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "1" / "model.onnx"


def save(path: Path, shape: list[Any], *, operator: str = "Relu", location: str = "") -> Path:
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    if location:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


def test_the_example_is_described() -> None:
    found = inspect(DIGITS)
    assert (found.inputs[0].name, found.inputs[0].datatype, found.inputs[0].shape[1:]) == ("image", "FP32", (28, 28, 1))
    assert found.batch_axis == "free"
    assert found.parameters >= 693_962
    assert found.operators["Gemm"] == 2


@pytest.mark.parametrize(
    ("shape", "axis", "words"),
    [(["n", 3], "free", "gathered"), ([1, 3], "fixed at 1", "dynamic_axes"), ([], "absent", "scalar")],
)
def test_the_batch_axis_and_how_to_change_it(shape: list[Any], axis: str, words: str, tmp_path: Path) -> None:
    found = inspect(save(tmp_path / "m.onnx", shape))
    assert found.batch_axis == axis
    assert words in found.advice


def test_operators_whose_output_depends_on_values_are_named(tmp_path: Path) -> None:
    assert inspect(save(tmp_path / "m.onnx", ["n"], operator="NonZero")).data_dependent == ("NonZero",)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "missing.bin", "link.bin", "hard.bin"])
def test_weights_outside_the_folder_or_linked_into_it_are_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "secret")
    os.link(tmp_path / "secret", folder / "hard.bin")
    with pytest.raises(InspectError, match="keeps weights in"):
        inspect(save(folder / "m.onnx", ["n"], location=location))


def test_weights_beside_the_model_are_named(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    assert inspect(save(tmp_path / "m.onnx", ["n"], location="w.bin")).external_data == ("w.bin",)


@pytest.mark.parametrize("data", [b"", b"this is no model", b"\x08\x08"])
def test_what_is_no_model_is_called_that(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(data)
    with pytest.raises(InspectError):
        inspect(file)
    with pytest.raises(InspectError, match="cannot be read"):
        inspect(tmp_path / "nothing.onnx")


def test_graphs_nested_too_deep_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    for _ in range(20):
        graph = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=graph)], "g", [], [])
    file = tmp_path / "m.onnx"
    file.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(InspectError, match="nests graphs deeper than 16 levels"):
        inspect(file)


WHOLE = onnx.load(str(DIGITS))
for _weight in WHOLE.graph.initializer:
    _weight.raw_data = b""
SMALL = WHOLE.SerializeToString()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=8),
    length=st.integers(1, len(SMALL)),
)
def test_a_damaged_file_is_described_or_refused(changes: list[tuple[int, int]], length: int, tmp_path: Path) -> None:
    data = bytearray(SMALL)
    for position, value in changes:
        data[position] = value
    file = tmp_path / "m.onnx"
    file.write_bytes(data[:length])
    try:
        inspect(file)
    except InspectError as error:
        assert str(error)
