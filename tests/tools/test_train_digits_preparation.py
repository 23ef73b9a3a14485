"""Cleaning, conversion and splitting: what is dropped and why, what the network sees, and that the parts stay apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.digits import preparation
from tools.digits.dataset import UNLABELED, Dataset
from tools.digits.errors import InputError


def dataset(images: list, labels: list[int], given_test: list[bool] | None = None, peak: float = 16.0) -> Dataset:
    flags = np.array(given_test if given_test is not None else [False] * len(images), dtype=np.bool_)
    return Dataset("example", "made for a test", images, np.array(labels, dtype=np.int64), flags, peak)


def pattern(value: float) -> np.ndarray:
    image = np.zeros((8, 8))
    image[2, 3] = value
    return image


def test_sound_pictures_are_all_kept_in_their_order():
    pictures, report = preparation.clean(dataset([pattern(3), pattern(1), pattern(2)], [3, 1, 2]))
    assert pictures.labels.tolist() == [3, 1, 2]
    assert pictures.images[:, 2, 3].tolist() == [3, 1, 2]
    assert report == preparation.CleaningReport(3, 0, 0, 0, 0, 0)
    assert report.kept == 3


@pytest.mark.parametrize(
    ("image", "label", "reason"),
    [
        (pattern(5), UNLABELED, "unlabeled"),
        (np.zeros((8, 7)), 1, "wrong_shape"),
        (pattern(16.5), 1, "out_of_range"),
        (pattern(-1), 1, "out_of_range"),
        (pattern(float("nan")), 1, "out_of_range"),
        (pattern(float("inf")), 1, "out_of_range"),
        (pattern(1), 1, "duplicates"),
    ],
)
def test_an_unsound_picture_is_dropped_and_counted_under_its_reason(image, label, reason):
    pictures, report = preparation.clean(dataset([pattern(1), pattern(2), image], [1, 2, label]))
    assert pictures.labels.tolist() == [1, 2]
    assert getattr(report, reason) == 1
    assert report.kept == 2


def test_a_picture_under_two_labels_is_dropped_altogether():
    pictures, report = preparation.clean(dataset([pattern(1), pattern(2), pattern(1)], [1, 2, 3]))
    assert pictures.labels.tolist() == [2]
    assert report.contradictory == 2


def test_of_two_equal_pictures_the_one_set_aside_for_testing_is_kept():
    pictures, report = preparation.clean(dataset([pattern(1), pattern(2), pattern(1)], [1, 2, 1], [False, False, True]))
    assert pictures.labels.tolist() == [2, 1]
    assert pictures.given_test.tolist() == [False, True]
    assert report.duplicates == 1


@pytest.mark.parametrize("images", [[], [pattern(17)]])
def test_nothing_left_is_an_error(images):
    with pytest.raises(InputError, match=f"none of its {len(images)} pictures"):
        preparation.clean(dataset(images, [1] * len(images)))


def test_conversion_of_a_picture_of_the_right_size_only_divides_by_the_peak():
    images = np.arange(2 * 784, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    converted = preparation.convert(images, 255.0)
    assert converted.shape == (2, 28, 28, 1)
    assert converted.dtype == np.float32
    np.testing.assert_array_equal(converted[..., 0], images.astype(np.float32) / np.float32(255))


def test_conversion_scales_bilinearly_between_pixel_centres():
    # Two columns, 0 and 16, in 28: pixel x lies at (x + 0.5) / 14 - 0.5 between the two centres, clamped at the ends.
    image = np.tile(np.array([0.0, 16.0]), (2, 1))
    expected = np.clip((np.arange(28) + 0.5) / 14 - 0.5, 0, 1)
    converted = preparation.convert(image[None], 16.0)
    np.testing.assert_allclose(converted[0, :, :, 0], np.tile(expected, (28, 1)), atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(3, 40))
@settings(max_examples=25, deadline=None)
def test_conversion_stays_between_0_and_1_and_leaves_flat_pictures_flat(seed, side):
    random = np.random.default_rng(seed)
    level = random.uniform(0, 16)
    converted = preparation.convert(np.stack([random.uniform(0, 16, (side, side)), np.full((side, side), level)]), 16.0)
    assert converted.min() >= 0
    assert converted.max() <= 1
    np.testing.assert_allclose(converted[1], level / 16, atol=1e-5)


labels_of_all_classes = st.lists(st.integers(5, 30), min_size=10, max_size=10).map(
    lambda counts: np.repeat(np.arange(10), counts).astype(np.int64)
)


@given(labels_of_all_classes, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_parts_are_disjoint_complete_and_stratified(labels, seed):
    parts = preparation.split(labels, np.zeros(len(labels), dtype=np.bool_), seed=seed)
    together = np.concatenate([parts.train, parts.validation, parts.test])
    assert sorted(together.tolist()) == list(range(len(labels)))
    for digit in range(10):
        count = int((labels == digit).sum())
        assert abs(int((labels[parts.test] == digit).sum()) - 0.2 * count) <= 1
        assert abs(int((labels[parts.validation] == digit).sum()) - 0.1 * count) <= 1


def test_the_same_seed_gives_the_same_parts_and_another_seed_others():
    labels = np.repeat(np.arange(10), 20).astype(np.int64)
    none_given = np.zeros(200, dtype=np.bool_)
    first, again, other = (preparation.split(labels, none_given, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.test, again.test)
    np.testing.assert_array_equal(first.train, again.train)
    assert set(first.test.tolist()) != set(other.test.tolist())


def test_a_test_part_that_the_source_gave_is_kept_as_it_is():
    labels = np.repeat(np.arange(10), 20).astype(np.int64)
    given_test = np.arange(200) % 20 >= 15
    parts = preparation.split(labels, given_test, seed=1)
    assert set(parts.test.tolist()) == set(np.flatnonzero(given_test).tolist())
    assert len(parts.validation) == 20
    assert len(parts.train) == 130


@pytest.mark.parametrize(
    ("labels", "given_test"),
    [
        (np.repeat(np.arange(9), 20), np.zeros(180)),  # no 9 at all
        (np.append(np.repeat(np.arange(9), 20), [9, 9]), np.zeros(182)),  # two 9s for three parts
        (
            np.repeat(np.arange(10), 20),
            (np.arange(200) < 180) & (np.arange(200) % 20 == 0),
        ),  # every 9 in training, none to test with
        (
            np.repeat(np.arange(10), 20),
            (np.arange(200) >= 180) | (np.arange(200) % 20 == 0),
        ),  # every 9 in the test part
    ],
)
def test_a_class_without_enough_pictures_is_named(labels, given_test):
    with pytest.raises(InputError, match="pictures of a 9 remain"):
        preparation.split(labels.astype(np.int64), given_test.astype(np.bool_), seed=1)
