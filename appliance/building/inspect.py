"""What an ONNX file is, read without executing anything in it: inputs, outputs, operators, weights, batch axis.

Any bytes end in a description or in `InspectError` with an exact message; `model_file` reads and refuses. What engines make of it
is `engine_fit`'s.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from appliance.building import pixels
from appliance.building.model_file import Contents, InspectError, elements, nbytes, read
from appliance.building.pixels import ImageInput

__all__ = ["ImageInput", "InspectError", "Inspection", "Value", "inspect"]

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
    datatypes: tuple[str, ...]
    functions: tuple[str, ...]
    images: tuple[ImageInput, ...]


def inspect(path: Path) -> Inspection:
    """Describe the file. InspectError with the reason if it is no model, or one that must not be trusted."""
    model = read(path)
    try:
        contents = Contents(model, path.resolve().parent)
        return _describe(model, contents, path.stat().st_size)
    except UnicodeDecodeError as error:
        raise InspectError("holds a name that is not UTF-8: it is damaged") from error
    except OSError as error:
        raise InspectError(f"cannot be read: {error.strerror}") from error


def _describe(model: Any, contents: Contents, size: int) -> Inspection:
    graph = model.graph
    operators = Counter(_operator(node) for node in contents.nodes)
    names = {weight.name for weight in graph.initializer}
    inputs = tuple(_value(value) for value in graph.input if value.name not in names)
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
        nodes=len(contents.nodes),
        operators=dict(operators.most_common()),
        parameters=sum(elements(weight) for weight in contents.weights),
        parameter_bytes=sum(nbytes(weight) for weight in contents.weights),
        external_data=contents.external,
        batch_axis=axis,
        advice=advice,
        data_dependent=tuple(sorted(DATA_DEPENDENT & set(operators))),
        datatypes=_datatypes(contents),
        functions=tuple(sorted(f"{one.domain}.{one.name}" if one.domain else one.name for one in model.functions)),
        images=pixels.images(graph, [(value.name, value.shape) for value in inputs]),
    )


def _operator(node: Any) -> str:
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _datatypes(contents: Contents) -> tuple[str, ...]:
    """Of everything whose datatype the file says: weights, constants, inputs, outputs, annotated values, targets of Cast."""
    found = {tensor.data_type for tensor in (*contents.weights, *contents.constants)}
    for graph in contents.graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.HasField("tensor_type"):
                found.add(value.type.tensor_type.elem_type)
    for node in contents.nodes:
        if node.op_type == "Cast":
            found |= {attribute.i for attribute in node.attribute if attribute.name == "to"}
    return tuple(sorted(DATATYPES.get(kind, f"type {kind}") for kind in found - {0}))


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
