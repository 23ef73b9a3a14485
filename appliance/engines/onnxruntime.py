"""ONNX Runtime as an engine: the only home of `onnxruntime`.

Inputs and outputs are bound to the worker's shared memory, so on the CPU nothing is copied. Spinning is off unless asked for:
measured at 33 requests/s it costs 31 % of a core instead of 1.2 %, for the same median.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from appliance.core.tensor import DataType, Shape, TensorSpec, element_count
from appliance.engines import providers
from appliance.engines.base import (
    DeviceFaultError,
    EngineBatch,
    EngineError,
    EngineOptions,
    EngineOutput,
    EngineTensor,
    EngineTraits,
    OutOfMemoryError,
    OutputMismatchError,
)
from appliance.engines.cuda_codes import FAULTS
from appliance.engines.wording import clean

DEFAULT_MAX_BATCH_SIZE = 32
KEPT_BINDINGS = 128

ORT_TYPES: dict[str, DataType] = {
    "tensor(bool)": DataType.BOOL,
    "tensor(uint8)": DataType.UINT8,
    "tensor(uint16)": DataType.UINT16,
    "tensor(uint32)": DataType.UINT32,
    "tensor(uint64)": DataType.UINT64,
    "tensor(int8)": DataType.INT8,
    "tensor(int16)": DataType.INT16,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(float16)": DataType.FP16,
    "tensor(bfloat16)": DataType.BF16,
    "tensor(float)": DataType.FP32,
    "tensor(double)": DataType.FP64,
    "tensor(string)": DataType.BYTES,
}

ONNX_BFLOAT16 = 16
"""TensorProto.BFLOAT16: numpy has no such type, so bindings name it by ONNX's number."""

CUDA_FAILURE = re.compile(r"CUDA failure (\d+)")
SOURCE_PLACE = re.compile(r" ; GPU=\d+ ; hostname=.*?(?= ; expr=|$)", re.DOTALL)
"""The library's form: "CUDA failure 700: an illegal memory access … ; GPU=0 ; hostname=… ; file=… ; line=… ; expr=…"."""

NO_ROOM = re.compile(r"CUDA failure 2\b|Failed to allocate memory|Available memory of|bad_alloc|ALLOC_FAILED")

OPTIMIZATION = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

ort.set_default_logger_severity(3)


THREADS_PAY_S = 0.002
"""Runs shorter than this are not split over threads: handing parts to sleeping threads and back costs more than it saves."""


def session_options(options: EngineOptions, threads: int) -> ort.SessionOptions:
    """Options for a server that idles: so many threads for one operator, and no spinning unless the manifest wants it."""
    chosen = ort.SessionOptions()
    manifest = options.onnxruntime
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = manifest.inter_op_threads
    spinning = "1" if manifest.spinning else "0"
    chosen.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    chosen.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    chosen.graph_optimization_level = OPTIMIZATION[manifest.graph_optimization]
    chosen.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen.log_severity_level = 3
    return chosen


def _spec(value: Any) -> TensorSpec:
    datatype = ORT_TYPES.get(value.type)
    if datatype is None:
        raise EngineError(f"{value.name!r} is {value.type}; only tensors of the protocol's datatypes can be served")
    return TensorSpec(
        value.name, datatype, tuple(size if isinstance(size, int) and size >= 0 else -1 for size in value.shape)
    )


def unbatched_reason(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Why this model cannot be batched, in words for its owner; empty if it can."""
    for kind, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            if not spec.shape:
                return f"{kind} {spec.name!r} is a scalar: it has no batch axis"
            if spec.shape[0] >= 0:
                return (
                    f"{kind} {spec.name!r} has its first axis fixed at {spec.shape[0]}; "
                    "re-export the model with a dynamic batch axis to have it batched"
                )
    return "" if inputs else "the model takes no input"


class OnnxRuntimeEngine:
    """One session, bound to the worker's memory."""

    def __init__(self, options: EngineOptions) -> None:
        options, fallen_back = _where(options)
        try:
            self._session = _open(options)
            refused = providers.refused(self._session, options.device)
            if refused:
                options, fallen_back = _fall_back(options, refused)
                self._session = _open(options)
        except EngineError:
            raise
        except Exception as error:  # the library raises a dozen types of its own for a bad file; all mean the same here
            raise _failure(error, _words(error, options.model_file)) from error
        inputs = tuple(_spec(value) for value in self._session.get_inputs())
        outputs = tuple(_spec(value) for value in self._session.get_outputs())
        reason = unbatched_reason(inputs, outputs)
        if options.max_batch_size == 1 and not reason:
            reason = "max_batch_size is 1"
        self.traits = EngineTraits(
            platform="onnxruntime_onnx",
            backend="onnxruntime",
            provider=self._session.get_providers()[0],
            device=providers.device(self._session, options.device),
            inputs=inputs,
            outputs=outputs,
            batched=not reason,
            max_batch_size=1 if reason else options.max_batch_size or DEFAULT_MAX_BATCH_SIZE,
            unbatched_reason=reason,
            details={
                "intra_op_threads": str(self._session.get_session_options().intra_op_num_threads),
                "onnxruntime": ort.__version__,
                "nodes": _nodes(self._session),
                "fallback": fallen_back,
            },
        )
        self._output_names = [spec.name for spec in outputs]
        self._has_strings = any(spec.datatype is DataType.BYTES for spec in (*inputs, *outputs))
        self._bindings: OrderedDict[Hashable, Any] = OrderedDict()
        self._copies = providers.copies(self._session)
        self._kept: list[Any] = []

    def attach_memory(self, address: int, size: int) -> None:
        """What was bound lies in memory that may be gone."""
        self._bindings.clear()

    def run(self, batch: EngineBatch) -> Sequence[EngineOutput] | None:
        """Run one batch where it lies; strings go through numpy objects, since the library binds no string memory."""
        try:
            if self._has_strings:
                return self._run_objects(batch)
            binding = self._bindings.get(batch.key) if batch.key is not None else None
            if binding is None:
                binding = self._bind(batch)
            elif self._copies:
                _bind_inputs(binding, batch)
            # the wrapper's own method checks WebGPU capture on every call: 2 us that only that device needs
            self._session._sess.run_with_iobinding(binding._iobinding, None)
        except Exception as error:
            if batch.outputs is not None and not self._has_strings and "shape" in str(error).lower():
                raise OutputMismatchError(_words(error)) from error
            raise _failure(error, _words(error)) from error
        if batch.outputs is not None:
            return None
        return self._collect(binding)

    def _bind(self, batch: EngineBatch) -> Any:
        binding = self._session.io_binding()
        _bind_inputs(binding, batch)
        if batch.outputs is None:
            for name in self._output_names:
                binding.bind_output(name, "cpu")
        else:
            for tensor in batch.outputs:
                binding.bind_output(tensor.name, "cpu", 0, _element_type(tensor.datatype), tensor.shape, tensor.address)
        if batch.key is not None:
            self._bindings[batch.key] = binding
            if len(self._bindings) > KEPT_BINDINGS:
                self._bindings.popitem(last=False)
        return binding

    def _collect(self, binding: Any) -> list[EngineOutput]:
        """The outputs the library allocated. They live as long as the binding, which is kept until the next run."""
        self._kept = binding.get_outputs()
        outputs = []
        for spec, value in zip(self.traits.outputs, self._kept, strict=True):
            shape = tuple(int(size) for size in value.shape())
            nbytes = element_count(shape) * spec.datatype.itemsize
            data = (ctypes.c_char * nbytes).from_address(value.data_ptr()) if nbytes else b""
            outputs.append(EngineOutput(shape, memoryview(data).cast("B") if nbytes else b""))
        return outputs

    def _run_objects(self, batch: EngineBatch) -> list[EngineOutput]:
        feeds = {tensor.name: _to_array(tensor) for tensor in batch.inputs}
        results = self._session.run(self._output_names, feeds)
        outputs = []
        for spec, array in zip(self.traits.outputs, results, strict=True):
            shape: Shape = tuple(array.shape)
            if spec.datatype is DataType.BYTES:
                outputs.append(EngineOutput(shape, _encode_strings(array)))
            else:
                outputs.append(EngineOutput(shape, np.ascontiguousarray(array).tobytes()))
        return outputs

    def close(self) -> None:
        """Forget the session and everything bound to it."""
        self._bindings.clear()
        self._kept = []
        del self._session


def _bind_inputs(binding: Any, batch: EngineBatch) -> None:
    """Before every run where the library copies to a device: it does so when it binds, not when it runs, and would go on to run
    with what was copied first. Source: IOBinding::BindInput in onnxruntime/core/session/IOBinding.cc."""
    for tensor in batch.inputs:
        binding.bind_input(tensor.name, "cpu", 0, _element_type(tensor.datatype), tensor.shape, tensor.address)


def _where(options: EngineOptions) -> tuple[EngineOptions, str]:
    """The options with the device that can be had, and why it is another than asked for. EngineError: not allowed."""
    reason = providers.missing(options.device)
    return _fall_back(options, reason) if reason else (options, "")


def _fall_back(options: EngineOptions, reason: str) -> tuple[EngineOptions, str]:
    """The CPU instead, if the manifest allows that; EngineError with the reason otherwise."""
    if options.fallback != "cpu":
        raise EngineError(
            f'device = "{options.device}" cannot be had: {reason} (fallback = "cpu" in model.toml would allow the CPU)'
        )
    return msgspec.structs.replace(options, device="cpu"), f"{options.device} cannot be had: {reason}"


def _nodes(session: Any) -> str:
    return ", ".join(
        f"{name.removesuffix('ExecutionProvider')} {count}" for name, count in providers.node_counts(session).items()
    )


def _open(options: EngineOptions) -> Any:
    """The session. Where the manifest leaves the threads open: one for a short run, all cores for a long one."""
    wanted = options.onnxruntime.intra_op_threads
    session = _session(options, wanted or 1)
    if wanted or options.cores == 1:
        return session
    seconds = _seconds_of_one(session)
    if seconds is not None and seconds < THREADS_PAY_S:
        return session
    return _session(options, options.cores)


def _session(options: EngineOptions, threads: int) -> Any:
    return ort.InferenceSession(
        options.model_file,
        session_options(options, threads),
        providers=providers.wanted(options.device, options.onnxruntime),
    )


def _seconds_of_one(session: Any) -> float | None:
    """How long one row of zeros takes; None where shapes are not known or zeros are refused."""
    feeds = {}
    for value in session.get_inputs():
        spec = _spec(value)
        if spec.datatype.numpy is None or any(size < 0 for size in spec.shape[1:]):
            return None
        feeds[spec.name] = np.zeros([max(size, 1) for size in spec.shape], spec.datatype.numpy)
    try:
        session.run(None, feeds)
        started = time.perf_counter()
        session.run(None, feeds)
    except Exception:  # what is wrong with the model is found, and said, by the warm-up
        return None
    return time.perf_counter() - started


def _element_type(datatype: DataType) -> Any:
    return ONNX_BFLOAT16 if datatype is DataType.BF16 else np.dtype(datatype.numpy).type


def _to_array(tensor: EngineTensor) -> Any:
    if tensor.datatype is not DataType.BYTES:
        return np.frombuffer(tensor.view, dtype=tensor.datatype.numpy).reshape(tensor.shape)
    count = element_count(tensor.shape)
    array = np.empty(count, dtype=object)
    offset = 0
    for index in range(count):
        length = int.from_bytes(tensor.view[offset : offset + 4], "little")
        offset += 4
        # the library's strings are UTF-8 text; bytes that are not become replacement characters, never an exception
        array[index] = bytes(tensor.view[offset : offset + length]).decode(errors="replace")
        offset += length
    return array.reshape(tensor.shape)


def _encode_strings(array: Any) -> bytes:
    parts: list[bytes] = []
    for item in array.reshape(-1).tolist():
        encoded = item.encode() if isinstance(item, str) else bytes(item)
        parts += (len(encoded).to_bytes(4, "little"), encoded)
    return b"".join(parts)


def _failure(error: Exception, text: str) -> EngineError:
    """The exception for what the library raised: its words are all that it gives to tell them apart."""
    found = CUDA_FAILURE.search(str(error))
    if found and int(found[1]) in FAULTS:
        return DeviceFaultError(f"the GPU is lost to this process: {text}")
    return OutOfMemoryError(text) if NO_ROOM.search(str(error)) else EngineError(text)


def _words(error: Exception, model_file: str = "") -> str:
    """The library's message on one line of at most 500 characters, without host name, directories and places in its source."""
    text = SOURCE_PLACE.sub("", str(error))
    folder = str(Path(model_file).parent)
    if len(folder) > 1:
        # a directory's name may have blanks, which end a path elsewhere in a message
        text = text.replace(model_file, "the model").replace(folder, "the model's folder")
    return clean(" ".join(text.split()))[:500]
