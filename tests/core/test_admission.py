"""Whether a request fits a model, and what it is told if not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.admission import Admission
from appliance.core.assembly import plan_slot
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import InferenceRequest, ModelName, RequestedOutput
from appliance.core.tensor import DataType, Tensor, TensorSpec

IMAGE = TensorSpec("image", DataType.FP32, (-1, 4, 4, 1))
SCORES = TensorSpec("scores", DataType.FP32, (-1, 10))
OTHER = TensorSpec("other", DataType.INT8, (-1, 2))


def tensor(
    shape: tuple[int, ...], name: str = "image", datatype: DataType = DataType.FP32, size: int | None = None
) -> Tensor:
    count = 1
    for side in shape:
        count *= side
    return Tensor(name, datatype, shape, bytes(count * datatype.itemsize if size is None else size))


def admission(*inputs: TensorSpec, batched: bool = True, max_rows: int = 8) -> Admission:
    return Admission(plan_slot(inputs or (IMAGE,), (SCORES,), batched=batched, max_rows=max_rows))


def request(*tensors: Tensor, **changes: Any) -> InferenceRequest:
    return InferenceRequest(ModelName("m"), tensors, **changes)


def test_a_fitting_request_is_put_into_the_model_s_order() -> None:
    fitted = admission(IMAGE, OTHER).fit(request(tensor((3, 2), "other", DataType.INT8), tensor((3, 4, 4, 1))))
    assert [item.name for item in fitted.tensors] == ["image", "other"]
    assert (fitted.rows, fitted.nbytes) == (3, 3 * 64 + 6)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (tensor((4, 4, 1)), "the batch axis is missing: send [1, 4, 4, 1]"),
        (tensor((1, 1, 4, 4)), "channels first"),
        (tensor((1, 5, 4, 1)), "expected shape [-1, 4, 4, 1], [1, 5, 4, 1] came"),
        (tensor((9, 4, 4, 1)), "1 to 8 rows"),
        (tensor((0, 4, 4, 1)), "1 to 8 rows"),
        (tensor((1, 4, 4, 1), datatype=DataType.FP64), "expected datatype FP32, FP64 came"),
        (tensor((1, 4, 4, 1), size=63), "needs 64 bytes, 63 came"),
        (tensor((1, 4, 4, 1), "picture"), "unknown input 'picture'; the model takes 'image'"),
    ],
)
def test_a_request_that_does_not_fit_is_told_what_to_send(sent: Tensor, words: str) -> None:
    with pytest.raises(ApplianceError) as caught:
        admission().fit(request(sent))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert words in caught.value.message


def test_missing_and_doubled_inputs_and_outputs_are_named() -> None:
    both = admission(IMAGE, OTHER)
    good = tensor((1, 4, 4, 1))
    for sent, words in (
        (request(good), "'other' is missing"),
        (request(good, good), "came twice"),
        (request(good, tensor((2, 2), "other", DataType.INT8)), "must agree on the batch axis"),
    ):
        with pytest.raises(ApplianceError, match=words):
            both.fit(sent)
    for outputs, words in (
        ((RequestedOutput("nothing"),), "unknown output 'nothing'; the model gives 'scores'"),
        ((RequestedOutput("scores"), RequestedOutput("scores")), "asked for twice"),
    ):
        with pytest.raises(ApplianceError, match=words):
            admission().fit(request(good, outputs=outputs))


def test_classes_may_be_asked_of_one_output_or_of_all() -> None:
    good = tensor((1, 4, 4, 1))
    assert admission().fit(request(good)).outputs == ((0, 0),)
    assert admission().fit(request(good, classification=3)).outputs == ((0, 3),)
    assert admission().fit(request(good, outputs=(RequestedOutput("scores", 2),))).outputs == ((0, 2),)


def test_open_sizes_make_the_shape_key() -> None:
    flexible = Admission(plan_slot((TensorSpec("x", DataType.FP32, (-1, -1)),), (SCORES,), batched=True, max_rows=8))
    keys = [flexible.fit(request(tensor((rows, width), "x"))).shape_key for rows, width in ((1, 3), (2, 3), (1, 4))]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x01\0\0\0a\x01\0\0", "ends before the length of element 1"),
        (b"\x01\0\0\0a\xff\0\0\0b", "element 1 is longer"),
        (b"\xff\xff\xff\xff\x01\0\0\0", "element 0 is longer"),
        (b"\0\0\0\0\0\0\0\0x", "1 bytes follow"),
    ],
)
def test_strings_whose_lengths_lie_never_reach_a_batch(data: bytes, words: str) -> None:
    """They would shift the rows of whoever shares the batch."""
    texts = admission(TensorSpec("text", DataType.BYTES, (-1, 1)))
    with pytest.raises(ApplianceError, match=words):
        texts.fit(request(Tensor("text", DataType.BYTES, (2, 1), data)))


@given(st.lists(st.integers(0, 9), max_size=5), st.sampled_from(list(DataType)), st.integers(0, 700))
def test_any_tensor_fits_or_is_invalid(shape: list[int], datatype: DataType, size: int) -> None:
    """The quick check for the common case and the long one agree: what is admitted has exactly the model's bytes."""
    try:
        fitted = admission().fit(request(tensor(tuple(shape), datatype=datatype, size=size)))
    except ApplianceError as error:
        assert error.code is ErrorCode.INVALID_ARGUMENT
    else:
        assert fitted.nbytes == fitted.rows * 64
        assert 1 <= fitted.rows <= 8
