"""Read labelled pictures of digits: scikit-learn's bundled ones, an `.npz` like Keras' `mnist.npz`, or MNIST's IDX files.

Nothing in a file is trusted: magic numbers, counts, sizes and labels are checked before an array is built from them, and each
refusal names the file, what was expected and what came. Knows nothing of training; `preparation` takes what is read here.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import CLASS_COUNT
from .errors import InputError

UNLABELED = -1
IDX_IMAGES_MAGIC = 0x00000803
IDX_LABELS_MAGIC = 0x00000801
IDX_LIMIT_BYTES = 2 << 30
IDX_PARTS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

Pixels = NDArray[Any]
Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Pictures as they were read.

    `images` are (height, width) each, 0 is background and `peak` full ink. `labels` are 0..9 or UNLABELED. `given_test` marks
    the pictures that the source itself set aside for testing; all false if it did not.
    """

    name: str
    provenance: str
    images: Sequence[Pixels]
    labels: Labels
    given_test: Flags
    peak: float


BUNDLED_PROVENANCE = (
    "E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits* (1998), UCI Machine Learning Repository, "
    "[doi:10.24432/C50P49](https://doi.org/10.24432/C50P49), licensed under "
    "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). scikit-learn bundles its test part: 1,797 pictures of "
    "8×8 pixels with values 0 to 16, from 13 writers. Changed here: scaled to 28×28. `golden/` and `samples/` hold some of "
    "these pictures and stand under the same licence."
)
USER_PROVENANCE = "Read from files of whoever ran the training; their origin and licence are theirs to state."


def read(path: Path | None) -> Dataset:
    """Read the bundled digits (None), an `.npz` file, or a directory of IDX files.

    Raises:
        InputError: the source is missing, damaged or of another kind.
    """
    if path is None:
        return read_bundled()
    if path.is_dir():
        return read_idx_directory(path)
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path)
    found = "is another kind of file" if path.exists() else "does not exist"
    raise InputError(f"{path} {found}; give an .npz file or a directory with the four IDX files of MNIST")


def read_bundled() -> Dataset:
    """Read the 1,797 digits of 8×8 that scikit-learn carries.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the bundled digits come with scikit-learn: pip install '.[train]', or give --data") from error
    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    return Dataset(
        name="scikit-learn digits",
        provenance=BUNDLED_PROVENANCE,
        images=list(np.asarray(bunch.images)),
        labels=labels,
        given_test=np.zeros(len(labels), dtype=np.bool_),
        peak=16.0,
    )


def read_npz(path: Path) -> Dataset:
    """Read `x_train, y_train, x_test, y_test`: pictures (n, side, side[, 1]) and labels (n,), as in Keras' `mnist.npz`.

    Integer pixels are taken as 0..255; floating-point ones as 0..1 if none is above 1, else as 0..255. A label of -1 or NaN
    means unlabeled.

    Raises:
        InputError: not an .npz file, damaged, or with arrays of the wrong kind.
    """
    try:
        # Opened here, since numpy leaves a file that it opened itself open when it is no zip archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in NPZ_KEYS if key not in archive.files]
            if missing:
                raise InputError(f"{path}: no array {', '.join(missing)}; it has {', '.join(archive.files) or 'none'}")
            x_train, y_train, x_test, y_test = (archive[key] for key in NPZ_KEYS)
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{path}: not a readable .npz file of plain arrays ({error}); is it complete?") from error
    return _join(
        path,
        _npz_images(path, "x_train", x_train),
        _npz_labels(path, "y_train", y_train),
        _npz_images(path, "x_test", x_test),
        _npz_labels(path, "y_test", y_test),
    )


def read_idx_directory(directory: Path) -> Dataset:
    """Read MNIST's four IDX files (`train-images-idx3-ubyte` and so on, each plain or `.gz`).

    Raises:
        InputError: a file is missing, truncated, too long, of another kind, or does not match its partner.
    """
    files = {part: _find_idx(directory, part) for part in IDX_PARTS}
    return _join(
        directory,
        read_idx_images(files["train-images"]),
        read_idx_labels(files["train-labels"]),
        read_idx_images(files["t10k-images"]),
        read_idx_labels(files["t10k-labels"]),
    )


def read_idx_images(path: Path) -> NDArray[np.uint8]:
    """Read one IDX file of pictures: (count, height, width) uint8.

    Raises:
        InputError: wrong magic number, wrong size, or truncated.
    """
    return _read_idx(path, magic=IDX_IMAGES_MAGIC, axes=3, kind="pictures")


def read_idx_labels(path: Path) -> NDArray[np.uint8]:
    """Read one IDX file of labels: (count,) uint8, each 0..9.

    Raises:
        InputError: wrong magic number, wrong size, truncated, or a label above 9.
    """
    labels = _read_idx(path, magic=IDX_LABELS_MAGIC, axes=1, kind="labels")
    _check_label_range(path, labels)
    return labels


def _read_idx(path: Path, *, magic: int, axes: int, kind: str) -> NDArray[np.uint8]:
    header_bytes = 4 + 4 * axes
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes:
                raise InputError(f"{path}: truncated, {len(header)} of {header_bytes} header bytes")
            found, *dims = struct.unpack(f">{1 + axes}I", header)
            if found != magic:
                raise InputError(f"{path}: not an IDX file of {kind}: magic 0x{found:08x}, expected 0x{magic:08x}")
            size = math.prod(dims)
            if size == 0 or size > IDX_LIMIT_BYTES:
                raise InputError(
                    f"{path}: its header announces {tuple(dims)}, which is empty or over {IDX_LIMIT_BYTES} bytes"
                )
            data = file.read(size + 1)  # one more than announced, to notice a file that is too long
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read to its end ({error}); is it complete?") from error
    if len(data) < size:
        raise InputError(f"{path}: truncated, {len(data)} of {size} bytes for {tuple(dims)}")
    if len(data) > size:
        raise InputError(f"{path}: longer than the {size} bytes that its header {tuple(dims)} announces")
    return np.frombuffer(data, dtype=np.uint8).reshape(dims)


def _find_idx(directory: Path, part: str) -> Path:
    rank = 3 if part.endswith("images") else 1
    # The archive has a hyphen before "idx"; unpackers of some systems turned it into a dot.
    names = [f"{part}{joint}idx{rank}-ubyte{suffix}" for joint in "-." for suffix in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory}: no {names[0]} or {names[1]}; MNIST is four files: {', '.join(IDX_PARTS)}")


def _npz_images(path: Path, key: str, images: Pixels) -> Pixels:
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim != 3 or 0 in images.shape or images.dtype.kind not in "buif":
        raise InputError(
            f"{path}: {key} is {images.dtype} {images.shape}; expected numbers of shape (count, side, side), or with one "
            "channel (count, side, side, 1)"
        )
    return images


def _npz_labels(path: Path, key: str, labels: NDArray[Any]) -> Labels:
    if labels.ndim != 1 or labels.dtype.kind not in "uif":
        raise InputError(f"{path}: {key} is {labels.dtype} {labels.shape}; expected whole numbers of shape (count,)")
    if labels.dtype.kind == "f":
        labels = np.where(np.isnan(labels), UNLABELED, labels)
        if not np.array_equal(labels, np.trunc(labels)):
            raise InputError(f"{path}: {key} holds fractions; expected whole numbers 0..9")
    _check_label_range(path, labels[labels != UNLABELED])
    return labels.astype(np.int64)


def _check_label_range(path: Path, labels: NDArray[Any]) -> None:
    outside = np.unique(labels[(labels < 0) | (labels >= CLASS_COUNT)])
    if outside.size:
        shown = ", ".join(str(value) for value in outside[:5])
        raise InputError(f"{path}: labels outside 0..{CLASS_COUNT - 1}: {shown}")


def _join(path: Path, x_train: Pixels, y_train: NDArray[Any], x_test: Pixels, y_test: NDArray[Any]) -> Dataset:
    for part, images, labels in (("training", x_train, y_train), ("test", x_test, y_test)):
        if len(images) != len(labels):
            raise InputError(f"{path}: {len(images)} {part} pictures but {len(labels)} labels")
        if images.shape[1] != images.shape[2]:
            raise InputError(f"{path}: {part} pictures are {images.shape[1]}×{images.shape[2]}; expected square ones")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise InputError(
            f"{path}: training pictures are {x_train.dtype} {x_train.shape[1:]}, test pictures {x_test.dtype} {x_test.shape[1:]}"
        )
    return Dataset(
        name=path.name,
        provenance=USER_PROVENANCE,
        images=[*x_train, *x_test],
        labels=np.concatenate([y_train, y_test]).astype(np.int64),
        given_test=np.arange(len(x_train) + len(x_test)) >= len(x_train),
        peak=_peak(x_train, x_test),
    )


def _peak(*parts: Pixels) -> float:
    if parts[0].dtype.kind == "b":
        return 1.0
    highest = max(float(np.max(part, initial=0.0, where=np.isfinite(part))) for part in parts)
    if parts[0].dtype.kind == "f" and highest <= 1.0:
        return 1.0
    return 255.0
