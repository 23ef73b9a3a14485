"""Inference over HTTP, as bytes: JSON, binary tensors and both mixed; hostile bytes; golden bodies."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from appliance.core.description import ModelDescription
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import InferenceRequest, InferenceResponse, ModelName, RequestedOutput, RequestId, Version
from appliance.core.tensor import DataType, Tensor, TensorSpec
from appliance.protocols.kserve_binary import Limits, ReplyFormat, decode_infer, encode_infer
from appliance.protocols.tensors import from_numpy, join_bytes, to_numpy
from tests.protocols.test_kserve import describe

LIMITS = Limits(max_json_bytes=1 << 20, max_json_depth=64)
CLIENTS_FAULT = {ErrorCode.INVALID_ARGUMENT, ErrorCode.UNSUPPORTED, ErrorCode.PAYLOAD_TOO_LARGE}

MODEL = ModelName("m")
ONE = np.array([[1.5, -2.0]], "<f4")


def decode(
    body: bytes, header_length: int | None = None, model: ModelDescription | None = None
) -> tuple[InferenceRequest, ReplyFormat]:
    return decode_infer(memoryview(body), header_length, MODEL, Version(""), LIMITS, lambda: model or describe())


def refusal(body: bytes, header_length: int | None = None, model: ModelDescription | None = None) -> ApplianceError:
    with pytest.raises(ApplianceError) as caught:
        decode(body, header_length, model)
    assert caught.value.code in CLIENTS_FAULT
    return caught.value


def binary_input(name: str, tensor: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": tensor.datatype.value,
        "shape": list(tensor.shape),
        "parameters": {"binary_data_size": len(tensor.data)},
    }


def document(**fields: Any) -> bytes:
    fields.setdefault("inputs", [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2.0]}])
    return json.dumps(fields).encode()


MIXED_TENSORS = [
    from_numpy("a", ONE),
    from_numpy("s", np.array([b"one", b""], dtype=object)),
    Tensor("h", DataType.FP16, (2,), b"\x00\x3c\x00\x40"),
    Tensor("e", DataType.INT32, (0, 4), b""),
]
MIXED_HEADER = document(
    id="7",
    inputs=[
        *(binary_input(tensor.name, tensor) for tensor in MIXED_TENSORS),
        {"name": "j", "datatype": "INT8", "shape": [2], "data": [1, -1]},
    ],
    parameters={"binary_data_output": True},
)
MIXED = MIXED_HEADER + b"".join(bytes(tensor.data) for tensor in MIXED_TENSORS)


class TestRequests:
    def test_json_and_binary_inputs_may_be_mixed(self) -> None:
        request, form = decode(MIXED, len(MIXED_HEADER))
        assert [(tensor.name, bytes(tensor.data)) for tensor in request.inputs] == [
            *((tensor.name, bytes(tensor.data)) for tensor in MIXED_TENSORS),
            ("j", b"\x01\xff"),
        ]
        assert (request.id, form) == ("7", ReplyFormat(True))

    def test_binary_tensors_are_views_of_the_body(self) -> None:
        body = memoryview(bytearray(MIXED))
        request, _ = decode_infer(body, len(MIXED_HEADER), MODEL, Version(""), LIMITS, describe)
        body[len(MIXED_HEADER)] = 0xAB
        assert request.inputs[0].data[0] == 0xAB

    def test_a_body_cut_anywhere_is_refused(self) -> None:
        for end in range(len(MIXED)):
            refusal(MIXED[:end], min(len(MIXED_HEADER), end) or None)

    def test_bytes_left_over_are_refused(self) -> None:
        assert "unexpected additional input data" in refusal(MIXED + b"\0", len(MIXED_HEADER)).message

    @pytest.mark.parametrize("length", [len(MIXED) + 1, 99_999_999_999])
    def test_a_header_longer_than_the_body_is_refused(self, length: int) -> None:
        assert refusal(MIXED, length).code is ErrorCode.INVALID_ARGUMENT

    @pytest.mark.parametrize("size", [-1, 7, 9, 2**63, 1.0, "8", True])
    def test_a_wrong_binary_size_is_refused(self, size: Any) -> None:
        wrong = binary_input("a", MIXED_TENSORS[0]) | {"parameters": {"binary_data_size": size}}
        header = document(inputs=[wrong])
        refusal(header + ONE.tobytes(), len(header))

    @pytest.mark.parametrize(
        "shape", [[2**4, 2**60 + 2], [2**2, 2**60 + 2], [-1, 2], [-(2**63)], [2**80], [1] * 17, [1.5]]
    )
    def test_a_shape_that_cannot_be_is_refused(self, shape: list[Any]) -> None:
        header = document(inputs=[binary_input("a", MIXED_TENSORS[0]) | {"shape": shape}])
        refusal(header + ONE.tobytes(), len(header))
        refusal(document(inputs=[{"name": "a", "datatype": "FP32", "shape": shape, "data": [1.5, 2]}]))

    def test_an_input_has_data_or_a_size_and_not_both(self) -> None:
        x = {"name": "x", "datatype": "FP32", "shape": [1]}
        assert "must have one of" in refusal(document(inputs=[x])).message
        assert "must have one of" in refusal(document(inputs=[x | {"data": None}])).message
        both = document(inputs=[x | {"data": [1], "parameters": {"binary_data_size": 4}}])
        assert "both" in refusal(both + b"\0" * 4, len(both)).message

    def test_optional_fields_may_be_null(self) -> None:
        x = {"name": "x", "datatype": "FP32", "shape": [1], "parameters": None, "data": [1]}
        request, _ = decode(document(inputs=[x], id=None, parameters=None, outputs=None))
        assert (request.id, request.outputs) == ("", ())

    def test_unknown_fields_are_ignored(self) -> None:
        x = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1], "content_type": "np"}
        assert decode(document(inputs=[x], model_name="other", extra={"a": [1]}))[0].model == "m"

    @pytest.mark.parametrize(
        "body",
        [b"", b"{}", b"[]", b"null", b"{", b'{"inputs":[]', b'{"inputs":{}}', b"\xff\xfe", b'{"inputs":[{}]}', b"NaN"],
    )
    def test_what_is_no_request_is_refused(self, body: bytes) -> None:
        assert refusal(body).code is ErrorCode.INVALID_ARGUMENT

    def test_not_a_number_in_json_is_refused_with_advice(self) -> None:
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}'
        assert "need binary data" in refusal(body).message

    def test_json_has_a_limit_of_its_own(self) -> None:
        big = document(id="a" * (1 << 20))
        assert refusal(big).code is ErrorCode.PAYLOAD_TOO_LARGE
        assert refusal(big, len(big)).code is ErrorCode.PAYLOAD_TOO_LARGE

    def test_too_many_tensors_are_refused(self) -> None:
        x = {"name": "x", "datatype": "FP32", "shape": [0], "data": []}
        assert "1024" in refusal(document(inputs=[x] * 1025)).message
        assert "1024" in refusal(document(outputs=[{"name": "y"}] * 1025)).message

    def test_shared_memory_is_refused_as_unsupported(self) -> None:
        region = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
        x = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": region}
        assert refusal(document(inputs=[x])).code is ErrorCode.UNSUPPORTED
        assert refusal(document(outputs=[{"name": "y", "parameters": region}])).code is ErrorCode.UNSUPPORTED


class TestParameters:
    def test_priority_timeout_stream_and_own_parameters(self) -> None:
        parameters = {"priority": 2, "timeout": 1500, "stream": "cam1", "mine": 1.5, "on": True, "who": "me"}
        request, _ = decode(document(parameters=parameters))
        assert (request.priority, request.timeout_s, request.stream) == (2, 0.0015, "cam1")
        assert request.parameters == {"mine": 1.5, "on": True, "who": "me"}

    def test_no_timeout_is_none(self) -> None:
        assert decode(document(parameters={"timeout": 0}))[0].timeout_s is None

    @pytest.mark.parametrize(
        "parameters",
        [
            {"priority": -1},
            {"priority": True},
            {"priority": 1.0},
            {"timeout": -1},
            {"timeout": "1"},
            {"timeout": 2**62},
            {"timeout": int("9" * 4000)},
            {"stream": 1},
            {"stream": "x" * 257},
            {"binary_data_output": 1},
            {"triton_enable_empty_final_response": True},
            {"sequence_id": 1},
            {"sequence_start": True},
            {"nested": {}},
            {"list": []},
            {str(number): 1 for number in range(257)},
        ],
        ids=lambda parameters: next(iter(parameters)),
    )
    def test_a_parameter_out_of_range_is_refused(self, parameters: dict[str, Any]) -> None:
        refusal(document(parameters=parameters))

    def test_outputs_say_themselves_how_they_come(self) -> None:
        outputs = [
            {"name": "a", "parameters": {"binary_data": False}},
            {"name": "b"},
            {"name": "c", "parameters": {"classification": 3}},
        ]
        request, form = decode(document(outputs=outputs, parameters={"binary_data_output": True}))
        assert request.outputs == (RequestedOutput("a"), RequestedOutput("b"), RequestedOutput("c", 3))
        assert form == ReplyFormat(True, {"a": False, "b": True, "c": True})

    @pytest.mark.parametrize("wish", [{"classification": -1}, {"classification": 10**9}, {"binary_data": "yes"}])
    def test_a_wish_that_makes_no_sense_is_refused(self, wish: dict[str, Any]) -> None:
        refusal(document(outputs=[{"name": "a", "parameters": wish}]))


class TestRawRequests:
    def test_the_whole_body_is_the_one_input(self) -> None:
        body = np.arange(28 * 28, dtype="<f4").tobytes()
        request, form = decode(body, 0)
        assert (request.inputs[0].shape, bytes(request.inputs[0].data), form) == (
            (1, 28, 28, 1),
            body,
            ReplyFormat(True),
        )

    def test_an_open_size_is_reckoned(self) -> None:
        model = describe(inputs=(TensorSpec("x", DataType.INT16, (-1, -1, 3)),))
        assert decode(b"\0" * 24, 0, model)[0].inputs[0].shape == (1, 4, 3)

    def test_bytes_come_without_a_length(self) -> None:
        model = describe(inputs=(TensorSpec("x", DataType.BYTES, (-1, 1)),))
        (tensor,) = decode(b"\xff\xd8jpeg", 0, model)[0].inputs
        assert (tensor.shape, to_numpy(tensor).tolist()) == ((1, 1), [[b"\xff\xd8jpeg"]])

    @pytest.mark.parametrize(
        "inputs",
        [
            (),
            (TensorSpec("x", DataType.FP32, (1,)),) * 2,
            (TensorSpec("x", DataType.FP32, (-1, -1, -1)),),
            (TensorSpec("x", DataType.FP32, (-1, 5)),),
            (TensorSpec("x", DataType.FP32, (-1, -1, 5)),),
            (TensorSpec("x", DataType.FP32, (-1, -1, 0)),),
            (TensorSpec("x", DataType.BYTES, (-1, 2)),),
        ],
    )
    def test_what_cannot_be_said_without_a_header_is_refused(self, inputs: tuple[TensorSpec, ...]) -> None:
        refusal(b"\0" * 24, 0, describe(inputs=inputs))


def response(*tensors: Tensor, request_id: str = "") -> InferenceResponse:
    return InferenceResponse(ModelName("m"), Version("1"), RequestId(request_id), tensors)


class TestAnswers:
    def test_golden_json(self) -> None:
        length, parts = encode_infer(response(from_numpy("y", ONE), request_id="7"), ReplyFormat())
        assert length is None
        assert b"".join(parts) == (
            b'{"model_name":"m","model_version":"1","id":"7","outputs":'
            b'[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.5,-2.0]}]}'
        )

    def test_golden_binary(self) -> None:
        length, parts = encode_infer(response(from_numpy("y", ONE)), ReplyFormat(True))
        text = (
            b'{"model_name":"m","model_version":"1","outputs":'
            b'[{"name":"y","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}]}'
        )
        assert (length, b"".join(parts)) == (len(text), text + bytes.fromhex("0000c03f000000c0"))

    def test_the_id_is_there_only_if_it_was_given(self) -> None:
        (text,) = encode_infer(response(), ReplyFormat())[1]
        assert "id" not in json.loads(text)

    def test_names_are_quoted(self) -> None:
        name = 'quo"te\n\u00fc'
        (text,) = encode_infer(response(from_numpy(name, ONE), request_id='"'), ReplyFormat())[1]
        assert json.loads(text)["outputs"][0]["name"] == name
        assert json.loads(text)["id"] == '"'

    def test_an_empty_binary_output_has_a_size_and_the_answer_stays_json(self) -> None:
        length, parts = encode_infer(response(Tensor("y", DataType.FP32, (0, 2), b"")), ReplyFormat(True))
        assert length is None
        assert json.loads(b"".join(parts))["outputs"][0]["parameters"] == {"binary_data_size": 0}

    def test_each_output_comes_as_it_was_asked_for(self) -> None:
        a, b = from_numpy("a", ONE), Tensor("b", DataType.BF16, (1,), b"\x80\x3f")
        length, parts = encode_infer(response(a, b), ReplyFormat(False, {"a": False, "b": True}))
        body = b"".join(parts)
        outputs = json.loads(body[:length])["outputs"]
        assert outputs[0]["data"] == [1.5, -2.0]
        assert (outputs[1]["parameters"], body[length:]) == ({"binary_data_size": 2}, b"\x80\x3f")

    def test_large_outputs_are_not_copied(self) -> None:
        data = memoryview(bytearray(100))
        assert encode_infer(response(Tensor("y", DataType.UINT8, (100,), data)), ReplyFormat(True))[1][1] is data

    def test_half_precision_without_binary_is_the_clients_fault(self) -> None:
        with pytest.raises(ApplianceError) as caught:
            encode_infer(response(Tensor("y", DataType.FP16, (1,), b"\0\0")), ReplyFormat())
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("FP32") | st.just("BYTES")
)
names = st.sampled_from(
    ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "binary_data_size", "id", "classification"]
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=4), inner, max_size=5)
)
inputs = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.just("x") | scalars,
            "datatype": st.sampled_from([kind.value for kind in DataType]) | scalars,
            "shape": st.lists(st.integers(-1, 4), max_size=3) | values,
            "data": st.lists(st.integers(-2, 300) | scalars, max_size=5) | values,
            "parameters": st.dictionaries(names, st.integers(0, 20) | values, max_size=3) | values,
        },
    ),
    max_size=3,
)
requests = st.fixed_dictionaries(
    {"inputs": inputs | values}, optional={"outputs": inputs | values, "parameters": values, "id": scalars}
)


def only_a_refusal(body: bytes, header_length: int | None) -> None:
    """Decode, and answer with what came: neither may end in anything but a refusal that blames the client."""
    outcome = ApplianceError(ErrorCode.INVALID_ARGUMENT, "")
    try:
        request, form = decode(body, header_length)
        encode_infer(InferenceResponse(request.model, Version("1"), request.id, request.inputs), form)
    except ApplianceError as error:
        outcome = error
    assert outcome.code in CLIENTS_FAULT
    assert len(outcome.message) < 10_000


class TestAnyBytes:
    @given(requests, st.binary(max_size=40), st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_a_document_of_any_shape_is_answered_or_refused(self, fields: Any, tail: bytes, framed: bool) -> None:
        text = json.dumps(fields).encode()
        only_a_refusal(text + tail, len(text) if framed else None)

    @given(st.binary(max_size=200), st.none() | st.integers(0, 250))
    @settings(max_examples=200, deadline=None)
    @example(b"[" * 1000, None)
    @example(b'{"inputs":' + b"[" * 60, None)
    @example(b'{"inputs":[{"name":"a","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":2}}]}\0\0', 92)
    def test_any_bytes_are_answered_or_refused(self, body: bytes, header_length: int | None) -> None:
        only_a_refusal(body, header_length)

    @given(st.lists(st.tuples(st.integers(0, len(MIXED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
    @settings(max_examples=200, deadline=None)
    def test_a_request_with_some_bytes_changed_is_answered_or_refused(self, changes: list[tuple[int, int]]) -> None:
        body = bytearray(MIXED)
        for offset, value in changes:
            body[offset] = value
        only_a_refusal(bytes(body), len(MIXED_HEADER))

    @pytest.mark.parametrize("data", [b"\5\0\0\0", b"\xff\xff\xff\xffaaaa", join_bytes([b"a", b"b"]), b"\0"])
    def test_bytes_elements_that_lie_about_their_length_never_get_past_the_answer(self, data: bytes) -> None:
        header = document(
            inputs=[{"name": "s", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}]
        )
        only_a_refusal(header + data, len(header))
