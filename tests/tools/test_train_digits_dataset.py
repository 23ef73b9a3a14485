"""Reading pictures: what is accepted, and that each kind of damage is refused with a message that names it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from tools.digits import dataset
from tools.digits.errors import InputError

TRAIN = np.arange(6 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(6, 28, 28)
TEST = 255 - TRAIN[:3]
TRAIN_LABELS = np.array([0, 1, 2, 3, 4, 9], dtype=np.uint8)
TEST_LABELS = np.array([7, 8, 9], dtype=np.uint8)


def idx(array: np.ndarray, magic: int) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(directory: Path, *, compressed: bool = False, joint: str = "-") -> None:
    contents = {
        f"train-images{joint}idx3-ubyte": idx(TRAIN, 0x803),
        f"train-labels{joint}idx1-ubyte": idx(TRAIN_LABELS, 0x801),
        f"t10k-images{joint}idx3-ubyte": idx(TEST, 0x803),
        f"t10k-labels{joint}idx1-ubyte": idx(TEST_LABELS, 0x801),
    }
    for name, content in contents.items():
        if compressed:
            (directory / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (directory / name).write_bytes(content)


def write_npz(path: Path, **changes: np.ndarray) -> Path:
    arrays = {"x_train": TRAIN, "y_train": TRAIN_LABELS, "x_test": TEST, "y_test": TEST_LABELS} | changes
    np.savez(path, **arrays)
    return path


def check_is_the_example(read: dataset.Dataset) -> None:
    np.testing.assert_array_equal(np.stack(read.images), np.concatenate([TRAIN, TEST]))
    assert read.labels.tolist() == [0, 1, 2, 3, 4, 9, 7, 8, 9]
    assert read.given_test.tolist() == [False] * 6 + [True] * 3
    assert read.peak == 255.0


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_plain_and_gzipped_and_under_both_spellings(tmp_path, compressed, joint):
    write_mnist(tmp_path, compressed=compressed, joint=joint)
    check_is_the_example(dataset.read(tmp_path))


def test_an_npz_like_that_of_keras_is_read(tmp_path):
    check_is_the_example(dataset.read(write_npz(tmp_path / "mnist.npz")))


def test_an_npz_may_have_a_channel_axis(tmp_path):
    check_is_the_example(dataset.read(write_npz(tmp_path / "a.npz", x_train=TRAIN[..., None], x_test=TEST[..., None])))


def test_floating_point_pictures_up_to_one_have_full_ink_at_one(tmp_path):
    scaled = write_npz(tmp_path / "a.npz", x_train=TRAIN / 255.0, x_test=TEST / 255.0)
    assert dataset.read(scaled).peak == 1.0
    unscaled = write_npz(tmp_path / "b.npz", x_train=TRAIN * 1.0, x_test=TEST * 1.0)
    assert dataset.read(unscaled).peak == 255.0


@pytest.mark.parametrize("labels", [np.array([0, 1, 2, 3, 4, -1]), np.array([0, 1, 2, 3, 4, np.nan])])
def test_minus_one_and_nan_mean_unlabeled(tmp_path, labels):
    assert dataset.read(write_npz(tmp_path / "a.npz", y_train=labels)).labels[5] == dataset.UNLABELED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.array([0, 1, 2, 3, 4, 10])}, "labels outside 0..9: 10"),
        ({"y_train": np.array([0, 1, 2, 3, 4, -2])}, "labels outside 0..9: -2"),
        ({"y_train": np.array([0, 1, 2, 3, 4, 0.5])}, "fractions"),
        ({"y_train": TRAIN_LABELS[:5]}, "6 training pictures but 5 labels"),
        ({"y_test": TEST_LABELS[:, None]}, r"y_test is uint8 \(3, 1\)"),
        ({"y_test": np.array(["7", "8", "9"])}, "y_test is <U1"),
        ({"x_train": TRAIN.reshape(6, -1)}, r"x_train is uint8 \(6, 784\)"),
        ({"x_train": TRAIN[:0], "y_train": TRAIN_LABELS[:0]}, r"x_train is uint8 \(0, 28, 28\)"),
        ({"x_train": TRAIN[:, :, :20], "x_test": TEST[:, :, :20]}, "28×20; expected square"),
        ({"x_test": TEST[:, :14, :14]}, r"training pictures are uint8 \(28, 28\), test pictures uint8 \(14, 14\)"),
        ({"x_test": TEST / 255.0}, "test pictures float64"),
        ({"x_train": np.full(TRAIN.shape, 1j)}, "x_train is complex128"),
        ({"x_train": np.array([None] * 6)}, "not a readable .npz file of plain arrays"),
    ],
)
def test_an_npz_with_wrong_arrays_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        dataset.read(write_npz(tmp_path / "a.npz", **changes))


def test_an_npz_without_one_of_the_arrays_says_which_it_has(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=TRAIN, labels=TRAIN_LABELS)
    with pytest.raises(InputError, match=r"no array y_train, x_test, y_test; it has x_train, labels"):
        dataset.read(tmp_path / "a.npz")


def test_an_npz_cut_anywhere_is_refused(tmp_path):
    whole = write_npz(tmp_path / "a.npz").read_bytes()
    for length in range(0, len(whole), 997):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.npz: not a readable"):
            dataset.read(tmp_path / "cut.npz")


def test_an_npy_file_named_npz_is_refused(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, TRAIN)
    with pytest.raises(InputError, match="not a readable"):
        dataset.read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["absent.npz", "absent"])
def test_a_path_that_does_not_exist_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="does not exist"):
        dataset.read(tmp_path / name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "digits.csv").write_text("1,2,3\n")
    with pytest.raises(InputError, match="another kind of file"):
        dataset.read(tmp_path / "digits.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, 0 of 16 header bytes"),
        (idx(TRAIN, 0x803)[:11], "truncated, 11 of 16 header bytes"),
        (idx(TRAIN, 0x803)[:-1], "truncated, 4703 of 4704 bytes"),
        (idx(TRAIN, 0x803) + b"x", "longer than the 4704 bytes"),
        (idx(TRAIN, 0x801), "not an IDX file of pictures: magic 0x00000801, expected 0x00000803"),
        (struct.pack(">4I", 0x803, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), "empty or over"),
        (struct.pack(">4I", 0x803, 0, 28, 28), "empty or over"),
    ],
)
def test_a_damaged_idx_file_of_pictures_is_refused(tmp_path, content, message):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match=f"train-images-idx3-ubyte.*{message}"):
        dataset.read(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2, 3, 4, 255]), "labels outside 0..9: 255"),
        (TRAIN_LABELS[:4], "6 training pictures but 4 labels"),
    ],
)
def test_idx_labels_are_held_to_their_range_and_count(tmp_path, labels, message):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels, 0x801))
    with pytest.raises(InputError, match=message):
        dataset.read(tmp_path)


def test_a_gzipped_idx_file_cut_anywhere_is_refused(tmp_path):
    write_mnist(tmp_path, compressed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 8, 97):  # without the last 8 bytes only the checksum is missing
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz"):
            dataset.read(tmp_path)


def test_a_missing_idx_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        dataset.read(tmp_path)
