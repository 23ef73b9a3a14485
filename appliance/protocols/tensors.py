"""Tensor data between its wire form and what JSON or numpy hold. Bytes in, bytes out; shared by both protocols and the client.

Any bytes and any JSON value end in a result or in INVALID_ARGUMENT, UNSUPPORTED or PAYLOAD_TOO_LARGE, never in another
exception. Counts are checked before anything is built.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import invalid
from appliance.core.tensor import Buffer, DataType, Shape, Tensor, check_shape, check_size, element_count

_U32 = struct.Struct("<I")

NUMPY_TO_DATATYPE: dict[str, DataType] = {
    np.dtype(datatype.numpy).str: datatype for datatype in DataType if datatype.numpy is not None
}


def split_bytes(data: Buffer, count: int) -> list[bytes]:
    """The `count` elements of a BYTES tensor in wire form; INVALID_ARGUMENT if lengths and buffer disagree."""
    view = memoryview(data)
    elements: list[bytes] = []
    offset, end = 0, len(view)
    while offset < end and len(elements) < count:
        if end - offset < 4:
            raise invalid(
                "BYTES data ends inside a length; each element is a little-endian uint32 length and its bytes"
            )
        (length,) = _U32.unpack_from(view, offset)
        offset += 4
        if length > end - offset:
            raise invalid(f"BYTES element {len(elements)} announces {length} bytes, {end - offset} are left")
        elements.append(bytes(view[offset : offset + length]))
        offset += length
    if len(elements) != count or offset != end:
        raise invalid(
            f"BYTES data holds {len(elements)} whole elements and {end - offset} more bytes, {count} elements announced"
        )
    return elements


def join_bytes(elements: list[bytes]) -> bytes:
    """The wire form of a BYTES tensor."""
    return b"".join([part for element in elements for part in (_U32.pack(len(element)), element)])


def flatten(name: str, value: Any, shape: Shape) -> list[Any]:
    """JSON `data`, nested or flat, as a flat list of `element_count(shape)` scalars; INVALID_ARGUMENT otherwise."""
    if not isinstance(value, list):
        raise invalid(f"tensor {name!r}: data must be a list, {type(value).__name__} came")
    flat: list[Any] = value
    depth = 0
    while any(isinstance(item, list) for item in flat):
        depth += 1
        if depth > max(len(shape), 1):
            raise invalid(f"tensor {name!r}: data is nested deeper than its shape {list(shape)}")
        if not all(isinstance(item, list) for item in flat):
            raise invalid(f"tensor {name!r}: data mixes lists and values on one level")
        flat = [item for part in flat for item in part]
    if len(flat) != element_count(shape):
        raise invalid(
            f"tensor {name!r}: shape {list(shape)} holds {element_count(shape)} elements, data holds {len(flat)}"
        )
    return flat


def tensor_from_json(name: str, datatype: DataType, shape: Shape, value: Any) -> Tensor:
    """A tensor from the JSON form of its data. FP16 and BF16 have none: INVALID_ARGUMENT says to send binary."""
    check_shape(name, shape)
    if datatype in (DataType.FP16, DataType.BF16):
        raise invalid(f"tensor {name!r}: {datatype.value} in JSON is not supported. Please use the binary data format")
    flat = flatten(name, value, shape)
    if datatype is DataType.BYTES:
        return Tensor(name, datatype, shape, join_bytes([_json_bytes(name, item) for item in flat]))
    kinds = (bool,) if datatype is DataType.BOOL else (int, float)
    integral = datatype not in (DataType.FP32, DataType.FP64, DataType.BOOL)
    for item in flat:
        # bool is an int in Python, and a JSON true is not a number; a float is no integer even if it is whole
        if not isinstance(item, kinds) or (isinstance(item, bool) and datatype is not DataType.BOOL):
            raise invalid(f"tensor {name!r}: {datatype.value} data holds a {type(item).__name__}")
        if integral and isinstance(item, float):
            raise invalid(f"tensor {name!r}: {datatype.value} data holds the float {item!r}")
    try:
        array = np.array(flat, dtype=datatype.numpy)
    except (OverflowError, ValueError) as error:
        raise invalid(f"tensor {name!r}: a value does not fit {datatype.value}") from error
    return Tensor(name, datatype, shape, array.tobytes())


def _json_bytes(name: str, item: Any) -> bytes:
    if not isinstance(item, str):
        raise invalid(f"tensor {name!r}: BYTES data in JSON must be strings, {type(item).__name__} came")
    try:
        return item.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"tensor {name!r}: a BYTES string is not valid Unicode; use the binary data format") from error


def tensor_to_json(tensor: Tensor) -> list[Any]:
    """The flat JSON form of a tensor's data. INVALID_ARGUMENT where JSON cannot hold it (FP16, BF16, bytes not UTF-8)."""
    if tensor.datatype in (DataType.FP16, DataType.BF16):
        raise invalid(
            f"output {tensor.name!r}: {tensor.datatype.value} in JSON is not supported. Please use the binary data format"
        )
    if tensor.datatype is DataType.BYTES:
        try:
            return [item.decode() for item in split_bytes(tensor.data, element_count(tensor.shape))]
        except UnicodeDecodeError as error:
            raise invalid(f"output {tensor.name!r}: its bytes are not UTF-8; ask for binary data") from error
    values: list[Any] = np.frombuffer(tensor.data, dtype=tensor.datatype.numpy).tolist()
    return values


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The tensor as an array: a view where numpy has the type; BF16 widened to float32; BYTES as an object array of bytes."""
    if tensor.datatype is DataType.BYTES:
        elements = np.empty(element_count(tensor.shape), dtype=object)
        elements[:] = split_bytes(tensor.data, elements.size)
        return elements.reshape(tensor.shape)
    if tensor.datatype is DataType.BF16:
        high = np.frombuffer(tensor.data, dtype="<u2").astype("<u4") << 16
        return high.view("<f4").reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=tensor.datatype.numpy).reshape(tensor.shape)


def from_numpy(name: str, array: NDArray[Any], datatype: DataType | None = None) -> Tensor:
    """A tensor from an array. `datatype` BF16 takes float32 and keeps the high halves (truncation, as Triton's clients do)."""
    shape = tuple(int(size) for size in array.shape)
    if datatype is DataType.BF16:
        high = (np.ascontiguousarray(array, dtype="<f4").view("<u4") >> 16).astype("<u2")
        return Tensor(name, DataType.BF16, shape, high.tobytes())
    if array.dtype.kind in "OSU":
        items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.reshape(-1).tolist()]
        return Tensor(name, DataType.BYTES, shape, join_bytes(items))
    found = NUMPY_TO_DATATYPE.get(array.dtype.newbyteorder("<").str)
    if found is None:
        raise invalid(
            f"tensor {name!r}: numpy dtype {array.dtype} has no protocol datatype; use {', '.join(NUMPY_TO_DATATYPE)}"
        )
    if datatype is not None and datatype is not found:
        raise invalid(f"tensor {name!r}: expected {datatype.value}, the array is {found.value} ({array.dtype})")
    return Tensor(name, found, shape, np.ascontiguousarray(array, dtype=found.numpy).tobytes())


def checked(name: str, datatype: DataType, shape: Shape, data: Buffer) -> Tensor:
    """A tensor over received bytes, once shape and size agree. Nothing is copied."""
    check_shape(name, shape)
    check_size(name, datatype, shape, len(data))
    return Tensor(name, datatype, shape, data)
