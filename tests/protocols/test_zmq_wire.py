"""The AIP1 codec: golden messages, hostile bytes, and what goes in comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.description import IndexEntry
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import InferenceRequest, InferenceResponse, ModelName, RequestId, Timing, Version
from appliance.core.tensor import Buffer, DataType, Tensor
from appliance.protocols import zmq_wire as wire
from appliance.protocols.tensors import from_numpy

GOLDEN = Path(__file__).parent / "golden" / "zmq"
MAX_HEADER = 64 << 10


def golden(kind: str) -> list[Any]:
    found = [(path.stem, json.loads(path.read_text())) for path in sorted(GOLDEN.glob("*.json"))]
    return [pytest.param(case, id=name) for name, case in found if case["kind"] == kind]


def frames_of(case: dict[str, Any]) -> list[Buffer]:
    return [bytes.fromhex(frame["hex"]) for frame in case["frames"]]


def serve(frames: list[Buffer]) -> tuple[wire.RequestHeader, InferenceRequest | None]:
    """What a server makes of a message that came from a DEALER."""
    message = wire.split([b"peer", *frames], 1, max_header_bytes=MAX_HEADER)
    header = wire.decode_header(message.header)
    return header, wire.to_inference(header, message.tensors) if header.op == "infer" else None


def tensor_fields(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "datatype": tensor.datatype.value,
        "shape": list(tensor.shape),
        "data_hex": bytes(tensor.data).hex(),
    }


def request_fields(header: wire.RequestHeader, request: InferenceRequest) -> dict[str, Any]:
    return {
        "op": header.op,
        "id": request.id,
        "model": request.model,
        "version": request.version,
        "ttl_ms": 0 if request.timeout_s is None else request.timeout_s * 1000,
        "priority": request.priority,
        "stream": request.stream,
        "idem": request.idempotent,
        "classification": request.classification,
        "outputs": [{"name": item.name, "classification": item.classification} for item in request.outputs],
        "parameters": request.parameters,
        "inputs": [tensor_fields(tensor) for tensor in request.inputs],
    }


def test_there_are_golden_messages_of_every_kind_and_their_texts_are_their_bytes() -> None:
    for kind in ("request", "refused", "envelope", "reply", "event"):
        assert golden(kind)
    for path in GOLDEN.glob("*.json"):
        for frame in json.loads(path.read_text())["frames"]:
            assert bytes.fromhex(frame["hex"]).decode() == frame["text"] if "text" in frame else True


@pytest.mark.parametrize("case", golden("request"))
def test_a_golden_request_means_what_it_says(case: dict[str, Any]) -> None:
    header, request = serve(frames_of(case))
    if request is not None:
        assert request_fields(header, request) == case["means"]
        return
    for field, value in case["means"].items():
        got = getattr(header, field)
        assert (list(got) if isinstance(got, tuple) else got) == value


@pytest.mark.parametrize("case", golden("refused"))
def test_a_golden_refusal_has_its_code_and_its_id(case: dict[str, Any]) -> None:
    frames = frames_of(case)
    means = case["means"]
    op = json.loads(frames[1]).get("op") if means["id"] else "infer"
    if op not in wire.OPERATIONS:
        # a header that is right in itself; the dispatcher refuses the operation
        assert serve(frames)[0].id == means["id"]
        return
    with pytest.raises(ApplianceError) as caught:
        serve(frames)
    assert caught.value.code == means["code"]
    found = wire.salvage_id(frames[1]) if len(frames) > 1 and frames[0] == wire.PROTOCOL else ""
    assert found == means["id"]


@pytest.mark.parametrize("case", golden("envelope"))
def test_a_golden_envelope_has_its_length(case: dict[str, Any]) -> None:
    frames = frames_of(case)
    length = wire.envelope_length(frames)
    assert length == case["means"]["envelope_frames"]
    assert wire.split(frames, length, max_header_bytes=MAX_HEADER).envelope == frames[:length]


@pytest.mark.parametrize("case", golden("reply"))
def test_a_golden_reply_means_what_it_says(case: dict[str, Any]) -> None:
    means = case["means"]
    for delimiter in ([], [b""]):
        reply = wire.decode_reply([*delimiter, *frames_of(case)])
        assert (reply.id, reply.boot, reply.error is None) == (means["id"], means["boot"], means["ok"])
        if reply.error is not None:
            retry = reply.error.retry_after_s
            assert (reply.error.code, reply.error.message) == (means["code"], means["message"])
            assert (None if retry is None else retry * 1000) == means["retry_after_ms"]
        elif "outputs" in means:
            assert reply.response is not None
            assert [tensor_fields(tensor) for tensor in reply.response.outputs] == means["outputs"]
            assert reply.response.timing == Timing(means["timing_us"]["queue"], means["timing_us"]["compute"])
        else:
            assert reply.fields.items() >= means["fields"].items()


@pytest.mark.parametrize("case", golden("reply"))
def test_our_server_writes_the_golden_replies(case: dict[str, Any]) -> None:
    means = case["means"]
    if not means["ok"]:
        retry = means["retry_after_ms"]
        error = ApplianceError(
            ErrorCode(means["code"]), means["message"], retry_after_s=None if retry is None else retry / 1000
        )
        written = wire.encode_error(error, means["id"], means["boot"])
    elif "outputs" in means:
        written = wire.encode_response(_response(means), means["id"], means["boot"])
    else:
        written = wire.encode_fields(means["fields"], means["id"], means["boot"])
    assert written == frames_of(case)


def _response(means: dict[str, Any]) -> InferenceResponse:
    outputs = [
        Tensor(item["name"], DataType(item["datatype"]), tuple(item["shape"]), bytes.fromhex(item["data_hex"]))
        for item in means["outputs"]
    ]
    timing = Timing(means["timing_us"]["queue"], means["timing_us"]["compute"])
    return InferenceResponse(
        ModelName(means["model"]), Version(means["version"]), RequestId("other"), tuple(outputs), timing
    )


@pytest.mark.parametrize("case", golden("event"))
def test_a_golden_event_is_read_and_written(case: dict[str, Any]) -> None:
    means = case["means"]
    assert wire.decode_event(frames_of(case)) == wire.WireEvent(**means)
    body = {"time": means["time"], "boot": means["boot"], "data": means["data"]}
    assert wire.encode_event(means["topic"], means["seq"], body) == frames_of(case)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "op",
    "id",
    "model",
    "ttl_ms",
    "inputs",
    "outputs",
    "parameters",
    "name",
    "shape",
    "frame",
    "ids",
    "proto",
    "ok",
)
HEADERS = st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(["infer", "echo"]), max_size=6)
HEADER_BYTES = st.binary(max_size=64) | HEADERS.map(lambda value: json.dumps(value).encode())
FRAMES = st.lists(st.binary(max_size=24) | st.just(wire.PROTOCOL) | HEADER_BYTES, max_size=6)


@settings(max_examples=300, deadline=None)
@given(frames=FRAMES | HEADER_BYTES.map(lambda header: [wire.PROTOCOL, header]))
def test_any_frames_end_in_a_value_or_in_an_operating_error(frames: list[Buffer]) -> None:
    length = wire.envelope_length([b"peer", *frames])
    assert 1 <= length <= min(len(frames) + 1, wire.MAX_ENVELOPE_FRAMES)
    for read in (serve, wire.decode_reply, wire.decode_event, lambda value: wire.salvage_id(b"".join(value))):
        try:
            read(frames)
        except ApplianceError as error:
            wire.encode_error(error, "1", "boot")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 60_000,
        b'{"op":' + b"[" * 60_000,
        b'{"colour":' + b'{"a":' * 10_000,
        b'{"op":"\xff\xfe"}',
        b'{"op":"\\ud800"}',
        b'{"ttl_ms":1e999}',
        b'{"ttl_ms":' + b"9" * 6000 + b"}",
        b'{"priority":' + b"9" * 6000 + b"}",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[' + b"9" * 6000 + b"]}]}",
        b'{"parameters":{"x":' + b"9" * 6000 + b"}}",
        b'{"id":"' + b"x" * 129 + b'"}',
        b"null",
        b"",
        b"\x00" * 100,
    ],
)
def test_headers_made_to_break_a_parser_are_refused(header: bytes) -> None:
    with pytest.raises(ApplianceError) as caught:
        wire.decode_header(header)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert len(caught.value.message) < 400
    assert wire.salvage_id(header) == ""


@settings(max_examples=60, deadline=None)
@given(
    arrays=st.lists(
        st.tuples(
            st.sampled_from(["?", "u1", "<i8", "<f2", "<f4"]), st.lists(st.integers(0, 3), max_size=3).map(tuple)
        ),
        min_size=1,
        max_size=4,
    ),
    request_id=st.text(max_size=64).filter(lambda text: text.isprintable()),
    ttl_ms=st.floats(0, 86_400_000),
    idem=st.booleans(),
)
def test_a_request_that_we_write_is_read_back_the_same(
    arrays: list[tuple[str, tuple[int, ...]]], request_id: str, ttl_ms: float, idem: bool
) -> None:
    tensors = [from_numpy(f"x{index}", np.ones(shape, dtype)) for index, (dtype, shape) in enumerate(arrays)]
    header = wire.RequestHeader(op="infer", id=request_id, model="m", ttl_ms=ttl_ms, idem=idem, stream="s")
    _, request = serve(wire.encode_request(header, tensors))
    assert request is not None
    assert request.inputs == tuple(tensors)
    assert (request.id, request.idempotent, request.stream) == (request_id, idem, "s")
    assert request.timeout_s == (ttl_ms / 1000 if ttl_ms else None)


def test_a_tensor_is_a_view_of_its_frame() -> None:
    data = bytearray(16)
    header = wire.RequestHeader(op="infer", model="m")
    frames = wire.encode_request(header, [Tensor("x", DataType.FP32, (4,), data)])
    _, request = serve(frames)
    assert request is not None
    assert request.inputs[0].data is data


def test_a_tensor_in_front_of_an_empty_frame_is_not_taken_for_a_routing_id() -> None:
    assert wire.envelope_length([b"peer", b"x" * 256, b"", b"AIP1"]) == 1
    assert wire.envelope_length([b"peer", b"x" * 255, b"", b"AIP1"]) == 3
    assert wire.envelope_length([b"peer", *[b"hop"] * 20, b""]) == 1


def test_a_header_above_the_limit_is_too_large() -> None:
    with pytest.raises(ApplianceError) as caught:
        wire.split([b"peer", wire.PROTOCOL, b" " * 11], 1, max_header_bytes=10)
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


@pytest.mark.parametrize("value", [-1, True, 1.5, "3", 1 << 21])
def test_classification_must_be_a_count(value: Any) -> None:
    header = {"op": "infer", "model": "m", "inputs": [{"name": "x", "datatype": "UINT8", "shape": [1]}]}
    for extra in (
        {"parameters": {"classification": value}},
        {"outputs": [{"name": "y", "parameters": {"classification": value}}]},
    ):
        with pytest.raises(ApplianceError, match="classification"):
            serve([wire.PROTOCOL, json.dumps(header | extra).encode(), b"x"])


def test_classification_of_all_counts_for_the_outputs_that_are_named() -> None:
    header = {
        "op": "infer",
        "model": "m",
        "inputs": [{"name": "x", "datatype": "UINT8", "shape": [1]}],
        "outputs": [{"name": "a"}, {"name": "b", "parameters": {"classification": 1}}],
        "parameters": {"classification": 5, "lot": "A"},
    }
    _, request = serve([wire.PROTOCOL, json.dumps(header).encode(), b"x"])
    assert request is not None
    assert [(output.name, output.classification) for output in request.outputs] == [("a", 5), ("b", 1)]
    assert (request.classification, request.parameters) == (0, {"lot": "A"})


def test_busy_and_unavailable_always_say_when_to_come_back() -> None:
    for code in (ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE):
        reply = wire.decode_reply(wire.encode_error(ApplianceError(code, "no"), "1", "b"))
        assert reply.error is not None
        assert reply.error.retry_after_s is not None
        assert reply.error.retry_after_s > 0


def test_a_code_that_we_do_not_know_becomes_internal_and_keeps_its_name() -> None:
    reply = wire.decode_reply([wire.PROTOCOL, b'{"ok":false,"code":"TOO_HOT","message":"wait"}'])
    assert reply.error is not None
    assert (reply.error.code, reply.error.message) == (ErrorCode.INTERNAL, "TOO_HOT: wait")


def test_parameters_of_an_answer_travel() -> None:
    response = InferenceResponse(
        ModelName("m"), Version("1"), RequestId(""), (Tensor("y", DataType.UINT8, (1,), b"x"),), parameters={"k": 1}
    )
    reply = wire.decode_reply(wire.encode_response(response, "1", "b"))
    assert reply.response is not None
    assert reply.response.parameters == {"k": 1}


@pytest.mark.parametrize(("proto", "ok"), [((), True), ((1, 1), True), ((0, 9), True), ((2, 3), False), ((0,), False)])
def test_hello_wants_a_protocol_version_in_common(proto: tuple[int, ...], ok: bool) -> None:
    header = wire.RequestHeader(op="hello", proto=proto)
    if ok:
        wire.check_hello(header)
        return
    with pytest.raises(ApplianceError, match="version 1"):
        wire.check_hello(header)


def test_models_are_listed_with_their_reasons() -> None:
    entry = IndexEntry(ModelName("m"), "1", "UNAVAILABLE", "not ONNX")
    assert wire.model_fields([entry]) == [{"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "not ONNX"}]
