"""numpy to tensors: what fits is sent as it is, what does not is refused with advice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.client.arrays import Description, description_of, to_result, to_tensors
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import InferenceResponse, ModelName, RequestId, Version
from appliance.core.tensor import DataType, TensorSpec


def model(datatype: DataType, shape: tuple[int, ...] = (-1, 4)) -> Description:
    spec = TensorSpec("x", datatype, shape)
    return Description("m", "1", (spec,), (spec,))


@settings(max_examples=60, deadline=None)
@given(
    datatype=st.sampled_from([item for item in DataType if item.numpy is not None]),
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    transposed=st.booleans(),
)
def test_an_array_arrives_as_it_was(datatype: DataType, shape: tuple[int, ...], transposed: bool) -> None:
    count = int(np.prod(shape, dtype=int))
    array = np.arange(count).astype(datatype.numpy).reshape(shape)
    if transposed:
        array = array.T
    (tensor,) = to_tensors(model(datatype, (-1,) * len(shape)), {"x": array})
    response = InferenceResponse(ModelName("m"), Version("1"), RequestId(""), (tensor,))
    back = to_result(response).outputs["x"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_big_endian_arrays_are_turned_round() -> None:
    (tensor,) = to_tensors(model(DataType.FP32), {"x": np.ones((1, 4), ">f4")})
    assert bytes(tensor.data) == np.ones(4, "<f4").tobytes()


@pytest.mark.parametrize("value", [["ä", b"\x00"], np.array(["ä", b"\x00"], dtype=object)])
def test_text_becomes_bytes(value: Any) -> None:
    (tensor,) = to_tensors(model(DataType.BYTES, (2,)), {"x": value})
    assert bytes(tensor.data) == b"\x02\x00\x00\x00\xc3\xa4\x01\x00\x00\x00\x00"


def test_bf16_is_given_as_float32() -> None:
    (tensor,) = to_tensors(model(DataType.BF16), {"x": np.ones((1, 4), np.float32)})
    assert (tensor.datatype, bytes(tensor.data)) == (DataType.BF16, b"\x80\x3f" * 4)


def test_lists_take_the_models_dtype() -> None:
    (tensor,) = to_tensors(model(DataType.FP32), {"x": [[1, 2, 3, 4]]})
    assert (tensor.shape, bytes(tensor.data)) == ((1, 4), np.array([1, 2, 3, 4], "<f4").tobytes())


@pytest.mark.parametrize(
    ("datatype", "value", "says"),
    [
        (DataType.FP32, np.ones((1, 4)), "FP32 expected, the array is float64.*astype.np.float32"),
        (DataType.FP32, np.ones(4, np.float32), r"\[-1, 4\] expected.*\[4\] came.*newaxis"),
        (DataType.FP32, np.ones((1, 5), np.float32), r"\[-1, 4\] expected.*\[1, 5\] came$"),
        (DataType.FP32, np.ones((1, 4), complex), "complex128"),
        (DataType.FP32, [["a", 2, 3, 4]], "do not make an array of FP32"),
        (DataType.UINT8, [[-1, 2, 3, 4]], "do not make an array of UINT8"),
        (DataType.BF16, np.ones((1, 4)), "BF16 is given as float32"),
        (DataType.BYTES, np.ones((1, 4)), "str or bytes, float64 came"),
        (DataType.BYTES, np.array([[1, 2, 3, 4]], dtype=object), "a int came"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(datatype: DataType, value: Any, says: str) -> None:
    with pytest.raises(ApplianceError, match=says) as caught:
        to_tensors(model(datatype), {"x": value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize("inputs", [{}, {"y": 1}, {"x": 1, "y": 1}])
def test_the_inputs_must_be_the_models(inputs: dict[str, Any]) -> None:
    with pytest.raises(ApplianceError, match="'m' takes the inputs x"):
        to_tensors(model(DataType.FP32), inputs)


@pytest.mark.parametrize("fields", [{}, {"description": 7}, {"description": {"name": "m"}}])
def test_a_description_that_is_none_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApplianceError, match="not understood"):
        description_of(fields)
