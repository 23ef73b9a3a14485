"""The sizes that a TensorRT engine is built for: one profile, from the batch size and [build.shapes]. Pure; knows no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from appliance.building.orders import BuildError
from appliance.core.manifest import ModelManifest, ShapeRange

DEFAULT_MAX_BATCH_SIZE = 32
"""As ONNX Runtime proposes it for a free batch axis, so that both engines take the same batches."""

Shape = tuple[int, ...]


class InputRange(msgspec.Struct, frozen=True):
    """One input's sizes; -1 does not occur."""

    name: str
    min: Shape
    opt: Shape
    max: Shape


def profile(inputs: Sequence[tuple[str, Shape]], manifest: ModelManifest) -> tuple[InputRange, ...]:
    """The range of every input with a free axis (-1), in the network's order; empty for a model of fixed sizes.

    BuildError where a range is missing, names no input, or does not fit.
    """
    ranges = manifest.build.shapes
    names = [name for name, _ in inputs]
    for name in ranges:
        if name not in names:
            raise BuildError(f"[build.shapes.{toml_key(name)}] names no input of the model; it has {', '.join(names)}")
    largest = manifest.batching.max_batch_size or DEFAULT_MAX_BATCH_SIZE
    found = []
    for name, shape in inputs:
        given = ranges.get(name)
        if given is not None:
            found.append(_given(name, shape, given))
        elif -1 in shape[1:]:
            raise BuildError(_missing(name, shape, largest))
        elif -1 in shape:
            found.append(InputRange(name, (1, *shape[1:]), (largest, *shape[1:]), (largest, *shape[1:])))
    return tuple(found) if any(-1 in shape for _, shape in inputs) else ()


def _given(name: str, shape: Shape, given: ShapeRange) -> InputRange:
    """A range of the manifest, checked against the input's declared shape."""
    opt = given.opt or given.max
    here = f"[build.shapes.{toml_key(name)}]"
    for key, sizes in (("min", given.min), ("max", given.max), ("opt", opt)):
        if len(sizes) != len(shape):
            raise BuildError(f"{here} {key} has {len(sizes)} sizes, the input has {len(shape)} axes: {_words(shape)}")
        for axis, (size, fixed) in enumerate(zip(sizes, shape, strict=True)):
            if fixed not in (-1, size):
                raise BuildError(
                    f"{here} {key} has {size} on axis {axis}, where the model has {fixed} and nothing else"
                )
    if not all(low <= mid <= high for low, mid, high in zip(given.min, opt, given.max, strict=True)):
        raise BuildError(f"{here} must have min <= opt <= max on every axis: {given.min}, {opt}, {given.max}")
    return InputRange(name, given.min, opt, given.max)


def _missing(name: str, shape: Shape, largest: int) -> str:
    low = ", ".join("1" if size == -1 else str(size) for size in shape)
    high = ", ".join(str(largest) if axis == 0 and size == -1 else "..." if size == -1 else str(size)
                     for axis, size in enumerate(shape))  # fmt: skip
    axes = ", ".join(str(axis) for axis, size in enumerate(shape) if size == -1 and axis)
    return (
        f"input {name!r} leaves axis {axes} free ({_words(shape)}), and an engine is built for a range: write "
        f"[build.shapes.{toml_key(name)}] with min = [{low}] and max = [{high}] into model.toml"
    )


def toml_key(name: str) -> str:
    """A name as TOML wants it in a table's header."""
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else f'"{name}"'


def _words(shape: Shape) -> str:
    return "(" + ", ".join("free" if size == -1 else str(size) for size in shape) + ")"


def described(ranges: Mapping[str, InputRange]) -> str:
    """A line for the log."""
    return "; ".join(f"{r.name} {list(r.min)} to {list(r.max)}, best at {list(r.opt)}" for r in ranges.values())
