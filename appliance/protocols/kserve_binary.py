"""An inference over HTTP: the request from its body, the answer into a body; JSON, binary tensors, or both mixed.

Binary framing: the JSON document first, its length told by a header, then the bytes of each binary input in the order they are
named. No content type is asked: clients send wrong ones. Tensors are views on the body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET

from appliance.core.description import ModelDescription
from appliance.core.errors import invalid, unsupported
from appliance.core.request import (
    InferenceRequest,
    InferenceResponse,
    ModelName,
    RequestedOutput,
    RequestId,
    Version,
)
from appliance.core.tensor import Buffer, DataType, Tensor, datatype_of, element_count
from appliance.protocols.kserve import (
    MAX_PARAMETERS,
    InputDocument,
    RequestDocument,
    check_structure,
    decode_request,
    json_data,
    quoted,
    tensor_from_json,
    too_large,
)
from appliance.protocols.tensors import checked, join_bytes

MAX_CLASSES = 100_000
MAX_ID = 4096
LONGEST_TIMEOUT_US = 86_400 * 1_000_000
RESERVED = "triton_"


class ReplyFormat(msgspec.Struct, frozen=True, gc=False):
    """Which outputs the caller wants as bytes: those named in `listed` by their own word, all others by `default`."""

    default: bool = False
    listed: dict[str, bool] | None = None


JSON_REPLY = ReplyFormat()
BINARY_REPLY = ReplyFormat(True)


class Limits(msgspec.Struct, frozen=True):
    """What a JSON document may be."""

    max_json_bytes: int
    max_json_depth: int


def decode_infer(
    body: memoryview,
    header_length: int | None,
    model: ModelName,
    version: Version,
    limits: Limits,
    describe: Callable[[], ModelDescription],
) -> tuple[InferenceRequest, ReplyFormat]:
    """The request in a body. `header_length` is that of the JSON document, None if all of the body is JSON, 0 for a raw request.

    `describe` is asked only for a raw request, whose one tensor has no description of its own.
    """
    if header_length == 0:
        return _decode_raw(body, model, version, describe())
    if header_length is not None and not 0 < header_length <= len(body):
        raise invalid(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
    text = body if header_length is None else body[:header_length]
    if len(text) > limits.max_json_bytes:
        raise too_large("the JSON part of the request", limits.max_json_bytes)
    if len(text) > limits.max_json_depth:
        check_structure(text, limits.max_json_depth)
    document = decode_request(text)
    tensors = []
    offset = len(text)
    for wanted in document.inputs:
        tensor, offset = _input(wanted, body, offset)
        tensors.append(tensor)
    if offset != len(body):
        raise invalid(f"unexpected additional input data: {len(body) - offset} bytes follow the last input")
    return _request(document, tuple(tensors), model, version)


def _input(document: InputDocument, body: memoryview, offset: int) -> tuple[Tensor, int]:
    """One input, and where the next one's bytes begin."""
    datatype = datatype_of(document.datatype)
    parameters = document.parameters or {}
    if "shared_memory_region" in parameters:
        raise unsupported(f"input {document.name!r}: shared memory is not offered; send the data in the request")
    size = parameters.get("binary_data_size")
    data = document.data
    if data is UNSET or bytes(data) == b"null":
        if size is None:
            raise invalid(f"input {document.name!r} must have one of 'data' and 'parameters.binary_data_size'")
    elif size is not None:
        raise invalid(f"input {document.name!r} has both 'data' and 'binary_data_size'; send one")
    else:
        return tensor_from_json(document.name, datatype, document.shape, data), offset
    if type(size) is not int or size < 0:
        raise invalid(f"input {document.name!r}: binary_data_size must be a number of bytes, {size!r:.40} came")
    if size > len(body) - offset:
        raise invalid(
            f"input {document.name!r}: binary_data_size is {size}, but {len(body) - offset} bytes of the body are left"
        )
    return checked(document.name, datatype, document.shape, body[offset : offset + size]), offset + size


def _request(
    document: RequestDocument, tensors: tuple[Tensor, ...], model: ModelName, version: Version
) -> tuple[InferenceRequest, ReplyFormat]:
    request_id = RequestId(document.id or "")
    if len(request_id) > MAX_ID:
        raise invalid(f"the request id may have {MAX_ID} characters, it has {len(request_id)}")
    if not document.parameters and not document.outputs:
        return InferenceRequest(model, tensors, version, request_id), JSON_REPLY
    parameters = document.parameters or {}
    if len(parameters) > MAX_PARAMETERS:
        raise invalid(f"at most {MAX_PARAMETERS} parameters are allowed")
    default = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
    priority = _count(parameters.pop("priority", 0), "priority", 16)
    timeout_us = _count(parameters.pop("timeout", 0), "timeout", LONGEST_TIMEOUT_US)
    stream = parameters.pop("stream", "")
    if not isinstance(stream, str) or len(stream) > 256:
        raise invalid("parameter 'stream' must be a string of at most 256 characters")
    if parameters.pop("sequence_id", 0) or parameters.pop("sequence_start", False):
        raise unsupported("sequences are not supported: every request stands alone")
    parameters.pop("sequence_end", None)
    for key in parameters:
        if key.startswith(RESERVED):
            raise invalid(f"parameter {key[:64]!r}: names that start with {RESERVED!r} are reserved")
    outputs = []
    listed: dict[str, bool] | None = None
    for output in document.outputs or ():
        wishes = output.parameters or {}
        if "shared_memory_region" in wishes:
            raise unsupported(f"output {output.name!r}: shared memory is not offered; take the data from the answer")
        classes = _count(wishes.get("classification", 0), "classification", MAX_CLASSES)
        listed = {} if listed is None else listed
        listed[output.name] = _flag(wishes.get("binary_data", default), "binary_data")
        outputs.append(RequestedOutput(output.name, classes))
    request = InferenceRequest(
        model,
        tensors,
        version,
        request_id,
        tuple(outputs),
        priority,
        timeout_us / 1e6 if timeout_us else None,
        stream,
        parameters=parameters,
    )
    return request, ReplyFormat(default, listed)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise invalid(f"parameter {name!r} must be true or false, {value!r:.40} came")
    return value


def _count(value: Any, name: str, maximum: int) -> int:
    if type(value) is not int or not 0 <= value <= maximum:
        raise invalid(f"parameter {name!r} must be a whole number from 0 to {maximum}, {value!r:.40} came")
    return value


def _decode_raw(
    body: memoryview, model: ModelName, version: Version, description: ModelDescription
) -> tuple[InferenceRequest, ReplyFormat]:
    """A body that is nothing but the one input's bytes: batch 1, at most one size left open, answered in binary."""
    if len(description.inputs) != 1:
        raise invalid(f"a raw binary request needs a model with one input, {model!r} has {len(description.inputs)}")
    spec = description.inputs[0]
    shape = [1, *spec.shape[1:]] if description.max_batch_size else list(spec.shape)
    data: bytes | memoryview = body
    if spec.datatype is DataType.BYTES:
        shape = [1 if size < 0 else size for size in shape]
        if element_count(tuple(shape)) != 1:
            raise invalid(f"a raw binary request holds one BYTES element, input {spec.name!r} has shape {shape}")
        data = join_bytes([bytes(body)])
    elif shape.count(-1) > 1:
        raise invalid(f"input {spec.name!r} has more than one open size: a raw binary request cannot say them")
    elif -1 in shape:
        known = element_count(tuple(size for size in shape if size >= 0)) * spec.datatype.itemsize
        if known == 0 or len(body) % known:
            raise invalid(f"input {spec.name!r}: {len(body)} bytes are no whole number of {known}-byte parts")
        shape[shape.index(-1)] = len(body) // known
    tensor = checked(spec.name, spec.datatype, tuple(shape), data)
    return InferenceRequest(model, (tensor,), version), BINARY_REPLY


def encode_infer(response: InferenceResponse, form: ReplyFormat) -> tuple[int | None, list[Buffer]]:
    """The answer's body in parts, and the length of its JSON document if binary outputs follow it (else None).

    `id` is there if the request had one. An empty binary output has a size of 0 and no bytes. INVALID_ARGUMENT for an output that
    has no JSON form and was not asked for in binary.
    """
    pieces = [f'{{"model_name":{quoted(response.model)},"model_version":{quoted(response.version)}']
    if response.id:
        pieces.append(f',"id":{msgspec.json.encode(response.id).decode()}')
    pieces.append(',"outputs":[')
    parts: list[Buffer] = [b""]
    separator = ""
    for tensor in response.outputs:
        binary = form.default if form.listed is None else form.listed.get(tensor.name, form.default)
        pieces.append(
            f'{separator}{{"name":{quoted(tensor.name)},"datatype":"{tensor.datatype.value}",'
            f'"shape":[{",".join(map(str, tensor.shape))}]'
        )
        if binary:
            size = len(tensor.data)
            pieces.append(f',"parameters":{{"binary_data_size":{size}}}}}')
            if size:
                parts.append(tensor.data)
        else:
            pieces.append(f',"data":{json_data(tensor).decode()}}}')
        separator = ","
    pieces.append("]}")
    parts[0] = text = "".join(pieces).encode()
    return (len(text) if len(parts) > 1 else None), parts
