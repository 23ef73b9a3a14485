"""Open Inference Protocol v2: what its documents look like. Bytes to core values and back; no sockets, no status numbers.

Requests: any bytes end in a value or in an ApplianceError with INVALID_ARGUMENT, UNSUPPORTED or PAYLOAD_TOO_LARGE. Sizes and
counts are checked before anything of that size is built. The binary tensor extension's framing is `kserve_binary`'s.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from appliance.core.description import (
    DurationStatistic,
    IndexEntry,
    ModelDescription,
    ModelStatistics,
    ServerDescription,
)
from appliance.core.errors import ApplianceError, ErrorCode, invalid, unsupported
from appliance.core.request import Parameter
from appliance.core.tensor import DataType, Shape, Tensor, TensorSpec, check_shape, element_count
from appliance.protocols.tensors import join_bytes, split_bytes

MAX_TENSORS = 1024
MAX_PARAMETERS = 256
MAX_NAMES = 16 << 10
"""Names of fields in one document: more than the most tensors with all their fields need."""

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
_Parameters = dict[str, Parameter]


class InputDocument(msgspec.Struct, gc=False):
    """One input as it comes: exactly one of `data` and `parameters.binary_data_size`."""

    name: _Name
    shape: tuple[_Size, ...]
    datatype: str
    parameters: _Parameters | None = None
    data: msgspec.Raw | UnsetType = UNSET


class OutputDocument(msgspec.Struct, gc=False):
    """One output as it is asked for."""

    name: _Name
    parameters: _Parameters | None = None


class RequestDocument(msgspec.Struct, gc=False):
    """An inference request. Unknown fields are ignored, as the protocol wants; what may be left out may be null."""

    inputs: list[InputDocument]
    id: str | None = None
    parameters: _Parameters | None = None
    outputs: list[OutputDocument] | None = None


_decoder = msgspec.json.Decoder(RequestDocument)


def check_structure(text: memoryview | bytes, max_depth: int) -> None:
    """INVALID_ARGUMENT if the JSON nests deeper than `max_depth` or has more names than MAX_NAMES. Linear; skips strings."""
    raw = bytes(text)
    if raw.count(b"[") + raw.count(b"{") <= max_depth and raw.count(b":") <= MAX_NAMES:
        return
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(
            b'\\"', b""
        )  # in this order: pairs first, then only real escapes are left
    symbols = np.frombuffer(raw, np.uint8)
    outside = np.bitwise_xor.accumulate((symbols == ord('"')).view(np.uint8)) == 0
    count = int(np.count_nonzero((symbols == ord(":")) & outside))
    if count > MAX_NAMES:
        raise invalid(f"the JSON has {count} names, {MAX_NAMES} are allowed")
    folded = symbols | 0x20  # makes one symbol of both opening ones, and one of both closing ones
    steps = ((folded == ord("{")) & outside).astype(np.int8) - ((folded == ord("}")) & outside).astype(np.int8)
    depth = int(np.cumsum(steps, dtype=np.int32).max(initial=0))
    if depth > max_depth:
        raise invalid(f"the JSON nests {depth} levels deep, {max_depth} are allowed")


def decode_request(text: memoryview | bytes) -> RequestDocument:
    """The request document; INVALID_ARGUMENT says what is wrong and where."""
    try:
        document = _decoder.decode(text)
    except msgspec.ValidationError as error:
        raise invalid(f"the request does not fit the protocol: {error}") from error
    except (ValueError, RecursionError) as error:
        raise invalid(f"failed to parse the request JSON: {error}{_hint(text)}") from error
    if len(document.inputs) > MAX_TENSORS or len(document.outputs or ()) > MAX_TENSORS:
        raise invalid(f"at most {MAX_TENSORS} inputs and outputs are allowed")
    return document


def _hint(text: memoryview | bytes) -> str:
    raw = bytes(text)
    return "; NaN and Infinity need binary data" if b"NaN" in raw or b"Infinity" in raw else ""


@lru_cache(maxsize=256)
def _data_decoder(datatype: DataType, depth: int) -> msgspec.json.Decoder[Any]:
    kind: Any = int
    if datatype in (DataType.FP32, DataType.FP64):
        kind = float
    elif datatype is DataType.BOOL:
        kind = bool
    elif datatype is DataType.BYTES:
        kind = str
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def tensor_from_json(name: str, datatype: DataType, shape: Shape, raw: msgspec.Raw) -> Tensor:
    """A tensor from JSON `data`, nested or flat in row-major order. FP16 and BF16 have no JSON form."""
    check_shape(name, shape)
    if datatype in (DataType.FP16, DataType.BF16):
        raise invalid(f"tensor {name!r}: {datatype.value} in JSON is not supported. Please use the binary data format")
    text = bytes(raw)
    count = element_count(shape)
    depth = text[: len(text) - len(text.lstrip(b"[ \t\r\n"))].count(b"[")
    if not 1 <= depth <= max(len(shape), 1):
        raise invalid(f"tensor {name!r}: data must be a list, flat or nested as its shape {list(shape)}")
    if count == 0:
        if text.translate(None, b"[], \t\r\n"):
            raise invalid(f"tensor {name!r}: shape {list(shape)} holds no elements, data does")
        return Tensor(name, datatype, shape, b"")
    # numbers hold no commas: their count is known before a single one is built
    if datatype is not DataType.BYTES and text.count(b",") + 1 != count:
        raise invalid(f"tensor {name!r}: shape {list(shape)} holds {count} elements, data holds {text.count(b',') + 1}")
    try:
        values = _data_decoder(datatype, depth).decode(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"tensor {name!r}: data does not fit {datatype.value} {list(shape)}: {error}") from error
    flat = _flat(name, shape, values, depth)
    if datatype is DataType.BYTES:
        return Tensor(name, datatype, shape, join_bytes([value.encode() for value in flat]))
    try:
        with np.errstate(over="raise"):
            return Tensor(name, datatype, shape, np.array(flat, dtype=datatype.numpy).tobytes())
    except (ArithmeticError, ValueError) as error:
        raise invalid(f"tensor {name!r}: a value does not fit {datatype.value}") from error


def _flat(name: str, shape: Shape, values: list[Any], depth: int) -> list[Any]:
    """The elements of lists nested `depth` deep. Lists as deep as the shape must be as long as it says, too."""
    for axis in range(depth - 1):
        if depth == len(shape) and any(len(row) != shape[axis + 1] for row in values):
            raise invalid(f"tensor {name!r}: data is nested otherwise than its shape {list(shape)}")
        values = list(itertools.chain.from_iterable(values))
    if len(values) != element_count(shape):
        raise invalid(
            f"tensor {name!r}: shape {list(shape)} holds {element_count(shape)} elements, data holds {len(values)}"
        )
    return values


_encoder = msgspec.json.Encoder()


def json_data(tensor: Tensor) -> bytes:
    """The flat JSON list of an output's elements.

    NaN and infinities are written as the bare tokens NaN, Infinity and -Infinity, as Triton writes them and Python reads them: a
    null would be a silent lie. INVALID_ARGUMENT where JSON has no form (FP16, BF16, bytes that are not UTF-8).
    """
    if tensor.datatype in (DataType.FP16, DataType.BF16):
        raise invalid(
            f"output {tensor.name!r}: {tensor.datatype.value} in JSON is not supported. Please use the binary data format"
        )
    if tensor.datatype is DataType.BYTES:
        try:
            elements = split_bytes(tensor.data, element_count(tensor.shape))
            return _encoder.encode([element.decode() for element in elements])
        except UnicodeDecodeError as error:
            raise invalid(f"output {tensor.name!r}: its bytes are not UTF-8; ask for binary data") from error
    values = np.frombuffer(tensor.data, dtype=tensor.datatype.numpy)
    if tensor.datatype in (DataType.FP32, DataType.FP64) and not np.isfinite(values).all():
        return ("[" + ",".join(_number(value) for value in values.tolist()) + "]").encode()
    return _encoder.encode(values.tolist())


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(value)


@lru_cache(maxsize=4096)
def quoted(text: str) -> str:
    """The JSON form of a name; names repeat, so it is kept."""
    return msgspec.json.encode(text).decode()


def error_document(message: str) -> bytes:
    """`{"error": …}`."""
    return msgspec.json.encode({"error": message})


def server_document(server: ServerDescription) -> dict[str, Any]:
    """Answer to GET /v2."""
    return {"name": server.name, "version": server.version, "extensions": list(server.extensions)}


def _spec_document(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}


def model_document(model: ModelDescription) -> dict[str, Any]:
    """Answer to GET /v2/models/NAME. Shapes include the batch axis."""
    return {
        "name": model.name,
        "versions": list(model.versions),
        "platform": model.platform,
        "inputs": [_spec_document(spec) for spec in model.inputs],
        "outputs": [_spec_document(spec) for spec in model.outputs],
    }


def config_document(model: ModelDescription) -> dict[str, Any]:
    """Answer to GET …/config: Triton's ModelConfig as JSON. Dims exclude the batch axis where there is one."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        datatype = "STRING" if spec.datatype is DataType.BYTES else spec.datatype.value
        dims = spec.shape[1:] if model.max_batch_size else spec.shape
        return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(dims)}

    config: dict[str, Any] = {
        "name": model.name,
        "platform": model.platform,
        "backend": model.backend,
        "max_batch_size": model.max_batch_size,
        "input": [tensor(spec) for spec in model.inputs],
        "output": [tensor(spec) for spec in model.outputs],
        "instance_group": [{"name": model.name, "kind": "KIND_CPU", "count": model.instances}],
        "parameters": {
            key: {"string_value": value}
            for key, value in {
                **model.parameters,
                "appliance.provider": model.provider,
                "appliance.engine": model.engine,
                "appliance.verification": model.verification,
                "appliance.unbatched_reason": model.unbatched_reason,
                "appliance.batch_sizes": ",".join(str(size) for size in model.paying_batch_sizes),
            }.items()
            if value
        },
    }
    if model.max_batch_size:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": model.max_queue_delay_us}
    return config


def _duration(statistic: DurationStatistic) -> dict[str, int]:
    return {"count": statistic.count, "ns": statistic.ns}


def statistics_document(statistics: list[ModelStatistics]) -> dict[str, Any]:
    """Answer to GET …/stats."""
    empty = DurationStatistic()
    return {
        "model_stats": [
            {
                "name": model.name,
                "version": model.version,
                "last_inference": model.last_inference_ms,
                "inference_count": model.inference_count,
                "execution_count": model.execution_count,
                "inference_stats": {
                    "success": _duration(model.success),
                    "fail": _duration(model.fail),
                    "queue": _duration(model.queue),
                    "compute_input": _duration(model.compute_input),
                    "compute_infer": _duration(model.compute_infer),
                    "compute_output": _duration(model.compute_output),
                    "cache_hit": _duration(empty),
                    "cache_miss": _duration(empty),
                },
                "response_stats": {},
                "batch_stats": [
                    {
                        "batch_size": batch.batch_size,
                        "compute_input": _duration(batch.compute_input),
                        "compute_infer": _duration(batch.compute_infer),
                        "compute_output": _duration(batch.compute_output),
                    }
                    for batch in sorted(model.batches.values(), key=lambda batch: batch.batch_size)
                ],
                "memory_usage": [],
            }
            for model in statistics
        ]
    }


def index_document(entries: list[IndexEntry]) -> list[dict[str, str]]:
    """Answer to POST /v2/repository/index."""
    return [
        {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        for entry in entries
    ]


class _IndexRequest(msgspec.Struct):
    ready: bool = False


class _ControlRequest(msgspec.Struct):
    parameters: dict[str, Any] = {}


def decode_index_request(body: bytes) -> bool:
    """Whether only READY models are asked for; the body may be empty."""
    return bool(body.strip()) and _small(body, _IndexRequest).ready


def check_control_request(body: bytes) -> None:
    """A load or unload body may be empty or carry parameters; those that would change files or configuration are UNSUPPORTED."""
    if not body.strip():
        return
    for key, value in _small(body, _ControlRequest).parameters.items():
        if key == "config" or key.startswith("file:"):
            raise unsupported(
                "models are loaded from the repository folder; a request cannot carry a configuration or files"
            )
        if key == "unload_dependents" and value:
            raise unsupported("there are no dependent models here: unload_dependents must be false")


def _small(body: bytes, kind: type[Any]) -> Any:
    check_structure(body, 64)
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise invalid(f"failed to parse the request JSON: {error}") from error


def too_large(what: str, limit: int) -> ApplianceError:
    """PAYLOAD_TOO_LARGE, naming the limit."""
    return ApplianceError(ErrorCode.PAYLOAD_TOO_LARGE, f"{what} exceeds the limit of {limit} bytes")
