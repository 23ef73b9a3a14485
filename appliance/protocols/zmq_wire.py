"""AIP1, the ZeroMQ protocol: message frames to core values and back, for the server and for our own client.

It knows frames as buffers and nothing of sockets, peers or time. Any frames end in a value or in an `ApplianceError`, never in
another exception. `docs/wire-protocol.md` is the text of this protocol, `tests/protocols/golden/zmq` are messages to hold it to.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from appliance.core.description import IndexEntry, ModelDescription, ModelStatistics, ServerDescription
from appliance.core.errors import ApplianceError, ErrorCode, invalid, unsupported
from appliance.core.request import (
    InferenceRequest,
    InferenceResponse,
    ModelName,
    Parameter,
    RequestedOutput,
    RequestId,
    Timing,
    Version,
)
from appliance.core.tensor import DATATYPES, MAX_RANK, Buffer, DataType, Tensor, TensorSpec, datatype_of
from appliance.protocols.tensors import checked

PROTOCOL = b"AIP1"
PROTOCOL_NUMBER = 1
FEATURES = ("cancel", "classification", "events", "idem", "priority", "snapshot", "stream", "ttl")
OPERATIONS = ("infer", "hello", "ping", "models", "describe", "stats", "cancel", "snapshot")
HEARTBEAT_TOPIC = "heartbeat"
MAX_ENVELOPE_FRAMES = 8
"""Routing ids and a delimiter in front of the protocol frame: the peer's own and those of a few proxies."""
MAX_ROUTING_ID_BYTES = 255
MAX_CANCEL_IDS = 1024
DEFAULT_RETRY_AFTER_S = {ErrorCode.RESOURCE_EXHAUSTED: 0.02, ErrorCode.UNAVAILABLE: 1.0}
"""Answers with these codes always say when to come back, even if whoever refused did not."""

_SEQUENCE = struct.Struct(">Q")

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_ModelRef = Annotated[str, msgspec.Meta(max_length=128)]
_Id = Annotated[str, msgspec.Meta(max_length=128)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=86_400_000)]
_Priority = Annotated[int, msgspec.Meta(ge=0, le=16)]
_Parameters = dict[str, Parameter]


class TensorHeader(msgspec.Struct, gc=False):
    """One tensor in a header. `frame` counts tensor frames from 0; left out, it is the tensor's place in its list."""

    name: _Name
    datatype: str
    shape: tuple[_Size, ...]
    frame: Annotated[int, msgspec.Meta(ge=0, le=65_535)] | UnsetType = UNSET


class OutputHeader(msgspec.Struct, gc=False):
    """An output that the caller names, with `parameters.classification` if it wants the top classes."""

    name: _Name
    parameters: _Parameters | UnsetType = UNSET


class RequestHeader(msgspec.Struct, gc=False, omit_defaults=True):
    """A request's header: the union of what the operations take. Fields that we do not know are ignored.

    `ttl_ms` 0 and `priority` 0 mean the model's default.
    """

    op: str = ""
    id: _Id = ""
    model: _ModelRef = ""
    version: _ModelRef = ""
    ttl_ms: _Milliseconds = 0.0
    priority: _Priority = 0
    stream: Annotated[str, msgspec.Meta(max_length=256)] = ""
    idem: bool = True
    inputs: tuple[TensorHeader, ...] = ()
    outputs: tuple[OutputHeader, ...] = ()
    parameters: _Parameters | UnsetType = UNSET
    ids: Annotated[tuple[_Id, ...], msgspec.Meta(max_length=MAX_CANCEL_IDS)] = ()
    proto: tuple[int, ...] = ()
    client: Annotated[str, msgspec.Meta(max_length=256)] = ""


class _TimingHeader(msgspec.Struct, frozen=True, gc=False):
    queue: int = 0
    compute: int = 0


class _OutputTensor(msgspec.Struct, gc=False):
    name: str
    datatype: DataType
    shape: tuple[int, ...]
    frame: int


class _InferReply(msgspec.Struct):
    id: str
    ok: bool
    model: str
    version: str
    outputs: list[_OutputTensor]
    timing_us: _TimingHeader
    boot: str
    parameters: _Parameters | UnsetType = UNSET


class _ErrorReply(msgspec.Struct, gc=False):
    id: str
    ok: bool
    code: ErrorCode
    message: str
    boot: str
    retry_after_ms: int | UnsetType = UNSET


class _AnyId(msgspec.Struct):
    id: Any = ""


class _AnyReply(msgspec.Struct):
    """What a client needs of any reply; the fields of one operation are read from the same bytes by their own decoder."""

    id: str = ""
    ok: bool = False
    boot: str = ""
    code: str = "INTERNAL"
    message: str = ""
    retry_after_ms: float | None = None
    model: str = ""
    version: str = ""
    outputs: tuple[TensorHeader, ...] = ()
    timing_us: _TimingHeader = _TimingHeader()
    parameters: _Parameters = {}


class _EventBody(msgspec.Struct):
    time: str = ""
    boot: str = ""
    data: dict[str, Any] = {}


class Message(msgspec.Struct, gc=False):
    """A message taken apart: where the answer goes, and the header and tensor frames."""

    envelope: list[Buffer]
    header: Buffer
    tensors: list[Buffer]


class Reply(msgspec.Struct):
    """A reply as a client sees it. `error` is set unless `ok`; `fields` is filled for operations other than infer."""

    id: str
    boot: str
    error: ApplianceError | None
    response: InferenceResponse | None
    fields: dict[str, Any]


class WireEvent(msgspec.Struct, frozen=True):
    """An event from the wire. `seq` counts all events of one `boot`; a heartbeat repeats the last event's."""

    topic: str
    seq: int
    time: str
    boot: str
    data: dict[str, Any]


_request_decoder = msgspec.json.Decoder(RequestHeader)
_id_decoder = msgspec.json.Decoder(_AnyId)
_reply_decoder = msgspec.json.Decoder(_AnyReply)
_fields_decoder = msgspec.json.Decoder(dict[str, Any])
_event_decoder = msgspec.json.Decoder(_EventBody)
_encode = msgspec.json.Encoder().encode

# what a decoder may raise for hostile bytes: nesting without end is a RecursionError, an integer of 5,000 digits a ValueError
_DECODE_ERRORS = (msgspec.MsgspecError, RecursionError, ValueError)


def envelope_length(frames: Sequence[Buffer]) -> int:
    """How many frames at the front route the answer back: the routing id, and all up to an empty delimiter where one is.

    `frames` is a message as a ROUTER receives it, routing id first. A DEALER's message has the protocol frame right after the
    routing id; a REQ puts an empty frame between (with REQ_CORRELATE a request number before it); proxies add routing ids.
    """
    if len(frames) < 2 or frames[1] == PROTOCOL:
        return 1
    for index in range(1, min(len(frames), MAX_ENVELOPE_FRAMES)):
        if len(frames[index]) == 0:
            return index + 1
        if len(frames[index]) > MAX_ROUTING_ID_BYTES:
            break  # no routing id: a tensor in front of an empty frame must not be sent back
    return 1


def split(frames: list[Buffer], envelope: int, *, max_header_bytes: int) -> Message:
    """The parts of a request whose first `envelope` frames are its envelope.

    INVALID_ARGUMENT without the protocol frame and a header, UNSUPPORTED for another version of the protocol,
    PAYLOAD_TOO_LARGE for a header above `max_header_bytes`.
    """
    if len(frames) < envelope + 2 or frames[envelope] != PROTOCOL:
        raise _not_ours(frames[envelope] if len(frames) > envelope else b"")
    header = frames[envelope + 1]
    if len(header) > max_header_bytes:
        raise ApplianceError(
            ErrorCode.PAYLOAD_TOO_LARGE, f"the header may have {max_header_bytes} bytes, {len(header)} came"
        )
    return Message(frames[:envelope], header, frames[envelope + 2 :])


def _not_ours(first: Buffer) -> ApplianceError:
    if len(first) == len(PROTOCOL) and bytes(first[:3]) == PROTOCOL[:3] and first != PROTOCOL:
        return unsupported("this server speaks AIP1 only; send the protocol frame AIP1")
    return invalid("a message is the frame AIP1, a JSON header frame, and one frame for each tensor")


def decode_header(data: Buffer) -> RequestHeader:
    """A request's header. INVALID_ARGUMENT names the field and what was expected."""
    try:
        return _request_decoder.decode(data)
    except _DECODE_ERRORS as error:
        raise invalid(f"header: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON is nested too deeply"
    return str(error)[:300]


def salvage_id(data: Buffer) -> str:
    """The `id` of a header that is otherwise wrong, so that the caller learns which request failed; "" if there is none."""
    try:
        found = _id_decoder.decode(data).id
    except _DECODE_ERRORS:
        return ""
    return found if isinstance(found, str) and len(found) <= 128 else ""


def to_inference(header: RequestHeader, frames: Sequence[Buffer]) -> InferenceRequest:
    """The request of an `infer` header and its tensor frames, which it views. INVALID_ARGUMENT if they disagree."""
    if not header.model:
        raise invalid('infer needs "model"')
    if not header.inputs:
        raise invalid('infer needs "inputs": a list of {"name", "datatype", "shape", "frame"}')
    parameters = header.parameters or {}
    everything = 0
    if "classification" in parameters:
        parameters = dict(parameters)
        everything = _classification(parameters.pop("classification"))
    # by position: with eleven keywords the constructor takes as long as the JSON decoder
    return InferenceRequest(
        ModelName(header.model),
        _tensors(header.inputs, frames),
        Version(header.version),
        RequestId(header.id),
        _requested(header.outputs, everything) if header.outputs else (),
        header.priority,
        header.ttl_ms / 1000 if header.ttl_ms else None,
        header.stream,
        header.idem,
        0 if header.outputs else everything,
        parameters,
    )


def _tensors(headers: Sequence[TensorHeader], frames: Sequence[Buffer]) -> tuple[Tensor, ...]:
    if len(headers) != len(frames):
        raise invalid(
            f"the header names {len(headers)} tensors, {len(frames)} tensor frames came; each has its own frame"
        )
    if len(headers) == 1 and not headers[0].frame:
        return (_tensor(headers[0], frames[0]),)
    used: set[int] = set()
    tensors = []
    for index, header in enumerate(headers):
        frame = index if header.frame is UNSET else header.frame
        if frame >= len(frames) or frame in used:
            raise invalid(f"tensor {header.name!r}: frame {frame} is not there or belongs to another tensor")
        used.add(frame)
        tensors.append(_tensor(header, frames[frame]))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise invalid("a tensor name appears twice")
    return tuple(tensors)


def _tensor(header: TensorHeader, data: Buffer) -> Tensor:
    datatype = DATATYPES.get(header.datatype)
    shape = header.shape
    # what nearly always comes, in one expression; sizes are 0 or more by the header's type
    if datatype is not None and len(shape) <= MAX_RANK and 0 < math.prod(shape) * datatype.itemsize == len(data):
        return Tensor(header.name, datatype, shape, data)
    return checked(header.name, datatype_of(header.datatype), shape, data)


def _requested(headers: Sequence[OutputHeader], everything: int) -> tuple[RequestedOutput, ...]:
    outputs = []
    for header in headers:
        classes = everything
        if header.parameters and "classification" in header.parameters:
            classes = _classification(header.parameters["classification"])
        outputs.append(RequestedOutput(header.name, classes))
    return tuple(outputs)


def _classification(value: Parameter) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 20:
        raise invalid("parameters.classification must be how many classes to give, an integer of 0 or more")
    return value


def encode_response(response: InferenceResponse, request_id: str, boot: str) -> list[Buffer]:
    """The frames of a good answer to `infer`, without envelope."""
    outputs = response.outputs
    timing = response.timing
    header = _InferReply(
        request_id,
        True,
        response.model,
        response.version,
        [_OutputTensor(tensor.name, tensor.datatype, tensor.shape, index) for index, tensor in enumerate(outputs)],
        _TimingHeader(timing.queue_us, timing.compute_us),
        boot,
        response.parameters or UNSET,
    )
    return [PROTOCOL, _encode(header), *[tensor.data for tensor in outputs]]


def encode_error(error: ApplianceError, request_id: str, boot: str) -> list[Buffer]:
    """The frames of a refusal or failure, without envelope. `retry_after_ms` is there where waiting helps."""
    retry_s = error.retry_after_s
    if retry_s is None:
        retry_s = DEFAULT_RETRY_AFTER_S.get(error.code)
    retry = UNSET if retry_s is None else max(1, round(retry_s * 1000))
    return [PROTOCOL, _encode(_ErrorReply(request_id, False, error.code, error.message, boot, retry))]


def encode_fields(fields: Mapping[str, Any], request_id: str, boot: str) -> list[Buffer]:
    """The frames of a good answer to any other operation: `fields` beside `id`, `ok` and `boot`."""
    return [PROTOCOL, _encode({"id": request_id, "ok": True, **fields, "boot": boot})]


def check_hello(header: RequestHeader) -> None:
    """UNSUPPORTED unless the client's range of protocol versions, `proto` [least, most], holds ours."""
    if header.proto and not min(header.proto) <= PROTOCOL_NUMBER <= max(header.proto):
        raise unsupported(f"this server speaks protocol version {PROTOCOL_NUMBER} only")


def hello_fields(server: ServerDescription, limits: Mapping[str, int], events: Sequence[str]) -> dict[str, Any]:
    """What `hello` answers: the protocol version, what exists beyond its core, limits, and where events are published."""
    return {
        "proto": PROTOCOL_NUMBER,
        "server": {"name": server.name, "version": server.version},
        "features": FEATURES,
        "limits": limits,
        "events": events,
    }


def model_fields(entries: Sequence[IndexEntry]) -> list[dict[str, str]]:
    """The list that `models` answers."""
    return [
        {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        for entry in entries
    ]


def description_fields(model: ModelDescription) -> dict[str, Any]:
    """The object that `describe` answers. Shapes have −1 where any size goes."""
    return {
        "name": model.name,
        "version": model.version,
        "versions": model.versions,
        "platform": model.platform,
        "backend": model.backend,
        "inputs": [_spec_fields(spec) for spec in model.inputs],
        "outputs": [_spec_fields(spec) for spec in model.outputs],
        "max_batch_size": model.max_batch_size,
        "instances": model.instances,
        "device": model.device,
        "provider": model.provider,
        "labels": model.labels,
        "description": model.description,
    }


def _spec_fields(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def statistics_fields(statistics: Sequence[ModelStatistics]) -> list[dict[str, Any]]:
    """The list that `stats` answers: counts, and durations summed in nanoseconds."""
    durations = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return [
        {
            "name": item.name,
            "version": item.version,
            "last_inference_ms": item.last_inference_ms,
            "inference_count": item.inference_count,
            "execution_count": item.execution_count,
            "pending": item.pending,
            "failures": item.failures,
            **{name: getattr(item, name) for name in durations},
        }
        for item in statistics
    ]


def encode_event(topic: str, seq: int, body: Mapping[str, Any]) -> list[bytes]:
    """The frames of an event: topic, sequence number (8 bytes, big-endian), JSON."""
    return [topic.encode(), _SEQUENCE.pack(seq), _encode(body)]


def decode_event(frames: Sequence[Buffer]) -> WireEvent:
    """An event from its frames; INVALID_ARGUMENT if they are none. Further frames and fields are ignored."""
    if len(frames) < 3 or len(frames[1]) != _SEQUENCE.size:
        raise invalid("an event is a topic, a sequence number of 8 bytes, and a JSON object")
    try:
        body = _event_decoder.decode(frames[2])
        topic = bytes(frames[0]).decode()
    except _DECODE_ERRORS as error:
        raise invalid(f"event: {_reason(error)}") from error
    return WireEvent(topic, _SEQUENCE.unpack(frames[1])[0], body.time, body.boot, body.data)


def encode_request(header: RequestHeader, tensors: Sequence[Tensor] = ()) -> list[Buffer]:
    """The frames of a request as a DEALER or REQ sends it. For `infer` the header's `inputs` come from `tensors`."""
    header.inputs = tuple(
        [TensorHeader(item.name, item.datatype.value, item.shape, index) for index, item in enumerate(tensors)]
    )
    return [PROTOCOL, _encode(header), *[tensor.data for tensor in tensors]]


def decode_reply(frames: Sequence[Buffer]) -> Reply:
    """A reply as a DEALER receives it (an empty delimiter in front is skipped).

    INVALID_ARGUMENT if it is no AIP1 reply. An error code from a newer server that we do not know becomes INTERNAL.
    """
    start = 1 if frames and len(frames[0]) == 0 else 0
    if len(frames) < start + 2 or frames[start] != PROTOCOL:
        raise invalid("a reply is the frame AIP1, a JSON header frame, and one frame for each tensor")
    data, tensors = frames[start + 1], frames[start + 2 :]
    try:
        header = _reply_decoder.decode(data)
        fields = {} if header.outputs or not header.ok else _fields_decoder.decode(data)
    except _DECODE_ERRORS as error:
        raise invalid(f"reply: {_reason(error)}") from error
    if not header.ok:
        return Reply(header.id, header.boot, _error_of(header), None, {})
    response = None
    if header.outputs or tensors:
        response = InferenceResponse(
            ModelName(header.model),
            Version(header.version),
            RequestId(header.id),
            _tensors(header.outputs, tensors),
            Timing(header.timing_us.queue, header.timing_us.compute),
            header.parameters,
        )
    return Reply(header.id, header.boot, None, response, fields)


def _error_of(header: _AnyReply) -> ApplianceError:
    known = header.code in ErrorCode.__members__
    retry = None if header.retry_after_ms is None else header.retry_after_ms / 1000
    message = header.message if known else f"{header.code}: {header.message}"
    return ApplianceError(ErrorCode(header.code) if known else ErrorCode.INTERNAL, message, retry_after_s=retry)
