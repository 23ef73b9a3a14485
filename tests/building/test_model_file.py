"""What must not be trusted is refused with an exact message; any bytes end in a description or in InspectError."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from appliance.building.engine_fit import engines
from appliance.building.inspect import InspectError, inspect

QUIET = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)


def weight(**places: str) -> Any:
    """Four floats; with places, in another file."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    if places:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in places.items():
            tensor.external_data.add(key=key, value=value)
    return tensor


def model(tensor: Any = None, *, shape: tuple[Any, ...] = ("n", 4)) -> Any:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [tensor or weight()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def look(made: Any, folder: Path) -> Any:
    file = folder / "m.onnx"
    file.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return inspect(file)


def absurd(sizes: list[int]) -> Any:
    tensor = weight()
    tensor.dims[:] = sizes
    return model(tensor)


def in_a_branch(tensor: Any) -> Any:
    made = model()
    inner = helper.make_graph([helper.make_node("Relu", ["w"], ["z"])], "inner", [], [], [tensor])
    made.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    return made


def in_an_attribute(tensor: Any) -> Any:
    made = model()
    made.graph.node.append(helper.make_node("Constant", [], ["k"], value=tensor))
    return made


def sparse() -> Any:
    made = model()
    made.graph.sparse_initializer.add()
    return made


def trained() -> Any:
    made = model()
    made.training_info.add()
    return made


def functions(calls: dict[str, list[str]]) -> Any:
    made = model()
    for name, called in calls.items():
        nodes = [helper.make_node(one, ["a"], ["a"], domain="own") for one in called]
        made.functions.append(helper.make_function("own", name, ["a"], ["a"], nodes, [helper.make_opsetid("own", 1)]))
    return made


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: absurd([1 << 40, 1 << 40]), "of more than 1099511627776 bytes"),
        (lambda: absurd([-1, 4]), "with a negative size: [-1, 4]"),
        (sparse, "sparse form"),
        (trained, "training information"),
        (lambda: functions({"f": ["g"], "g": ["h"], "h": ["f"]}), "a function that calls itself: 'f'"),
        (lambda: functions({"f": ["f"]}), "a function that calls itself: 'f'"),
        (lambda: model(weight(location="w.bin", offset="-1")), "offset '-1'"),
        (lambda: model(weight(location="w.bin", offset=str(1 << 63))), f"offset '{1 << 63}'"),
        (lambda: model(weight(location="w.bin", offset="4" * 5000)), "it must be 0 to 9223372036854775807"),
        (lambda: model(weight(location="w.bin", length="x")), "length 'x'"),
        (lambda: model(weight(location="w.bin", length="15")), "of 16 bytes, with only 15"),
        (lambda: model(weight(location="w.bin", length="17")), "at bytes 0 to 17 of 'w.bin', which has 16"),
        (lambda: model(weight(location="w.bin", offset="1")), "at bytes 1 to 17"),
        (lambda: model(weight(location="")), "outside its folder"),
        (lambda: model(weight(location="/etc/passwd")), "outside its folder"),
        (lambda: model(weight(location="sub/../../secret")), "outside its folder"),
        (lambda: model(weight(location="linked/secret")), "symbolic link"),
        (lambda: model(weight(location="hard.bin")), "hard links"),
        (lambda: model(weight(location="sub")), "no regular file"),
        (lambda: model(weight(location="none.bin")), "cannot be had: No such file"),
        (lambda: in_a_branch(weight(location="../secret")), "outside its folder"),
        (lambda: in_an_attribute(weight(location="../secret")), "outside its folder"),
    ],
)
def test_what_must_not_be_trusted_is_refused(made: Callable[[], Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "w.bin").write_bytes(bytes(16))
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "linked").symlink_to(tmp_path)
    os.link(tmp_path / "secret", folder / "hard.bin")
    with pytest.raises(InspectError) as caught:
        look(made(), folder)
    assert words in str(caught.value)


def test_weights_in_branches_and_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(24))
    assert look(model(weight(location="w.bin", offset="8", length="16")), tmp_path).external_data == ("w.bin",)
    assert look(in_a_branch(weight()), tmp_path).parameters == 12
    found = look(functions({"f": ["g", "g"], "g": ["Relu"]}), tmp_path)
    assert found.functions == ("own.f", "own.g")


def test_messages_nested_too_deep_are_no_model(tmp_path: Path) -> None:
    graph = b""
    for tag in (b"\x32", b"\x2a", b"\x0a") * 100:  # an attribute's graph, a node's attribute, a graph's node
        graph = tag + _varint(len(graph)) + graph
    with pytest.raises(InspectError, match="does not parse"):
        look(b"\x3a" + _varint(len(graph)) + graph, tmp_path)


def _varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


@pytest.mark.parametrize(
    ("shape", "operator", "expected"),
    [
        (("n", 3, 224, 160), "Conv", ("NCHW", 224, 160, 3)),
        (("n", 224, 160, 3), "Relu", ("NHWC", 224, 160, 3)),
        (("n", 1, 28, 28), "Relu", ("NCHW", 28, 28, 1)),
        (("n", 3, "h", "w"), "Relu", ("NCHW", "h", "w", 3)),
        (("n", 3, 8, 3), "Relu", None),
        (("n", 3, 8, 3), "Conv", ("NCHW", 8, 3, 3)),
        (("n", 64, 8, 8), "Conv", None),
        (("n", 7), "Relu", None),
    ],
)
def test_what_seems_to_want_a_picture(shape: tuple[Any, ...], operator: str, expected: Any, tmp_path: Path) -> None:
    made = model(shape=shape)
    made.graph.node[0].op_type = "Sub"  # a normalization before it changes nothing
    made.graph.node.append(helper.make_node(operator, ["y", "k"], ["z"]))
    images = look(made, tmp_path).images
    assert [(one.layout, one.height, one.width, one.channels) for one in images] == ([expected] if expected else [])


def described_or_refused(data: bytes, folder: Path) -> None:
    try:
        found = look(data, folder)
    except InspectError as error:
        assert str(error)
    else:
        assert engines(found)


@QUIET
@given(data=st.binary(max_size=400))
def test_any_bytes(data: bytes, tmp_path: Path) -> None:
    described_or_refused(data, tmp_path)


WHOLE = [
    made.SerializeToString()
    for made in (
        in_a_branch(weight(location="w.bin", offset="1", length="3")),
        in_an_attribute(weight()),
        functions({"f": ["g"], "g": ["Relu"]}),
    )
]
onnx.load_from_string(WHOLE[0])


@QUIET
@given(
    which=st.integers(0, len(WHOLE) - 1),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40),
    added=st.binary(max_size=20),
)
def test_any_damage(which: int, changes: list[tuple[int, int]], cut: int, added: bytes, tmp_path: Path) -> None:
    data = bytearray(WHOLE[which])
    for place, value in changes:
        data[place % len(data)] = value
    described_or_refused(bytes(data[: len(data) - cut]) + added, tmp_path)
