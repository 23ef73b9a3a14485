"""An engine run in this process on plain arrays: for verification, where no daemon is in between.

The same engines, through the same protocol, as in a worker; only the memory is this process's own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.core.tensor import DataType, TensorSpec
from appliance.engines import registry
from appliance.engines.base import EngineBatch, EngineOptions, EngineTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

TIMED_RUNS = 50
TIMED_S = 0.5


class Runner:
    """A loaded engine. EngineError from the constructor and from `run` are the engine's own."""

    def __init__(self, options: EngineOptions) -> None:
        self._engine = registry.load(options)
        self.traits = self._engine.traits

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name, rows first. FP32 arrays for BF16, arrays of bytes objects for BYTES."""
        kept = []
        tensors = []
        for spec in self.traits.inputs:
            array = to_wire(feeds[spec.name], spec)
            kept.append(array)
            view = memoryview(array.reshape(-1).view(np.uint8).data if array.size else b"")
            shape = tuple(int(size) for size in feeds[spec.name].shape)
            tensors.append(EngineTensor(spec.name, spec.datatype, shape, view, int(array.ctypes.data)))
        rows = tensors[0].shape[0] if tensors and tensors[0].shape else 1
        results = self._engine.run(EngineBatch(None, rows, tuple(tensors), None))
        assert results is not None
        return {
            spec.name: from_wire(spec.datatype, result.shape, result.data)
            for spec, result in zip(self.traits.outputs, results, strict=True)
        }

    def seconds(self, feeds: Mapping[str, NDArray[Any]]) -> float:
        """The median time of a run on these inputs."""
        times: list[float] = []
        end = time.perf_counter() + TIMED_S
        while len(times) < TIMED_RUNS and (len(times) < 3 or time.perf_counter() < end):
            begun = time.perf_counter()
            self.run(feeds)
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 2]

    def close(self) -> None:
        """Give the engine back."""
        self._engine.close()


def to_wire(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """An array as that input's wire form: contiguous, little-endian; bytes for BYTES, upper halves of FP32 for BF16."""
    if spec.datatype is DataType.BYTES:
        parts = []
        for item in array.reshape(-1).tolist():
            data = item if isinstance(item, bytes) else str(item).encode()
            parts += [len(data).to_bytes(4, "little"), data]
        return np.frombuffer(b"".join(parts), np.uint8)
    if spec.datatype is DataType.BF16:
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        return np.ascontiguousarray(bits >> 16).astype(np.uint16)
    return np.ascontiguousarray(array, spec.datatype.numpy)


def from_wire(datatype: DataType, shape: tuple[int, ...], data: Any) -> NDArray[Any]:
    """A copy of an output's wire form as an array."""
    if datatype is DataType.BF16:
        bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if datatype is not DataType.BYTES:
        return np.frombuffer(data, datatype.numpy).reshape(shape).copy()
    view, offset, items = memoryview(data).cast("B"), 0, []
    while offset < len(view):
        length = int.from_bytes(view[offset : offset + 4], "little")
        items.append(bytes(view[offset + 4 : offset + 4 + length]))
        offset += 4 + length
    return np.array(items, dtype=object).reshape(shape)
