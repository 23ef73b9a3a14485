"""Errors, tolerances and metrics, against numbers worked out by hand and properties that must hold."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from appliance.building.comparison import (
    DEFAULTS,
    OutputComparison,
    Tolerance,
    classification,
    compare,
    regression,
    tolerance,
)
from appliance.core.manifest import VerifyManifest

ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-1e6, 1e6, width=32))


@given(ARRAYS)
def test_what_is_equal_has_no_error(array: np.ndarray) -> None:
    found = compare("y", "FP32", [array], [array.copy()])
    assert (found.max_absolute, found.mean_absolute, found.max_relative) == (0, 0, 0)
    assert found.cosine == pytest.approx(1) or not array.any()
    assert found.failures(DEFAULTS["as-is"]) == [] or not array.any()


@given(ARRAYS, st.floats(0.01, 100))
def test_an_error_is_found_at_its_size(array: np.ndarray, error: float) -> None:
    wrong = array.astype(np.float64)
    wrong.reshape(-1)[0] += error
    found = compare("y", "FP64", [array.astype(np.float64)], [wrong])
    assert found.max_absolute == pytest.approx(error, rel=1e-6)
    assert sum(found.histogram) == array.size


def test_relative_errors_are_shares_of_the_outputs_largest_magnitude() -> None:
    found = compare("y", "FP32", [np.array([0.0, 10.0])], [np.array([0.1, 10.0])])
    assert found.max_relative == pytest.approx(0.01)
    assert found.mean_relative == pytest.approx(0.005)


def test_orthogonal_answers_have_cosine_zero() -> None:
    assert compare("y", "FP32", [np.array([1.0, 0.0])], [np.array([0.0, 1.0])]).cosine == pytest.approx(0)


def test_integers_are_equal_or_not() -> None:
    found = compare("y", "INT64", [np.array([1, 2, 3, 4])], [np.array([1, 2, 3, 5])])
    assert found.mismatch == 0.25
    assert found.failures(DEFAULTS["fp16"]) == ["output 'y': share of unequal elements is 0.25, 0.005 is allowed"]


def test_another_shape_is_a_failure_that_names_both() -> None:
    found = compare("y", "FP32", [np.zeros((2, 3))], [np.zeros((3, 3))])
    assert found.failures(DEFAULTS["int8"]) == ["output 'y': shape [3, 3] instead of [2, 3] for input 0"]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_whatever_is_allowed(wrong: float) -> None:
    found = compare("y", "FP32", [np.array([1.0, 2.0])], [np.array([1.0, wrong])])
    assert "not finite" in found.failures(DEFAULTS["int8"])[0]


def test_the_same_nan_and_infinities_agree() -> None:
    same = np.array([1.0, np.nan, np.inf, -np.inf])
    assert compare("y", "FP32", [same], [same.copy()]).failures(DEFAULTS["as-is"]) == []


def test_a_nan_error_never_passes() -> None:
    limit = Tolerance(1.0, 0.0, 1.0, 1.0)
    assert compare("y", "FP32", [np.array([np.nan])], [np.array([1.0])]).failures(limit)


def test_where_nothing_is_finite_nothing_agrees() -> None:
    found = compare("y", "FP32", [np.array([np.nan, np.inf])], [np.array([np.nan, np.inf])])
    assert found.failures(DEFAULTS["int8"]) == [
        "output 'y': none of the reference's 2 values is finite: nothing could be compared"
    ]


@pytest.mark.parametrize(
    ("expected", "found"), [([0.0, 0.0], [0.0, 1e-6]), ([1e308, 1e308], [-1e308, 1e308]), ([5e-324, 0.0], [1e10, 0.0])]
)
def test_an_error_that_is_no_number_is_within_no_limit_and_survives_json(
    expected: list[float], found: list[float]
) -> None:
    compared = compare("y", "FP64", [np.array(expected)], [np.array(found)])
    assert compared.max_relative is None
    assert any("largest relative error is not finite" in text for text in compared.failures(Tolerance(1e9, 0, 1, 1)))
    assert msgspec.json.decode(msgspec.json.encode(compared), type=OutputComparison) == compared


def test_the_cosine_of_very_large_and_very_small_answers_is_one() -> None:
    for size in (1e300, 1e-300):
        array = np.array([1.0, 2.0]) * size
        assert compare("y", "FP64", [array], [array.copy()]).cosine == pytest.approx(1)


def test_the_manifest_overrides_the_precisions_defaults() -> None:
    chosen = tolerance("fp16", VerifyManifest(max_absolute=0.5, min_cosine=0.5, mismatch=1e-9, metric_drop=0.25))
    assert (chosen.max_absolute, chosen.min_cosine, chosen.mismatch, chosen.metric_drop) == (0.5, 0.5, 1e-9, 0.25)
    assert chosen.max_relative == DEFAULTS["fp16"].max_relative


def test_an_absolute_limit_is_checked_only_where_it_is_given() -> None:
    found = compare("y", "FP32", [np.array([1000.0])], [np.array([1000.5])])
    assert found.failures(tolerance("fp32", VerifyManifest())) == []
    assert "absolute error is 0.5" in found.failures(tolerance("fp32", VerifyManifest(max_absolute=0.1)))[0]


def test_classification_as_worked_out_by_hand() -> None:
    # class a: 2 right, 1 missed (as b); class b: 1 right; class c never occurs and is never answered
    found = classification([0, 0, 0, 1], [0, 0, 1, 1], ["a", "b", "c"])
    assert found.accuracy == 0.75
    assert (found.classes[0].precision, found.classes[0].recall) == (1.0, pytest.approx(2 / 3))
    assert (found.classes[1].precision, found.classes[1].recall) == (0.5, 1.0)
    assert found.f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert found.confusion == ((2, 1, 0), (0, 1, 0), (0, 0, 0))
    assert [item.label for item in found.classes] == ["a", "b", "c"]


def test_a_class_beyond_the_labels_is_counted_by_its_number() -> None:
    assert classification([0], [3], ["a"]).classes[3].label == "3"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=50))
def test_metrics_are_shares_and_the_confusion_counts_everything(pairs: list[tuple[int, int]]) -> None:
    found = classification([a for a, _ in pairs], [b for _, b in pairs])
    for value in (found.accuracy, found.precision, found.recall, found.f1):
        assert 0 <= value <= 1
    assert sum(map(sum, found.confusion)) == len(pairs)
    assert found.accuracy == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_an_answer_that_is_no_class_is_wrong_and_in_no_column() -> None:
    found = classification([0, 0, 1], [0, -1, 1])
    assert (found.accuracy, found.undecided) == (pytest.approx(2 / 3), 1)
    assert found.confusion == ((1, 0), (0, 1))
    assert (found.classes[0].recall, found.classes[0].support) == (0.5, 2)


def test_an_error_that_is_not_finite_is_none() -> None:
    found = regression([np.zeros(2)], [np.array([1.0, np.nan])])
    assert (found.mse, found.mae) == (None, None)


def test_regression_as_worked_out_by_hand() -> None:
    found = regression([np.array([1.0, 2.0]), np.array([0.0, 0.0])], [np.array([1.0, 4.0]), np.array([-1.0, 0.0])])
    assert (found.mse, found.mae, found.samples) == (5 / 4, 3 / 4, 2)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 true and 0 predicted"):
        classification([], [])
    with pytest.raises(ValueError, match="2 values"):
        regression([np.zeros(2)], [np.zeros(3)])
