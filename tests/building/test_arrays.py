"""Files of arrays that are damaged, and arrays that do not fit an input: each is refused by its name, none is bent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from appliance.building.arrays import Archive, ArrayError, as_input, read_array
from appliance.core.tensor import DataType, TensorSpec


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[150] ^= 255
    file.write_bytes(data)


def _array(file: Path) -> None:
    with file.open("wb") as opened:
        np.save(opened, np.zeros(3))


def _huge(file: Path) -> None:
    import zipfile

    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000), }"
    header += b" " * (118 - len(header)) + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def _text(file: Path) -> None:
    import zipfile

    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", b"no array")


@pytest.mark.parametrize("damage", [_cut, _flip, _array, _huge, _text, lambda file: file.write_bytes(b"PK\x03\x04")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused_by_its_name(
    tmp_path: Path, save: Callable[..., None], damage: Callable[[Path], None]
) -> None:
    file = tmp_path / "a.npz"
    save(file, x=np.random.default_rng(1).random((40, 8)))
    damage(file)
    with pytest.raises(ArrayError, match=r"^golden/a\.npz"), Archive(file, "golden/a.npz") as archive:
        archive["x"]


def test_an_array_file_that_is_an_archive_or_nothing_is_refused_by_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ArrayError, match=r"b\.npy is no \.npy"):
        read_array((tmp_path / "a.npz").rename(tmp_path / "b.npy"), "b.npy")
    (tmp_path / "c.npy").write_bytes(b"")
    with pytest.raises(ArrayError, match=r"c\.npy is no array"):
        read_array(tmp_path / "c.npy", "c.npy")


@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        (DataType.FP32, np.array(["a"])),
        (DataType.FP32, np.array([1j])),
        (DataType.FP16, np.array([1e5])),
        (DataType.INT64, np.array([1.0, np.nan])),
        (DataType.INT64, np.array([0.5])),
        (DataType.INT8, np.array([300])),
        (DataType.UINT8, np.array([-1])),
        (DataType.BOOL, np.array([2])),
        (DataType.BYTES, np.array([1.0])),
    ],
)
def test_what_an_input_cannot_hold_is_refused_with_both_kinds(datatype: DataType, array: np.ndarray) -> None:
    with pytest.raises(ArrayError, match=r"input 'x' (is|takes) .*, an array of .* came"):
        as_input(array, TensorSpec("x", datatype, (-1,)))


@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        (DataType.FP32, np.array([1.5, np.nan, np.inf])),
        (DataType.BF16, np.array([1, 2])),
        (DataType.UINT8, np.array([0.0, 255.0])),
        (DataType.BOOL, np.array([0, 1])),
        (DataType.INT64, np.array([True])),
        (DataType.FP32, np.array(3)),
    ],
)
def test_what_keeps_its_values_is_taken_in_the_inputs_datatype(datatype: DataType, array: np.ndarray) -> None:
    found = as_input(array, TensorSpec("x", datatype, (-1,)))
    assert found.dtype == np.dtype(datatype.numpy or "f4")
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)
