"""Where tensors lie in a slot, and how a batch's outputs are split again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.assembly import ALIGNMENT, VARIABLE_BYTES, place_inputs, plan_slot, split_rows
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.tensor import DataType, Tensor, TensorSpec

DATATYPES = [datatype for datatype in DataType if datatype is not DataType.BYTES]


@given(
    st.lists(st.tuples(st.sampled_from(DATATYPES), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(DATATYPES), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=4),
    st.integers(1, 33),
)
def test_tensors_of_a_slot_never_overlap_and_are_aligned(
    inputs: list[tuple[DataType, list[int]]], outputs: list[tuple[DataType, list[int]]], rows: int
) -> None:
    specs = [
        [TensorSpec(str(n), datatype, (-1, *tail)) for n, (datatype, tail) in enumerate(side)]
        for side in (inputs, outputs)
    ]
    layout = plan_slot(specs[0], specs[1], batched=True, max_rows=rows)
    assert layout.static_inputs
    assert layout.static_outputs
    sizes = [*layout.input_row_bytes, *layout.output_row_bytes]
    places = sorted(
        (offset, offset + size * rows)
        for offset, size in zip([*layout.input_offsets, *layout.output_offsets], sizes, strict=True)
        if size
    )
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    assert all(end <= layout.slot_bytes for _, end in places)
    assert all(offset >= layout.output_base for offset in layout.output_offsets)


def test_open_sizes_and_strings_are_placed_batch_by_batch() -> None:
    for spec in (TensorSpec("x", DataType.FP32, (-1, -1)), TensorSpec("x", DataType.BYTES, (-1, 2))):
        layout = plan_slot([spec], [spec], batched=True, max_rows=4)
        assert not layout.static_inputs
        assert not layout.static_outputs
        assert layout.slot_bytes == 2 * VARIABLE_BYTES


def test_declared_output_shapes_can_be_distrusted() -> None:
    spec = TensorSpec("x", DataType.FP32, (-1, 2))
    layout = plan_slot([spec], [spec], batched=True, max_rows=4, static_outputs=False)
    assert layout.static_inputs
    assert not layout.static_outputs


def test_inputs_of_a_batch_are_laid_end_to_end() -> None:
    requests = [
        (Tensor("a", DataType.INT8, (2, 3), bytes(6)), Tensor("b", DataType.FP32, (2,), bytes(8))),
        (Tensor("a", DataType.INT8, (1, 3), bytes(3)), Tensor("b", DataType.FP32, (1,), bytes(4))),
    ]
    (first, second), total = place_inputs(requests, batched=True)
    assert (first.offset, first.nbytes, first.shape) == (0, 9, (3, 3))
    assert (second.offset, second.nbytes, second.shape) == (64, 12, (3,))
    assert total >= 64 + 12


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 3))
def test_numbers_are_split_into_each_one_s_rows(rows: list[int], width: int) -> None:
    total = sum(rows)
    data = bytes(n % 256 for n in range(total * width * 2))
    spec = TensorSpec("y", DataType.INT16, (-1, width))
    parts = split_rows(spec, (total, width), memoryview(data), rows)
    assert [shape for shape, _ in parts] == [(count, width) for count in rows]
    assert b"".join(part for _, part in parts) == data


@given(st.lists(st.lists(st.binary(max_size=5), min_size=1, max_size=3), min_size=2, max_size=4))
def test_strings_are_split_where_each_one_s_rows_end(batches: list[list[bytes]]) -> None:
    wire = [b"".join(len(item).to_bytes(4, "little") + item for item in batch) for batch in batches]
    spec = TensorSpec("y", DataType.BYTES, (-1, 1))
    total = sum(map(len, batches))
    parts = split_rows(spec, (total, 1), memoryview(b"".join(wire)), [len(batch) for batch in batches])
    assert [part for _, part in parts] == wire


def test_an_output_that_does_not_follow_the_batch_is_nobody_s() -> None:
    with pytest.raises(ApplianceError, match="max_batch_size = 1") as caught:
        split_rows(TensorSpec("y", DataType.INT8, (-1,)), (3,), memoryview(b"abc"), [1, 1])
    assert caught.value.code is ErrorCode.ENGINE_FAULT
