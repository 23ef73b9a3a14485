"""Clean the pictures, convert them to what the network takes, and split them into training, validation and test.

Pure functions of arrays and a seed. Knows neither files nor Keras; `train_digits` drives the three in this order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import CLASS_COUNT, IMAGE_SIDE
from .dataset import UNLABELED, Dataset, Flags, Labels, Pixels
from .errors import InputError

SMALLEST_CLASS = 3


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """How many pictures were read, how many were dropped for which reason (the first that applies), how many remain."""

    read: int
    unlabeled: int
    wrong_shape: int
    out_of_range: int
    contradictory: int
    duplicates: int

    @property
    def kept(self) -> int:
        """Pictures that remain."""
        dropped = self.unlabeled + self.wrong_shape + self.out_of_range + self.contradictory + self.duplicates
        return self.read - dropped


@dataclass(frozen=True, slots=True)
class CleanPictures:
    """Pictures of one shape (count, height, width) with values 0..peak, their labels 0..9, and which are set aside for tests."""

    images: Pixels
    labels: Labels
    given_test: Flags


@dataclass(frozen=True, slots=True)
class Split:
    """Row numbers of the three parts; disjoint, and together all rows."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def clean(dataset: Dataset) -> tuple[CleanPictures, CleaningReport]:
    """Drop what would teach or measure something wrong, and count it.

    The shape that most pictures have is the right one. A picture that occurs twice is kept once, preferably in the test part,
    since a copy in the training part would let the test be passed by memory. A picture that occurs under two labels goes
    altogether: nobody knows which is true.

    Raises:
        InputError: nothing remains.
    """
    shape = Counter(image.shape for image in dataset.images).most_common(1)[0][0] if len(dataset.images) else ()
    reasons: Counter[str] = Counter()
    sound: list[int] = []
    for row, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
        reason = _fault(image, int(label), shape, dataset.peak)
        if reason:
            reasons[reason] += 1
        else:
            sound.append(row)
    kept = _drop_repeated(dataset, sound, reasons)
    if not kept:
        raise InputError(f"{dataset.name}: none of its {len(dataset.images)} pictures can be used: {dict(reasons)}")
    report = CleaningReport(
        read=len(dataset.images),
        unlabeled=reasons["unlabeled"],
        wrong_shape=reasons["wrong_shape"],
        out_of_range=reasons["out_of_range"],
        contradictory=reasons["contradictory"],
        duplicates=reasons["duplicates"],
    )
    images = np.stack([dataset.images[row] for row in kept])
    return CleanPictures(images, dataset.labels[kept], dataset.given_test[kept]), report


def convert(images: Pixels, peak: float) -> NDArray[np.float32]:
    """Scale pictures (count, height, width) of 0..peak bilinearly to (count, 28, 28, 1) float32 of 0..1."""
    scaled = np.empty((len(images), IMAGE_SIDE, IMAGE_SIDE, 1), dtype=np.float32)
    for row, image in enumerate(images):
        ink = Image.fromarray(image.astype(np.float32) / np.float32(peak))
        if ink.size != (IMAGE_SIDE, IMAGE_SIDE):
            ink = ink.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)
        scaled[row, :, :, 0] = np.asarray(ink)
    return np.clip(scaled, 0.0, 1.0)


def split(
    labels: Labels, given_test: Flags, *, seed: int, validation_fraction: float = 0.1, test_fraction: float = 0.2
) -> Split:
    """Split rows at random, each class in the same proportion; a test part that the source gave is kept as it is.

    The fractions are of all rows; with a given test part `test_fraction` is not used.

    Raises:
        InputError: a class has too few pictures to appear in every part.
    """
    random = np.random.default_rng(seed)
    has_test = bool(given_test.any())
    train: list[NDArray[np.int64]] = []
    validation: list[NDArray[np.int64]] = []
    test: list[NDArray[np.int64]] = []
    for digit in range(CLASS_COUNT):
        tested = np.flatnonzero((labels == digit) & given_test)
        rows = random.permutation(np.flatnonzero((labels == digit) & ~given_test))
        if len(tested) + len(rows) < SMALLEST_CLASS or len(rows) < 2 or (has_test and not len(tested)):
            raise InputError(
                f"only {len(rows)} training and {len(tested)} test pictures of a {digit} remain; each class needs enough to "
                "appear in training, validation and test"
            )
        test_count = 0 if has_test else max(1, round(len(rows) * test_fraction))
        validation_count = max(1, round(len(rows) * validation_fraction))
        test.append(tested if has_test else rows[:test_count])
        validation.append(rows[test_count : test_count + validation_count])
        train.append(rows[test_count + validation_count :])
    return Split(*(random.permutation(np.concatenate(part)) for part in (train, validation, test)))


def _fault(image: Pixels, label: int, shape: tuple[int, ...], peak: float) -> str:
    if label == UNLABELED:
        return "unlabeled"
    if image.shape != shape:
        return "wrong_shape"
    # A comparison with NaN is false, so this refuses NaN as well.
    if not (float(image.min()) >= 0.0 and float(image.max()) <= peak):
        return "out_of_range"
    return ""


def _drop_repeated(dataset: Dataset, rows: list[int], reasons: Counter[str]) -> list[int]:
    labels_of: dict[bytes, set[int]] = {}
    for row in rows:
        labels_of.setdefault(dataset.images[row].tobytes(), set()).add(int(dataset.labels[row]))
    seen: set[bytes] = set()
    kept: list[int] = []
    for row in sorted(rows, key=lambda row: not dataset.given_test[row]):
        content = dataset.images[row].tobytes()
        if len(labels_of[content]) > 1:
            reasons["contradictory"] += 1
        elif content in seen:
            reasons["duplicates"] += 1
        else:
            seen.add(content)
            kept.append(row)
    return sorted(kept)
