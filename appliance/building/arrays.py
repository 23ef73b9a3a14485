"""Arrays in files (.npy, .npz), and arrays as a model's inputs: what is damaged or does not fit is said, never guessed.

For golden inputs, labelled samples and calibration alike. Knows files and datatypes; no engine, and not what the arrays are for.
"""

from __future__ import annotations

import contextlib
import lzma
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.core.tensor import DataType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

# what numpy and zipfile raise for files that are cut, altered, encrypted, of another kind, or that announce more than there is
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class ArrayError(Exception):
    """A file, or an array in it, cannot be used; the text names it as it was named to us."""


class Archive:
    """An .npz that is open; `place` is how people know it. ArrayError for what cannot be read, from the constructor too."""

    def __init__(self, file: Path, place: str) -> None:
        self._place = place
        with contextlib.ExitStack() as opening:
            try:
                # opened here: numpy forgets to close what is no archive after all
                found = np.load(opening.enter_context(file.open("rb")), allow_pickle=False)
            except UNREADABLE as error:
                raise ArrayError(f"{place} is no .npz that can be read: {reason(error)}") from error
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ArrayError(f"{place} is no .npz, but a single array under that name")
            self._found = opening.enter_context(found)
            self._open = opening.pop_all()
        self.names = tuple(found.files)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def __getitem__(self, name: str) -> NDArray[Any]:
        try:
            array = self._found[name]
        except UNREADABLE as error:
            raise ArrayError(f"{self._place}: its array {name!r} cannot be read: {reason(error)}") from error
        if not isinstance(array, np.ndarray):
            raise ArrayError(f"{self._place}: its member {name!r} is no array")
        return array


def read_array(file: Path, place: str) -> NDArray[Any]:
    """The array of an .npy. ArrayError if there is none that can be read."""
    try:
        with file.open("rb") as opened:
            array = np.load(opened, allow_pickle=False)
    except UNREADABLE as error:
        raise ArrayError(f"{place} is no array that can be read: {reason(error)}") from error
    if not isinstance(array, np.ndarray):
        raise ArrayError(f"{place} is no .npy, but an .npz under that name")
    return array


def reason(error: BaseException) -> str:
    """In words, without the path that some libraries put into theirs."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "it announces more than the memory holds"
    return str(error).splitlines()[0] if str(error) else "it is cut short"


def as_input(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """The array in that input's datatype, FP32 for BF16. ArrayError unless every value stays the same; floats are rounded.

    An array of strings for BYTES stays as it is.
    """
    came = array.dtype
    kind = "an array of strings or objects" if came.kind in "SUO" else f"an array of {came}"
    if spec.datatype is DataType.BYTES:
        if came.kind not in "SUO":
            raise ArrayError(f"input {spec.name!r} takes strings, {kind} came")
        return array
    if came.kind not in "biuf":
        raise ArrayError(f"input {spec.name!r} is {spec.datatype.value}, {kind} came")
    with np.errstate(all="ignore"):
        cast = np.asarray(array, spec.datatype.numpy or "<f4", order="C")
    lost = np.isinf(cast) & np.isfinite(array) if cast.dtype.kind == "f" else cast != array
    if lost.any():
        raise ArrayError(
            f"input {spec.name!r} is {spec.datatype.value}, {kind} came with values that it cannot hold, such as "
            f"{array[lost].reshape(-1)[0]}"
        )
    return cast
