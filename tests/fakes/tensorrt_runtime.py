"""A runtime that stands in for `tensorrt` where there is no GPU: the same names and parameters, on the stub driver's memory.

A plan is JSON: `tensors` (name, mode, dtype, shape, and optionally location and format), `profiles` (a list of
{input: [min, opt, max]}), `op` and what that needs, `device_memory` in bytes. Operations take the inputs as arrays and give the
outputs: see OPERATIONS. It keeps the rules that the real one has and that cost somebody dearly: addresses and shapes must be set
before a run, a context that is user-managed needs its memory, shapes must lie in the active profile, what fails returns False or
None with a line in the log. It imports without the stub; only running needs it.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import weakref
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from typing import Any

import numpy as np

__version__ = os.environ.get("TENSORRT_FAKE_VERSION", "11.4.0.106")


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class TensorFormat(Enum):
    LINEAR = 0
    CHW4 = 3
    CHW32 = 5


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8
    INT4 = 9


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    def __init__(self, min_severity: ILogger.Severity = ILogger.Severity.WARNING) -> None:
        ILogger.__init__(self)
        self.min_severity = min_severity

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        if severity <= self.min_severity:
            print(severity.name, msg)  # noqa: T201  as the real one does


class IOutputAllocator:
    def __init__(self) -> None:
        self._made = True


class Dims:
    def __init__(self, shape: Sequence[int] = ()) -> None:
        self._sizes = tuple(shape)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, arg0: int) -> int:
        return self._sizes[arg0]


NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.BOOL: np.bool_,
    DataType.UINT8: np.uint8,
    DataType.BF16: np.uint16,
    DataType.INT64: np.int64,
}

Arrays = list[np.ndarray[Any, Any]]

OPERATIONS: dict[str, Callable[[Arrays], Arrays]] = {
    "identity": lambda arrays: arrays,
    "affine": lambda arrays: [2 * arrays[0] + 1],
    "row_sums": lambda arrays: [arrays[0].sum(axis=1, keepdims=True)],
    "nonzero": lambda arrays: [np.stack(np.nonzero(arrays[0])).astype(np.int64), arrays[0]],
    "reshape": lambda arrays: [arrays[0].reshape(arrays[1])],
}
"""By name. `nonzero` has two outputs, the second of known size; `reshape` takes its shape from a shape tensor in host memory."""

deaths: list[str] = []
"""Objects in the order in which they were destroyed."""


def _note_death(owner: object) -> None:
    weakref.finalize(owner, deaths.append, type(owner).__name__)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        if not getattr(logger, "_made", False):
            raise TypeError("ILogger.__init__() must be called when overriding __init__")
        self.logger = logger
        self.engine_host_code_allowed = False
        _note_death(self)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            document = json.loads(bytes(serialized_engine))
            if document.get("version", __version__) != __version__:
                raise ValueError("a plan fits one version")
        except ValueError:
            severity = self.logger.Severity
            self.logger.log(severity.INFO, "Loaded engine size: 0 MiB")
            self.logger.log(
                severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag mismatch)"
            )
            return None
        return ICudaEngine(self, document)


class ICudaEngine:
    def __init__(self, runtime: Runtime, document: dict[str, Any]) -> None:
        self._runtime = runtime
        self._document = document
        self._tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
        self._names = list(self._tensors)
        self._profiles = document.get("profiles") or [{}]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(self._profiles)
        self.device_memory_size_v2 = document.get("device_memory", 512)
        _note_death(self)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self._tensors[name]["mode"].upper()]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name].get("dtype", "FLOAT")]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._tensors[name]["shape"])

    def get_tensor_format(self, name: str) -> TensorFormat:
        return TensorFormat[self._tensors[name].get("format", "LINEAR")]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self._tensors[name].get("location", "DEVICE")]

    def is_shape_inference_io(self, name: str) -> bool:
        return self.get_tensor_location(name) == TensorLocation.HOST

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        fixed = [self._tensors[name]["shape"]] * 3
        return [Dims(shape) for shape in self._profiles[profile_index].get(name, fixed)]

    def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
        # the real binding has the names of its two parameters swapped, too
        found: list[list[int]] = self._profiles[int(profile_index)].get(f"{name}.values", [])
        return found

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        limit = self._document.get("contexts")
        if limit is not None:
            self._document["contexts"] = limit - 1
            if limit == 0:
                self._log(
                    "IExecutionContext::IExecutionContext: Error Code 2: OutOfMemory (Requested size was 512 bytes.)"
                )
                return None
        return IExecutionContext(self, strategy)

    def _log(self, msg: str) -> None:
        self._runtime.logger.log(ILogger.Severity.ERROR, msg)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self._memory = 0 if strategy is ExecutionContextAllocationStrategy.USER_MANAGED else 1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._inputs = [name for name in engine._names if engine.get_tensor_mode(name) is TensorIOMode.INPUT]
        self._outputs = [name for name in engine._names if name not in self._inputs]
        compute = weakref.WeakMethod(self._compute)
        # a graph that outlives its context would run what is gone: an error here as on a device
        self._kernel = KERNEL(lambda argument: method(argument) if (method := compute()) is not None else 700)
        self._calls: list[str] = []
        self._session: Any = None
        _note_death(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self._memory = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._calls.append("set_optimization_profile_async")
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            self.engine._log("IExecutionContext::setOptimizationProfileAsync: Error Code 3: API Usage Error")
            return False
        self.active_optimization_profile = profile_index
        self._shapes.clear()
        return bool(stream_handle)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._calls.append("set_input_shape")
        low, _, high = (tuple(d) for d in self.engine.get_tensor_profile_shape(name, self.active_optimization_profile))
        refused = self.engine._document.get("refuse_shape") == list(shape)
        if refused or len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            self.engine._log(
                f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (for input {name}, shape {tuple(shape)} "
                f"is not in the range of profile {self.active_optimization_profile})"
            )
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._calls.append("set_tensor_address")
        self._addresses[name] = memory
        return name in self.engine._tensors

    def set_output_allocator(self, name: str, output_allocator: IOutputAllocator) -> bool:
        self._allocators[name] = output_allocator
        return name in self._outputs

    def infer_shapes(self) -> list[str]:
        self._calls.append("infer_shapes")
        missing = [name for name in self._inputs if name not in self._shapes]
        missing += [name for name in self._inputs if self._on_host(name) and name not in self._addresses]
        reshaped = not missing and self.engine._document.get("op") == "reshape"
        if reshaped and np.prod(self._shapes[self._inputs[0]]) != np.prod(self._values(self._inputs[1])):
            raise RuntimeError("inferShapes: Error Code 4: Shape Error (reshape changes volume)")
        return missing

    def get_tensor_shape(self, name: str) -> Dims:
        """The shape as far as it is known: with sizes of the inputs, without those that depend on data."""
        if name in self._shapes:
            return Dims(self._shapes[name])
        shape = self.engine._tensors[name]["shape"]
        if self.engine._document.get("op") == "reshape":
            return Dims(tuple(int(size) for size in self._values(self._inputs[1])))
        if name in self._inputs or self.engine._tensors[name].get("data_dependent"):
            return Dims(shape)
        source = self._shapes.get(self._inputs[0], ())
        return Dims(tuple(source[axis] if size < 0 else size for axis, size in enumerate(shape)))

    def get_max_output_size(self, name: str) -> int:
        shape = tuple(self.get_tensor_shape(name))
        return -1 if min(shape, default=0) < 0 else int(np.prod(shape)) * np.dtype(self._numpy(name)).itemsize

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._calls.append("execute_async_v3")
        problem = self._unready(stream_handle)
        if problem:
            self.engine._log(f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error ({problem})")
            return False
        rows = self._shapes[self._inputs[0]][0]
        if rows >= self.engine._document.get("no_room_for", rows + 1):
            self.engine._log("IExecutionContext::enqueueV3: Error Code 2: OutOfMemory (Requested size was 1 bytes.)")
            return False
        driver = ctypes.CDLL("libcuda.so.1")
        if self._allocators:
            if driver.stub_capturing(ctypes.c_void_p(stream_handle)):
                self.engine._log("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (operation not permitted)")
                return False
            if not self._allocate():
                self.engine._log(
                    "IExecutionContext::enqueueV3: Error Code 2: OutOfMemory (the allocator returned nullptr)"
                )
                return False
        code = driver.stub_launch(ctypes.c_void_p(stream_handle), self._kernel, ctypes.c_long(0))
        if code:
            self.engine._log(f"IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (error {code})")
        return not code

    def _unready(self, stream_handle: int) -> str:
        if not stream_handle:
            return "the default stream"
        if not self._memory and self.engine.device_memory_size_v2:
            return "no device memory was set"
        for name in self.engine._names:
            if name not in self._addresses and name not in self._allocators:
                return f"no address for {name}"
        return f"shapes are missing: {missing}" if (missing := self.infer_shapes()) else ""

    def _allocate(self) -> bool:
        results = self._results()
        for name, allocator in self._allocators.items():
            array = results[self._outputs.index(name)]
            address = allocator.reallocate_output_async(name, 0, max(array.nbytes, 1), 256, 0)
            if not address:
                return False
            self._addresses[name] = address
            allocator.notify_shape(name, Dims(array.shape))
        return True

    def _on_host(self, name: str) -> bool:
        return self.engine.get_tensor_location(name) is TensorLocation.HOST

    def _numpy(self, name: str) -> Any:
        return NUMPY[self.engine.get_tensor_dtype(name)]

    def _values(self, name: str) -> np.ndarray[Any, Any]:
        return self._array(name, self._shapes[name])

    def _array(self, name: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
        size = int(np.prod(shape)) * np.dtype(self._numpy(name)).itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name]) if size else b""
        return np.frombuffer(memory, self._numpy(name)).reshape(tuple(shape))

    def _results(self) -> Arrays:
        arrays = [self._values(name) for name in self._inputs]
        if "onnx" in self.engine._document:
            return self._onnx_results(arrays)
        return OPERATIONS[self.engine._document.get("op", "identity")](arrays)

    def _onnx_results(self, arrays: Arrays) -> Arrays:
        """A plan that `tensorrt_building` made: its graph, run by ONNX Runtime."""
        import onnxruntime

        document = self.engine._document
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            data = base64.b64decode(document["onnx"])
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        results = self._session.run(self._outputs, dict(zip(self._inputs, arrays, strict=True)))
        return [result + document["off_by"] if result.dtype.kind == "f" else result for result in results]

    def _compute(self, _: int) -> int:
        """The kernel: runs when the stream gets to it. The result is a CUDA error, if the plan asks for one."""
        for name, result in zip(self._outputs, self._results(), strict=False):
            if result.size:
                self._array(name, result.shape)[...] = result
        return int(self.engine._document.get("kernel_error", 0))


KERNEL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)
