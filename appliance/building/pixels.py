"""Whether an input looks like a picture, and how it lies in it: from the shape and from the first operators that take it.

A guess with its reason, never a promise: the person who trained the model knows. Driven by `inspect`.
"""

from __future__ import annotations

from typing import Any

import msgspec

CHANNELS = (1, 3, 4)
PASSING = frozenset({
    "Add", "Cast", "Clip", "DequantizeLinear", "Div", "Identity", "Mul", "Pad", "QuantizeLinear", "Relu", "Sub",
    "BatchNormalization",
})  # fmt: skip
"""Operators that leave the axes where they are."""

SPATIAL = frozenset(
    {"Conv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "GlobalAveragePool", "ConvTranspose"}
)
"""Operators that ONNX defines with channels before height and width."""

MAX_STEPS = 16


class ImageInput(msgspec.Struct, frozen=True):
    """An input that seems to want a picture. Sizes are numbers or symbols; `reason` says what speaks for the layout."""

    name: str
    layout: str
    height: int | str
    width: int | str
    channels: int | str
    reason: str


def images(graph: Any, inputs: list[tuple[str, tuple[int | str, ...]]]) -> tuple[ImageInput, ...]:
    """Those of the inputs (name, shape) that look like pictures; empty if none does."""
    wanted = {name for name, shape in inputs if len(shape) == 4}
    consumers: dict[str, Any] = {}
    for node in graph.node if wanted else ():
        for name in node.input:
            consumers.setdefault(name, node)
    found = (_image(name, shape, _taken(consumers, name)) for name, shape in inputs if name in wanted)
    return tuple(image for image in found if image is not None)


def _taken(consumers: dict[str, Any], name: str) -> tuple[str, str]:
    """The layout that the first telling operator wants, and the operator; both empty if none tells."""
    for _ in range(MAX_STEPS):
        node = consumers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            break
        if node.op_type in SPATIAL and node.input[0] == name:
            return "NCHW", str(node.op_type)
        if node.op_type == "Transpose":
            order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
            return ("NHWC", "Transpose to channels first") if order == [0, 3, 1, 2] else ("", "")
        if node.op_type not in PASSING or not node.output:
            break
        name = node.output[0]
    return "", ""


def _image(name: str, shape: tuple[int | str, ...], taken: tuple[str, str]) -> ImageInput | None:
    layout, operator = taken
    if layout:
        reason = f"its first operator is {operator}"
    else:
        last, first = shape[3] in CHANNELS, shape[1] in CHANNELS
        if last == first:
            return None
        layout = "NHWC" if last else "NCHW"
        reason = f"{shape[3] if last else shape[1]} channel(s) on the {'last' if last else 'second'} axis"
    places = (1, 2, 3) if layout == "NHWC" else (2, 3, 1)
    height, width, channels = (shape[place] for place in places)
    if isinstance(channels, int) and channels not in CHANNELS:
        return None
    return ImageInput(name, layout, height, width, channels, reason)
