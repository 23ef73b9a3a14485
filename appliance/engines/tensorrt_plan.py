"""What a deserialized TensorRT engine takes and gives: its tensors in the protocol's words, and its optimization profiles.

Read once at load; no memory, no stream, no context. Driven by `tensorrt`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from appliance.core.tensor import DataType, Shape, TensorSpec
from appliance.engines import tensorrt_library as library
from appliance.engines.base import EngineError

DATATYPES: dict[str, DataType] = {
    "FLOAT": DataType.FP32,
    "HALF": DataType.FP16,
    "BF16": DataType.BF16,
    "INT8": DataType.INT8,
    "INT32": DataType.INT32,
    "INT64": DataType.INT64,
    "UINT8": DataType.UINT8,
    "BOOL": DataType.BOOL,
}
"""By the name of TensorRT's own type. FP8, FP4, INT4 and E8M0 exist inside a network but not in the protocol."""


class PlanTensor(msgspec.Struct, frozen=True):
    """An input or an output. `on_host`: the library reads or writes it in host memory, since shapes are computed from it."""

    spec: TensorSpec
    on_host: bool


class Profile(msgspec.Struct, frozen=True):
    """One optimization profile: smallest and largest shape by input; smallest and largest values by shape tensor."""

    shapes: dict[str, tuple[Shape, Shape]]
    values: dict[str, tuple[Shape, Shape]]

    def holds(self, shapes: Sequence[tuple[str, Shape]]) -> bool:
        """Whether inputs of these shapes can run under it."""
        return all(_within(shape, *self.shapes[name]) for name, shape in shapes if name in self.shapes)


def _within(sizes: Shape, smallest: Shape, largest: Shape) -> bool:
    return len(sizes) == len(smallest) and all(
        low <= size <= high for size, low, high in zip(sizes, smallest, largest, strict=True)
    )


class Plan(msgspec.Struct, frozen=True):
    """The engine as it presents itself."""

    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    profiles: tuple[Profile, ...]

    @property
    def has_shape_tensors(self) -> bool:
        """Whether values in host memory take part, so that shapes must be inferred anew for every run."""
        return any(tensor.on_host for tensor in (*self.inputs, *self.outputs))

    def profile_for(self, shapes: Sequence[Shape]) -> int:
        """The first profile that holds inputs of these shapes. EngineError that says what the profiles take."""
        named = [(tensor.spec.name, shape) for tensor, shape in zip(self.inputs, shapes, strict=True)]
        for index, profile in enumerate(self.profiles):
            if profile.holds(named):
                return index
        came = ", ".join(f"{name!r} has shape {list(shape)}" for name, shape in named)
        raise EngineError(f"no optimization profile of this plan holds the batch: {came}; it takes {self.ranges()}")

    def ranges(self) -> str:
        """What the profiles hold, for people: "image [1, 4] to [32, 4]; or …"."""
        return "; or ".join(
            ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, high) in profile.shapes.items())
            for profile in self.profiles
        )

    def unbatched_reason(self, data_dependent: Sequence[str]) -> str:
        """Why batches cannot be formed for this engine, in words for its owner; empty if they can."""
        if not self.inputs:
            return "the model takes no input"
        if data_dependent:
            return f"the size of output {data_dependent[0]!r} depends on the data"
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                name, shape = tensor.spec.name, tensor.spec.shape
                if tensor.on_host:
                    return f"{kind} {name!r} is a shape tensor: its values hold for a whole batch"
                if not shape:
                    return f"{kind} {name!r} is a scalar: it has no batch axis"
                if shape[0] >= 0:
                    return (
                        f"{kind} {name!r} has its first axis fixed at {shape[0]} in this plan; "
                        "build it for a range of batch sizes"
                    )
        return ""

    def max_rows(self) -> int:
        """The largest batch that a profile holds; only where batches can be formed."""
        return max(min(high[0] for _, high in profile.shapes.values()) for profile in self.profiles)


def read(engine: Any) -> Plan:
    """The plan of an `ICudaEngine`. EngineError if it has a tensor that cannot be served, with what to do."""
    trt = library.trt
    inputs: list[PlanTensor] = []
    outputs: list[PlanTensor] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs).append(_tensor(engine, name))
    profiles = tuple(_profile(engine, inputs, index) for index in range(engine.num_optimization_profiles))
    return Plan(tuple(inputs), tuple(outputs), profiles or (Profile({}, {}),))


def _tensor(engine: Any, name: str) -> PlanTensor:
    trt = library.trt
    kind = engine.get_tensor_dtype(name).name
    datatype = DATATYPES.get(kind)
    if datatype is None:
        raise EngineError(
            f"tensor {name!r} is {kind}, which the protocol has no datatype for: "
            "export the model with FP16 or FP32 inputs and outputs"
        )
    layout = engine.get_tensor_format(name)
    if layout != trt.TensorFormat.LINEAR:
        raise EngineError(f"tensor {name!r} has the format {layout.name}: build the plan without DIRECT_IO formats")
    shape = tuple(int(size) if size >= 0 else -1 for size in engine.get_tensor_shape(name))
    return PlanTensor(TensorSpec(name, datatype, shape), engine.get_tensor_location(name) == trt.TensorLocation.HOST)


def _profile(engine: Any, inputs: Sequence[PlanTensor], index: int) -> Profile:
    shapes, values = {}, {}
    for tensor in inputs:
        name = tensor.spec.name
        low, _, high = (tuple(int(size) for size in shape) for shape in engine.get_tensor_profile_shape(name, index))
        shapes[name] = (low, high)
        if tensor.on_host and engine.is_shape_inference_io(name):
            # positionally: some versions have the two keywords swapped
            found = engine.get_tensor_profile_values(name, index)
            if found:
                values[name] = (tuple(found[0]), tuple(found[2]))
    return Profile(shapes, values)


def nbytes(datatype: DataType, shape: Shape) -> int:
    """Bytes of a tensor of that shape."""
    return math.prod(shape) * datatype.itemsize
