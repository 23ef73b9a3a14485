"""What an ONNX file is, read without executing anything in it: inputs, outputs, operators, weights, batch axis.

The only home of the package `onnx`. Any bytes end in a description or in `InspectError` with an exact message.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

MAX_FILE_BYTES = 2 << 30
"""protobuf reads no message of 2 GiB or more; larger models keep their weights in external data."""

MAX_GRAPH_DEPTH = 16
MAX_NODES = 1_000_000

DATA_DEPENDENT = frozenset({"NonZero", "NonMaxSuppression", "Unique", "Compress", "StringSplit", "SequenceMap"})
"""Operators whose output size depends on values, not only on shapes."""

DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}
"""TensorProto's numbers, in the protocol's words; others cannot be served."""


class InspectError(Exception):
    """The file is not a model that can be described."""


class Value(msgspec.Struct, frozen=True):
    """An input or output; sizes are numbers, symbols, or "?"."""

    name: str
    datatype: str
    shape: tuple[int | str, ...]


class Inspection(msgspec.Struct, frozen=True):
    """What was found. `batch_axis` is "free", "fixed at N" or "absent"; `advice` says how to change it."""

    file_bytes: int
    ir_version: int
    opset: int
    other_opsets: dict[str, int]
    producer: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: int
    operators: dict[str, int]
    parameters: int
    parameter_bytes: int
    external_data: tuple[str, ...]
    batch_axis: str
    advice: str
    data_dependent: tuple[str, ...]


def inspect(path: Path) -> Inspection:
    """Describe the file. InspectError with the reason if it is no model, or one that must not be trusted."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        status = path.stat()
    except OSError as error:
        raise InspectError(f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InspectError("is not a regular file")
    if not 0 < status.st_size < MAX_FILE_BYTES:
        raise InspectError(f"has {status.st_size} bytes; a model has between 1 and {MAX_FILE_BYTES - 1}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, ValueError, RecursionError) as error:
        raise InspectError("is not ONNX, or is cut off: its protobuf does not parse") from error
    if not model.HasField("graph") or not model.graph.node:
        raise InspectError("parses, but holds no graph: it is not ONNX, or is cut off")
    return _describe(model, path, status.st_size)


def _describe(model: Any, path: Path, size: int) -> Inspection:
    graph = model.graph
    operators: Counter[str] = Counter()
    _count(graph, operators, 0)
    weights = {weight.name for weight in graph.initializer}
    inputs = tuple(_value(value) for value in graph.input if value.name not in weights)
    outputs = tuple(_value(value) for value in graph.output)
    axis, advice = _batch_axis(inputs, outputs)
    opsets = {opset.domain or "ai.onnx": int(opset.version) for opset in model.opset_import}
    return Inspection(
        file_bytes=size,
        ir_version=int(model.ir_version),
        opset=opsets.pop("ai.onnx", 0),
        other_opsets=opsets,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=inputs,
        outputs=outputs,
        nodes=sum(operators.values()),
        operators=dict(operators.most_common()),
        parameters=sum(_elements(weight) for weight in graph.initializer),
        parameter_bytes=sum(_nbytes(weight) for weight in graph.initializer),
        external_data=_external(graph, path),
        batch_axis=axis,
        advice=advice,
        data_dependent=tuple(sorted(DATA_DEPENDENT & set(operators))),
    )


def _count(graph: Any, operators: Counter[str], depth: int) -> None:
    """Count operators, also in the bodies of If, Loop and Scan."""
    if depth > MAX_GRAPH_DEPTH:
        raise InspectError(f"nests graphs deeper than {MAX_GRAPH_DEPTH} levels")
    for node in graph.node:
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        operators[name] += 1
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _count(attribute.g, operators, depth + 1)
            for inner in attribute.graphs:
                _count(inner, operators, depth + 1)
    if sum(operators.values()) > MAX_NODES:
        raise InspectError(f"holds more than {MAX_NODES} nodes")


def _value(value: Any) -> Value:
    if not value.type.HasField("tensor_type"):
        raise InspectError(f"{value.name!r} is no tensor; only tensors can be served")
    tensor = value.type.tensor_type
    shape: tuple[int | str, ...] = tuple(
        int(size.dim_value) if size.HasField("dim_value") else size.dim_param or "?" for size in tensor.shape.dim
    )
    return Value(value.name, DATATYPES.get(tensor.elem_type, f"type {tensor.elem_type}"), shape)


def _batch_axis(inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> tuple[str, str]:
    """The batch axis that all inputs and outputs share, and what to do if they do not."""
    if not inputs:
        return "absent", "the model takes no input"
    for value in (*inputs, *outputs):
        if not value.shape:
            return "absent", f"{value.name!r} is a scalar, so requests cannot be gathered; they are served one by one"
    for value in (*inputs, *outputs):
        if isinstance(value.shape[0], int):
            return (
                f"fixed at {value.shape[0]}",
                f"{value.name!r} has its first axis fixed: served unbatched. Re-export with a dynamic first axis "
                "(torch: dynamic_axes={'" + value.name + "': {0: 'batch'}}; Keras: leave the batch size None)",
            )
    return "free", "requests are gathered into batches"


def _elements(weight: Any) -> int:
    count = 1
    for size in weight.dims:
        count *= max(int(size), 0)
    return count


_WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}


def _nbytes(weight: Any) -> int:
    return _elements(weight) * _WIDTHS.get(weight.data_type, 1)


def _external(graph: Any, path: Path) -> tuple[str, ...]:
    """The files that weights lie in; InspectError for one that leaves the folder or is linked from elsewhere."""
    found = set()
    folder = path.resolve().parent
    for weight in graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                found.add(entry.value)
    for name in sorted(found):
        file = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts or not file.resolve().is_relative_to(folder):  # noqa: PTH117  a str
            raise InspectError(f"keeps weights in {name!r}, outside its folder")
        if not file.is_file() or file.is_symlink():
            raise InspectError(f"keeps weights in {name!r}, which is no regular file here")
        if file.stat().st_nlink > 1:
            raise InspectError(f"keeps weights in {name!r}, which has hard links: copy the file")
    return tuple(sorted(found))
