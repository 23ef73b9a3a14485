"""Does this request fit this model? A value in, a fitted request or INVALID_ARGUMENT out; nothing is copied.

The messages name the tensor, what the model expects, what came, and the most likely cause.
"""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from appliance.core.assembly import SlotLayout
from appliance.core.errors import invalid
from appliance.core.request import InferenceRequest
from appliance.core.tensor import DataType, Shape, Tensor, TensorSpec, check_elements, check_size, element_count


class Fitted(msgspec.Struct, frozen=True, gc=False):
    """A request in the model's terms: tensors in the model's order, rows on the batch axis (1 if unbatched), bytes in all.

    Requests with equal `shape_key` may share a batch. `outputs` are the positions of the outputs to answer, each with the
    number of classes asked for (0: the tensor itself).
    """

    tensors: tuple[Tensor, ...]
    rows: int
    nbytes: int
    shape_key: Hashable
    outputs: tuple[tuple[int, int], ...]


class Admission:
    """The check for one model version. Made once per version, since the layout and the names do not change."""

    def __init__(self, layout: SlotLayout) -> None:
        self._layout = layout
        self._inputs = {spec.name: index for index, spec in enumerate(layout.inputs)}
        self._outputs = {spec.name: index for index, spec in enumerate(layout.outputs)}
        self._all_outputs = tuple((index, 0) for index in range(len(layout.outputs)))
        self._single = layout.inputs[0] if len(layout.inputs) == 1 and layout.static_inputs else None
        self._single_tail = self._single.shape[1:] if self._single else ()
        self._single_bytes = layout.input_row_bytes[0] if self._single else 0

    def fit(self, request: InferenceRequest) -> Fitted:
        """The request fitted to the model; INVALID_ARGUMENT with the reason where it does not fit."""
        fitted = self._fit_single(request)
        if fitted is not None:
            return fitted
        tensors = self._ordered(request.inputs)
        rows = 1
        for position, (spec, tensor) in enumerate(zip(self._layout.inputs, tensors, strict=True)):
            self._check(spec, tensor)
            if self._layout.batched:
                if position == 0:
                    rows = tensor.shape[0]
                elif tensor.shape[0] != rows:
                    raise invalid(
                        f"inputs must agree on the batch axis: {tensors[0].name!r} has {rows} rows, "
                        f"{tensor.name!r} has {tensor.shape[0]}"
                    )
        self._check_rows(rows)
        tails = () if self._layout.static_inputs else tuple(tensor.shape[1:] for tensor in tensors)
        return Fitted(tensors, rows, sum(tensor.nbytes for tensor in tensors), tails, self._wanted(request))

    def _fit_single(self, request: InferenceRequest) -> Fitted | None:
        """The common case, one input of known size, in a few comparisons; None leaves the rest to the long way."""
        spec = self._single
        if spec is None or len(request.inputs) != 1 or not self._layout.batched:
            return None
        tensor = request.inputs[0]
        shape = tensor.shape
        if (
            tensor.name != spec.name
            or tensor.datatype is not spec.datatype
            or shape[1:] != self._single_tail
            or not shape
            or not 0 < shape[0] <= self._layout.max_rows
        ):
            return None
        nbytes = len(tensor.data)
        if nbytes != shape[0] * self._single_bytes:
            return None
        outputs = self._wanted(request) if request.outputs or request.classification else self._all_outputs
        return Fitted(request.inputs, shape[0], nbytes, (), outputs)

    def _ordered(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found: list[Tensor | None] = [None] * len(self._inputs)
        for tensor in inputs:
            index = self._inputs.get(tensor.name)
            if index is None:
                raise invalid(f"unknown input {tensor.name[:64]!r}; the model takes {_names(self._layout.inputs)}")
            if found[index] is not None:
                raise invalid(f"input {tensor.name!r} came twice")
            found[index] = tensor
        missing = [spec.name for spec, tensor in zip(self._layout.inputs, found, strict=True) if tensor is None]
        if missing:
            raise invalid(
                f"input {missing[0]!r} is missing; expected {len(self._inputs)} inputs "
                f"({_names(self._layout.inputs)}), got {len(inputs)}"
            )
        return tuple(tensor for tensor in found if tensor is not None)

    def _check(self, spec: TensorSpec, tensor: Tensor) -> None:
        if tensor.datatype is not spec.datatype:
            raise invalid(
                f"input {spec.name!r}: expected datatype {spec.datatype.value}, {tensor.datatype.value} came; convert it first"
            )
        if not _matches(spec.shape, tensor.shape):
            raise invalid(
                f"input {spec.name!r}: expected shape {list(spec.shape)}, {list(tensor.shape)} came"
                + _shape_hint(spec.shape, tensor.shape)
            )
        if tensor.datatype is DataType.BYTES:
            check_size(spec.name, tensor.datatype, tensor.shape, tensor.nbytes)
            check_elements(spec.name, tensor.shape, tensor.data)
        else:
            need = element_count(tensor.shape) * tensor.datatype.itemsize
            if need != tensor.nbytes:
                raise invalid(
                    f"input {spec.name!r}: shape {list(tensor.shape)} needs {need} bytes, {tensor.nbytes} came"
                )

    def _check_rows(self, rows: int) -> None:
        if self._layout.batched and not 0 < rows <= self._layout.max_rows:
            raise invalid(
                f"the batch axis must hold 1 to {self._layout.max_rows} rows (max_batch_size), {rows} came; "
                "split the request"
            )

    def _wanted(self, request: InferenceRequest) -> tuple[tuple[int, int], ...]:
        if not request.outputs:
            return tuple((index, request.classification) for index, _ in self._all_outputs)
        wanted: list[tuple[int, int]] = []
        for output in request.outputs:
            index = self._outputs.get(output.name)
            if index is None:
                raise invalid(f"unknown output {output.name[:64]!r}; the model gives {_names(self._layout.outputs)}")
            if any(index == seen for seen, _ in wanted):
                raise invalid(f"output {output.name!r} was asked for twice")
            wanted.append((index, output.classification or request.classification))
        return tuple(wanted)


def _names(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(repr(spec.name) for spec in specs)


def _matches(expected: Shape, shape: Shape) -> bool:
    return len(expected) == len(shape) and all(want in (-1, size) for want, size in zip(expected, shape, strict=True))


def _shape_hint(expected: Shape, shape: Shape) -> str:
    """The most likely cause, in words; empty if none stands out."""
    if expected and _matches(expected[1:], shape):
        axis = 1 if expected[0] < 0 else expected[0]
        return f"; the batch axis is missing: send {[axis, *shape]}"
    if len(expected) == 4 == len(shape):
        moved_last = (shape[0], shape[2], shape[3], shape[1])
        moved_first = (shape[0], shape[3], shape[1], shape[2])
        if _matches(expected, moved_last):
            return "; it looks like channels first: the model wants channels last"
        if _matches(expected, moved_first):
            return "; it looks like channels last: the model wants channels first"
    return ""
