"""Datatypes, tensor specifications and tensors, in the words of the Open Inference Protocol.

A tensor is its wire form: C order, little-endian, one contiguous buffer. For BYTES that is every element as a little-endian
uint32 length and then its bytes, as in the protocol's binary tensor extension; so a tensor travels from socket to shared
memory without being taken apart. Element counts use Python integers (`math.prod`): numpy's product wraps silently.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TypeAlias

import msgspec

from appliance.core.errors import invalid

Buffer: TypeAlias = bytes | bytearray | memoryview
Shape: TypeAlias = tuple[int, ...]

MAX_RANK = 16


class DataType(Enum):
    """A protocol datatype. `itemsize` is bytes per element (0 for BYTES); `numpy` the dtype that views it, if one does."""

    BOOL = ("BOOL", 1, "?")
    UINT8 = ("UINT8", 1, "u1")
    UINT16 = ("UINT16", 2, "<u2")
    UINT32 = ("UINT32", 4, "<u4")
    UINT64 = ("UINT64", 8, "<u8")
    INT8 = ("INT8", 1, "i1")
    INT16 = ("INT16", 2, "<i2")
    INT32 = ("INT32", 4, "<i4")
    INT64 = ("INT64", 8, "<i8")
    FP16 = ("FP16", 2, "<f2")
    BF16 = ("BF16", 2, None)
    FP32 = ("FP32", 4, "<f4")
    FP64 = ("FP64", 8, "<f8")
    BYTES = ("BYTES", 0, None)

    itemsize: int
    numpy: str | None

    def __new__(cls, name: str, itemsize: int, numpy: str | None) -> DataType:
        """The member of that protocol name."""
        member = object.__new__(cls)
        member._value_ = name
        member.itemsize = itemsize
        member.numpy = numpy
        return member


DATATYPES = {datatype.value: datatype for datatype in DataType}


def datatype_of(name: str) -> DataType:
    """The datatype of that protocol name; INVALID_ARGUMENT for an unknown one."""
    datatype = DATATYPES.get(name)
    if datatype is None:
        raise invalid(f"unknown datatype {name[:32]!r}; use one of {', '.join(DATATYPES)}")
    return datatype


class TensorSpec(msgspec.Struct, frozen=True):
    """What a model takes or gives: shape with −1 where any size goes, batch axis included if the model has one."""

    name: str
    datatype: DataType
    shape: Shape


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One named tensor in wire form. `data` may view a received buffer, so keep it only as long as that lives."""

    name: str
    datatype: DataType
    shape: Shape
    data: Buffer

    @property
    def nbytes(self) -> int:
        """Bytes of the wire form."""
        return len(self.data)


def element_count(shape: Shape) -> int:
    """Elements of that shape, exactly."""
    return math.prod(shape)


def check_shape(name: str, shape: Shape) -> None:
    """INVALID_ARGUMENT for a negative size or a rank above MAX_RANK, naming the tensor."""
    if len(shape) > MAX_RANK:
        raise invalid(f"tensor {name!r}: at most {MAX_RANK} dimensions are allowed, {len(shape)} came")
    if any(size < 0 for size in shape):
        raise invalid(f"tensor {name!r}: sizes must be 0 or more, shape {list(shape)} came")


def check_elements(name: str, shape: Shape, data: Buffer) -> None:
    """INVALID_ARGUMENT unless the lengths in a BYTES tensor lead from its beginning exactly to its end.

    Whoever reads it later, beside the rows of other requests, relies on that.
    """
    view = memoryview(data)
    offset, end = 0, len(view)
    for index in range(element_count(shape)):
        if end - offset < 4:
            raise invalid(f"tensor {name!r}: BYTES data ends before the length of element {index}")
        offset += 4 + int.from_bytes(view[offset : offset + 4], "little")
        if offset > end:
            raise invalid(f"tensor {name!r}: BYTES element {index} is longer than the data that is left")
    if offset != end:
        raise invalid(f"tensor {name!r}: {end - offset} bytes follow the last BYTES element")


def check_size(name: str, datatype: DataType, shape: Shape, nbytes: int) -> None:
    """INVALID_ARGUMENT unless `nbytes` is what shape and datatype need (BYTES: at least the length prefixes)."""
    if datatype is DataType.BYTES:
        need = 4 * element_count(shape)
        if nbytes < need or (need == 0 and nbytes):
            raise invalid(
                f"tensor {name!r}: BYTES with shape {list(shape)} needs a 4-byte length before each of its "
                f"{element_count(shape)} elements, {nbytes} bytes came"
            )
        return
    need = element_count(shape) * datatype.itemsize
    if nbytes != need:
        raise invalid(f"tensor {name!r}: {datatype.value} with shape {list(shape)} needs {need} bytes, {nbytes} came")
