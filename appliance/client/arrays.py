"""numpy arrays to a model's tensors and back. What does not fit the model's description is refused here, before it is sent.

It knows values only; both clients use it. Nothing is converted silently: a float64 array for an FP32 input is an error that
says which `astype` mends it. Plain lists and numbers have no dtype of their own and take the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from appliance.core.errors import invalid
from appliance.core.request import InferenceResponse, Parameter, Timing
from appliance.core.tensor import DataType, Tensor, TensorSpec
from appliance.protocols.tensors import NUMPY_TO_DATATYPE, from_numpy, to_numpy


class Description(msgspec.Struct, frozen=True):
    """A model version as the appliance describes it. Specs include the batch axis; −1 is any size."""

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    versions: tuple[str, ...] = ()
    platform: str = ""
    backend: str = ""
    instances: int = 1
    device: str = ""
    provider: str = ""
    labels: tuple[str, ...] = ()
    description: str = ""


class Result(msgspec.Struct, frozen=True):
    """An answer: the outputs by name, which model version gave it, and where its time went (microseconds)."""

    model: str
    version: str
    outputs: dict[str, NDArray[Any]]
    timing: Timing
    parameters: dict[str, Parameter]


def description_of(fields: Mapping[str, Any]) -> Description:
    """The description in a `describe` answer; INVALID_ARGUMENT if it is none."""
    try:
        return msgspec.convert(fields.get("description"), Description)
    except msgspec.ValidationError as error:
        raise invalid(f"the appliance's description of the model is not understood: {error}") from error


def to_tensors(model: Description, inputs: Mapping[str, ArrayLike]) -> tuple[Tensor, ...]:
    """The inputs as tensors in the model's order. INVALID_ARGUMENT names the input, what was expected, and what came."""
    specs = {spec.name: spec for spec in model.inputs}
    unknown = [name for name in inputs if name not in specs]
    missing = [name for name in specs if name not in inputs]
    if unknown or missing:
        raise invalid(f"model {model.name!r} takes the inputs {', '.join(specs)}; {', '.join(inputs) or 'none'} came")
    return tuple([_tensor(spec, inputs[name]) for name, spec in specs.items()])


def _tensor(spec: TensorSpec, value: ArrayLike) -> Tensor:
    array = value if isinstance(value, np.ndarray | np.generic) else _typed(spec, value)
    array = np.asarray(array)
    _check_dtype(spec, array)
    _check_shape(spec, array.shape)
    if spec.datatype in (DataType.BYTES, DataType.BF16) or array.size == 0:
        return from_numpy(spec.name, array, spec.datatype)
    contiguous = np.ascontiguousarray(array, dtype=spec.datatype.numpy)
    # a view: the send copies it once, into libzmq's message
    return Tensor(spec.name, spec.datatype, array.shape, contiguous.reshape(-1).view(np.uint8).data)


def _typed(spec: TensorSpec, value: ArrayLike) -> NDArray[Any]:
    dtype: Any = {DataType.BYTES: object, DataType.BF16: "<f4"}.get(spec.datatype, spec.datatype.numpy)
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(f"input {spec.name!r}: the values do not make an array of {spec.datatype.value}") from error


def _check_dtype(spec: TensorSpec, array: NDArray[Any]) -> None:
    if spec.datatype is DataType.BYTES:
        if array.dtype.kind not in "OSU":
            raise invalid(f"input {spec.name!r}: BYTES takes an array of str or bytes, {array.dtype} came")
        for item in array.reshape(-1):
            if not isinstance(item, str | bytes):
                raise invalid(f"input {spec.name!r}: BYTES takes str or bytes, a {type(item).__name__} came")
        return
    if spec.datatype is DataType.BF16:
        if array.dtype != np.float32:
            raise invalid(f"input {spec.name!r}: BF16 is given as float32, {array.dtype} came")
        return
    found = NUMPY_TO_DATATYPE.get(array.dtype.newbyteorder("<").str)
    if found is not spec.datatype:
        wanted = np.dtype(spec.datatype.numpy).name
        raise invalid(
            f"input {spec.name!r}: {spec.datatype.value} expected, the array is {array.dtype}; "
            f"if that is meant, send array.astype(np.{wanted})"
        )


def _check_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, size) for want, size in zip(spec.shape, shape, strict=True)
    )
    if fits:
        return
    advice = ""
    if len(shape) + 1 == len(spec.shape) and spec.shape[0] in (-1, 1):
        advice = "; a single item needs the batch axis: array[np.newaxis]"
    raise invalid(
        f"input {spec.name!r}: shape {list(spec.shape)} expected (-1 is any size), {list(shape)} came{advice}"
    )


def to_result(response: InferenceResponse) -> Result:
    """The outputs as arrays over the received frames; BYTES (classification too) as object arrays of bytes."""
    outputs = {tensor.name: to_numpy(tensor) for tensor in response.outputs}
    return Result(response.model, response.version, outputs, response.timing, response.parameters)
