"""Where the tensors of a batch lie in a slot of the arena: computed once per model, the same on both sides of the shared memory.

A slot holds one batch: first its inputs, then its outputs. If every size but the batch axis is known, the layout is *static*:
each tensor has a fixed place with room for `max_rows` rows, and nothing but the row count needs to be said per batch. Otherwise
places are computed batch by batch, and what does not fit travels in memory of its own ("spilled").
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.tensor import DataType, Shape, Tensor, TensorSpec, element_count

ALIGNMENT = 64
"""Every tensor starts on a cache line: engines' vector loads want it, and it is what their own allocators give."""

VARIABLE_BYTES = 1 << 20
"""Room per slot and direction for tensors of unknown size. Larger ones are spilled, which costs a mapping per batch."""


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor of one batch: byte offset in the slot (or in the spilled memory), its bytes and its shape."""

    offset: int
    nbytes: int
    shape: Shape


class SlotLayout(msgspec.Struct, frozen=True):
    """The layout of one slot. `row_bytes` and `offsets` are per tensor, in the model's order, where that side is static.

    `slot_bytes` includes both regions; inputs start at 0, outputs at `output_base`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    max_rows: int
    static_inputs: bool
    static_outputs: bool
    input_row_bytes: tuple[int, ...]
    input_offsets: tuple[int, ...]
    output_row_bytes: tuple[int, ...]
    output_offsets: tuple[int, ...]
    output_base: int
    slot_bytes: int

    def shape(self, spec: TensorSpec, rows: int) -> Shape:
        """That tensor's shape in a batch of `rows` rows; only for a static side."""
        return (rows, *spec.shape[1:]) if self.batched else spec.shape


def align(offset: int) -> int:
    """The next offset on a cache line."""
    return (offset + ALIGNMENT - 1) & ~(ALIGNMENT - 1)


def row_bytes(spec: TensorSpec, *, batched: bool) -> int | None:
    """Bytes of one row (batched) or of the whole tensor; None where that is not known beforehand."""
    sizes = spec.shape[1:] if batched else spec.shape
    if spec.datatype is DataType.BYTES or any(size < 0 for size in sizes):
        return None
    return element_count(sizes) * spec.datatype.itemsize


def plan_slot(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    batched: bool,
    max_rows: int,
    static_outputs: bool = True,
) -> SlotLayout:
    """The slot layout of a model. `static_outputs` false where the declared output shapes proved untrue."""
    in_rows = [row_bytes(spec, batched=batched) for spec in inputs]
    out_rows = [row_bytes(spec, batched=batched) for spec in outputs]
    inputs_known = all(size is not None for size in in_rows)
    outputs_known = static_outputs and all(size is not None for size in out_rows)
    rows = max_rows if batched else 1
    input_offsets, output_base = _places(in_rows if inputs_known else None, rows, 0)
    output_offsets, end = _places(out_rows if outputs_known else None, rows, output_base)
    return SlotLayout(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batched=batched,
        max_rows=rows,
        static_inputs=inputs_known,
        static_outputs=outputs_known,
        input_row_bytes=tuple(size or 0 for size in in_rows) if inputs_known else (),
        input_offsets=input_offsets,
        output_row_bytes=tuple(size or 0 for size in out_rows) if outputs_known else (),
        output_offsets=output_offsets,
        output_base=output_base,
        slot_bytes=end,
    )


def _places(sizes: Sequence[int | None] | None, rows: int, base: int) -> tuple[tuple[int, ...], int]:
    if sizes is None:
        return (), align(base + VARIABLE_BYTES)
    offsets = []
    for size in sizes:
        offsets.append(base)
        base = align(base + (size or 0) * rows)
    return tuple(offsets), base


def place_inputs(requests: Sequence[Sequence[Tensor]], *, batched: bool) -> tuple[tuple[Place, ...], int]:
    """Places, one after the other, for a batch whose sizes are only known now, and the bytes they need in all.

    `requests` holds each request's tensors in the model's order; those of one batch agree in all but their rows.
    """
    places = []
    offset = 0
    first = requests[0]
    for index, tensor in enumerate(first):
        nbytes = sum(len(tensors[index].data) for tensors in requests)
        shape = tensor.shape
        if batched:
            shape = (sum(tensors[index].shape[0] for tensors in requests), *shape[1:])
        places.append(Place(offset, nbytes, shape))
        offset = align(offset + nbytes)
    return tuple(places), offset


def split_rows(spec: TensorSpec, shape: Shape, data: memoryview, rows: Sequence[int]) -> list[tuple[Shape, bytes]]:
    """An output of a batch, split into each request's rows: shape and owned bytes per request.

    ENGINE_FAULT if the output does not have one row per row of the batch: then nobody can say which part is whose.
    """
    if len(rows) == 1:
        return [(shape, bytes(data))]
    if not shape or shape[0] != sum(rows):
        raise ApplianceError(
            ErrorCode.ENGINE_FAULT,
            f"output {spec.name!r} has shape {list(shape)} for a batch of {sum(rows)} rows; "
            "set max_batch_size = 1 for this model",
        )
    ends = _bytes_row_ends(data, shape) if spec.datatype is DataType.BYTES else None
    row_nbytes = len(data) // shape[0] if ends is None else 0
    parts = []
    first = start = 0
    for count in rows:
        first += count
        end = first * row_nbytes if ends is None else (ends[first - 1] if first else 0)
        parts.append(((count, *shape[1:]), bytes(data[start:end])))
        start = end
    return parts


def _bytes_row_ends(data: memoryview, shape: Shape) -> list[int]:
    """Where each row of a BYTES tensor ends, in bytes."""
    per_row = element_count(shape[1:])
    ends = []
    offset = 0
    for _ in range(shape[0]):
        for _ in range(per_row):
            offset += 4 + int.from_bytes(data[offset : offset + 4], "little")
        ends.append(offset)
    return ends
