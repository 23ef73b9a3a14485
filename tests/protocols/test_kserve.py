"""Open Inference Protocol documents: what clients read, and the JSON form of tensors both ways."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from appliance.core.description import (
    BatchStatistic,
    DurationStatistic,
    IndexEntry,
    ModelDescription,
    ModelStatistics,
    ServerDescription,
)
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import ModelName, Version
from appliance.core.tensor import DataType, Tensor, TensorSpec
from appliance.protocols import kserve
from appliance.protocols.tensors import from_numpy, join_bytes, to_numpy

JSON_TYPES = [kind for kind in DataType if kind not in (DataType.FP16, DataType.BF16, DataType.BYTES)]


def describe(**changes: Any) -> ModelDescription:
    fields: dict[str, Any] = {
        "name": ModelName("digits"),
        "version": Version("3"),
        "versions": (Version("2"), Version("3")),
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "inputs": (TensorSpec("image", DataType.FP32, (-1, 28, 28, 1)),),
        "outputs": (TensorSpec("scores", DataType.FP32, (-1, 10)), TensorSpec("word", DataType.BYTES, (-1, 1))),
        "max_batch_size": 16,
        "max_queue_delay_us": 500,
        "instances": 2,
        "device": "cpu",
        "provider": "CPUExecutionProvider",
    }
    return ModelDescription(**(fields | changes))


def tensor(datatype: DataType, shape: tuple[int, ...], text: str) -> Tensor:
    return kserve.tensor_from_json("x", datatype, shape, msgspec.Raw(text.encode()))


def refused(datatype: DataType, shape: tuple[int, ...], text: str) -> str:
    with pytest.raises(ApplianceError) as caught:
        tensor(datatype, shape, text)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    return caught.value.message


def deepest(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(deepest, value), default=0) if isinstance(value, list) else 0


class TestDocuments:
    def test_metadata_includes_the_batch_axis_and_config_leaves_it_out(self) -> None:
        model = describe()
        assert kserve.model_document(model)["inputs"] == [
            {"name": "image", "datatype": "FP32", "shape": [-1, 28, 28, 1]}
        ]
        config = kserve.config_document(model)
        assert config["input"] == [{"name": "image", "data_type": "TYPE_FP32", "dims": [28, 28, 1]}]
        assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 500}

    def test_an_unbatched_model_has_whole_dims_and_no_batching(self) -> None:
        config = kserve.config_document(describe(max_batch_size=0, unbatched_reason="the batch axis is fixed at 1"))
        assert config["input"][0]["dims"] == [-1, 28, 28, 1]
        assert "dynamic_batching" not in config
        assert config["parameters"]["appliance.unbatched_reason"] == {"string_value": "the batch axis is fixed at 1"}

    def test_bytes_are_called_string_in_a_config(self) -> None:
        assert kserve.config_document(describe())["output"][1]["data_type"] == "TYPE_STRING"

    def test_versions_are_strings(self) -> None:
        assert kserve.model_document(describe())["versions"] == ["2", "3"]

    def test_server_metadata_has_the_three_fields_of_the_protocol(self) -> None:
        document = kserve.server_document(ServerDescription("appliance", "1.2", ("statistics",), "boot"))
        assert document == {"name": "appliance", "version": "1.2", "extensions": ["statistics"]}

    def test_statistics_have_tritons_fields(self) -> None:
        model = ModelStatistics(ModelName("digits"), Version("3"), last_inference_ms=7, inference_count=5)
        model.success.add(1000, 2)
        for size in (8, 1):
            model.batches[size] = BatchStatistic(
                size, DurationStatistic(), DurationStatistic(1, 9), DurationStatistic()
            )
        (document,) = kserve.statistics_document([model])["model_stats"]
        assert document["inference_stats"]["success"] == {"count": 2, "ns": 1000}
        assert set(document["inference_stats"]) == {
            *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
            *("cache_hit", "cache_miss"),
        }
        assert [batch["batch_size"] for batch in document["batch_stats"]] == [1, 8]
        assert document["last_inference"] == 7

    def test_an_index_entry_has_four_strings(self) -> None:
        entries = [IndexEntry(ModelName("digits"), "1", "READY", "")]
        assert kserve.index_document(entries) == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]

    @pytest.mark.parametrize(
        ("body", "ready"), [(b"", False), (b" ", False), (b"{}", False), (b'{"ready":true}', True)]
    )
    def test_an_index_request_may_be_empty(self, body: bytes, ready: bool) -> None:
        assert kserve.decode_index_request(body) is ready

    @pytest.mark.parametrize("body", [b"", b"{}", b'{"parameters":{"unload_dependents":false,"mine":1}}'])
    def test_a_load_request_may_be_empty_or_carry_parameters(self, body: bytes) -> None:
        kserve.check_control_request(body)

    @pytest.mark.parametrize(
        "parameters", [{"config": "{}"}, {"file:1/model.onnx": "AAAA"}, {"unload_dependents": True}]
    )
    def test_a_load_request_cannot_bring_files_or_settings(self, parameters: dict[str, Any]) -> None:
        with pytest.raises(ApplianceError) as caught:
            kserve.check_control_request(json.dumps({"parameters": parameters}).encode())
        assert caught.value.code is ErrorCode.UNSUPPORTED


class TestStructure:
    @pytest.mark.parametrize("depth", [64, 65])
    @pytest.mark.parametrize("opening", ["[", '{"a":'])
    def test_the_depth_limit_is_exact(self, depth: int, opening: str) -> None:
        closing = "]" if opening == "[" else "}"
        text = (opening * depth + "1" + closing * depth).encode()
        if depth == 64:
            kserve.check_structure(text, 64)
        else:
            with pytest.raises(ApplianceError, match="65 levels deep, 64 are allowed"):
                kserve.check_structure(text, 64)

    def test_brackets_in_strings_do_not_count(self) -> None:
        text = json.dumps({"a": "[" * 1000, 'b"\\': '\\"' + "{" * 1000, "c": [1]}).encode()
        kserve.check_structure(text, 4)

    @given(
        st.recursive(
            st.text('"\\\\[]{}:a', max_size=6) | st.none(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text('"\\\\[:', max_size=3), inner),
        )
    )
    @settings(max_examples=150, deadline=None)
    def test_the_depth_is_what_a_parser_finds(self, value: Any) -> None:
        text = json.dumps(value).encode()
        depth = deepest(value)
        kserve.check_structure(text, depth)
        if depth:
            with pytest.raises(ApplianceError, match=f"nests {depth} levels"):
                kserve.check_structure(text, depth - 1)

    def test_siblings_do_not_count_as_depth(self) -> None:
        kserve.check_structure(json.dumps([[1]] * 1000).encode(), 3)

    @pytest.mark.parametrize("opening", [b"[", b'{"a":', b'"[', b'\\"['])
    def test_five_million_levels_are_refused_or_cheap(self, opening: bytes) -> None:
        try:
            kserve.check_structure(opening * (5_000_000 // len(opening)), 64)
        except ApplianceError as error:
            assert error.code is ErrorCode.INVALID_ARGUMENT

    def test_a_million_parameters_are_refused_before_they_are_built(self) -> None:
        text = ("{" + ",".join(f'"{number}":1' for number in range(100_000)) + "}").encode()
        with pytest.raises(ApplianceError, match="100000 names"):
            kserve.check_structure(text, 64)

    def test_colons_in_data_are_no_names(self) -> None:
        kserve.check_structure(json.dumps(["a:b"] * 50_000).encode(), 64)


class TestTensorsFromJson:
    def test_flat_nested_and_partly_nested_data_are_the_same(self) -> None:
        whole = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
        forms = [whole, [[1, 2, 3, 4], [5, 6, 7, 8]], list(range(1, 9))]
        datas = {bytes(tensor(DataType.INT16, (2, 2, 2), json.dumps(form)).data) for form in forms}
        assert datas == {np.arange(1, 9, dtype="<i2").tobytes()}

    @given(
        st.sampled_from(JSON_TYPES).flatmap(
            lambda kind: st.tuples(
                st.just(kind),
                hnp.arrays(kind.numpy, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
                st.booleans(),
            )
        )
    )
    @settings(max_examples=150, deadline=None)
    def test_what_json_can_hold_comes_back_bit_by_bit(self, case: tuple[DataType, Any, bool]) -> None:
        datatype, array, nested = case
        if array.dtype.kind == "f":
            array = np.nan_to_num(array, posinf=0, neginf=0)
        values = array.tolist() if nested and array.ndim else array.reshape(-1).tolist()
        found = tensor(datatype, array.shape, json.dumps(values))
        assert bytes(found.data) == array.tobytes()
        again = kserve.tensor_from_json("x", datatype, array.shape, msgspec.Raw(kserve.json_data(found)))
        assert again == found

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6))
    @settings(max_examples=60, deadline=None)
    def test_strings_come_back(self, words: list[str]) -> None:
        found = tensor(DataType.BYTES, (len(words),), json.dumps(words))
        assert to_numpy(found).tolist() == [word.encode() for word in words]
        assert json.loads(kserve.json_data(found)) == words

    def test_an_empty_tensor_may_be_nested(self) -> None:
        assert tensor(DataType.FP32, (2, 0), "[[], []]").data == b""
        assert tensor(DataType.FP32, (2, 0), "[]").data == b""
        assert "holds no elements" in refused(DataType.FP32, (2, 0), "[[], [1]]")

    @pytest.mark.parametrize(
        ("datatype", "shape", "text"),
        [
            (DataType.UINT8, (1,), "[256]"),
            (DataType.INT8, (1,), "[-129]"),
            (DataType.UINT64, (1,), "[-1]"),
            (DataType.UINT64, (1,), "[18446744073709551616]"),
            (DataType.INT64, (1,), "[" + "9" * 5000 + "]"),
            (DataType.INT32, (1,), "[1.5]"),
            (DataType.INT32, (1,), "[true]"),
            (DataType.FP32, (1,), "[1e39]"),
            (DataType.FP32, (1,), "[1e309]"),
            (DataType.FP64, (1,), "[1e309]"),
            (DataType.FP32, (1,), '["1"]'),
            (DataType.FP32, (1,), "[null]"),
            (DataType.BOOL, (1,), "[1]"),
            (DataType.BYTES, (1,), "[1]"),
            (DataType.BYTES, (1,), '["\\ud800"]'),
        ],
    )
    def test_a_value_that_does_not_fit_is_refused(self, datatype: DataType, shape: tuple[int, ...], text: str) -> None:
        assert "fit" in refused(datatype, shape, text)

    @pytest.mark.parametrize(
        "text", ["1", "null", '"a"', "{}", "[[[1,2,3,4]]]", "[[1,2,3],[4]]", "[1,[2,3,4]]", "[1,2,3]"]
    )
    def test_data_that_is_not_the_shape_is_refused(self, text: str) -> None:
        assert "tensor 'x'" in refused(DataType.FP32, (2, 2), text)

    @pytest.mark.parametrize("shape", [(2**4, 2**60 + 2), (2**2, 2**60 + 2), (2**40,)])
    def test_a_shape_that_would_overflow_is_counted_exactly(self, shape: tuple[int, ...]) -> None:
        assert "holds" in refused(DataType.FP32, shape, json.dumps([1.0] * 32))
        assert "holds" in refused(DataType.BYTES, shape, json.dumps(["a"] * 8))

    @pytest.mark.parametrize("datatype", [DataType.FP16, DataType.BF16])
    def test_half_precision_has_no_json_form(self, datatype: DataType) -> None:
        assert refused(datatype, (1,), "[1]").endswith("is not supported. Please use the binary data format")
        with pytest.raises(ApplianceError, match="Please use the binary data format"):
            kserve.json_data(Tensor("x", datatype, (1,), b"\0\0"))


class TestTensorsToJson:
    def test_output_data_is_flat(self) -> None:
        assert kserve.json_data(from_numpy("x", np.arange(4, dtype="i4").reshape(2, 2))) == b"[0,1,2,3]"

    @pytest.mark.parametrize("dtype", ["f4", "f8"])
    def test_not_a_number_is_never_null(self, dtype: str) -> None:
        text = kserve.json_data(from_numpy("x", np.array([1.5, np.nan, np.inf, -np.inf], dtype)))
        assert text == b"[1.5,NaN,Infinity,-Infinity]"
        one, nan, up, down = json.loads(text)
        assert (one, math.isnan(nan), up, down) == (1.5, True, math.inf, -math.inf)

    def test_bytes_that_are_no_text_need_binary(self) -> None:
        with pytest.raises(ApplianceError, match="not UTF-8"):
            kserve.json_data(Tensor("x", DataType.BYTES, (1,), join_bytes([b"\xff"])))
