"""The numbers on the model card, against values computed by hand and, where it is installed, against scikit-learn."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.digits import cost, evaluation, picture


def scores_for(predicted: list[int]) -> np.ndarray:
    return np.eye(10, dtype=np.float32)[predicted]


def test_metrics_match_values_computed_by_hand():
    # True 0 0 0 1 1 2, predicted 0 0 1 1 2 2.
    result = evaluation.evaluate(np.array([0, 0, 0, 1, 1, 2]), scores_for([0, 0, 1, 1, 2, 2]))
    assert result.confusion[:3, :3].tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert result.confusion.sum() == 6
    assert result.support[:4].tolist() == [3, 2, 1, 0]
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.precision[:3] == pytest.approx([1.0, 0.5, 0.5])
    assert result.recall[:3] == pytest.approx([2 / 3, 0.5, 1.0])
    assert result.f1[:3] == pytest.approx([0.8, 0.5, 2 / 3])
    assert result.macro_precision == pytest.approx(2.0 / 10)
    assert result.macro_recall == pytest.approx((2 / 3 + 0.5 + 1.0) / 10)
    assert result.macro_f1 == pytest.approx((0.8 + 0.5 + 2 / 3) / 10)


def test_a_class_never_seen_or_never_predicted_counts_as_zero_without_a_warning():
    result = evaluation.evaluate(np.array([5]), scores_for([6]))
    assert not result.precision.any()
    assert not result.recall.any()
    assert not result.f1.any()
    assert result.accuracy == 0.0


def test_the_first_of_equal_scores_is_the_prediction():
    result = evaluation.evaluate(np.array([0]), np.full((1, 10), 0.1, dtype=np.float32))
    assert result.confusion[0, 0] == 1


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_metrics_match_scikit_learn():
    from sklearn import metrics

    random = np.random.default_rng(7)
    labels = random.integers(0, 10, 500)
    predicted = np.where(random.random(500) < 0.7, labels, random.integers(0, 10, 500))
    result = evaluation.evaluate(labels, scores_for(predicted.tolist()))
    np.testing.assert_array_equal(result.confusion, metrics.confusion_matrix(labels, predicted))
    expected = metrics.precision_recall_fscore_support(labels, predicted)
    for ours, theirs in zip((result.precision, result.recall, result.f1, result.support), expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
    assert result.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert result.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


def test_the_picture_of_the_confusion_matrix_shows_hits_blue_and_mistakes_red():
    confusion = np.diag(np.full(10, 30))
    confusion[3, 8] = 2
    image = Image.open(io.BytesIO(picture.confusion_png(confusion)))
    corner = 6  # inside a cell, beside its number

    def colour(true: int, predicted: int) -> tuple[int, int, int]:
        return image.getpixel(
            (picture.LEFT + picture.CELL * predicted + corner, picture.TOP + picture.CELL * true + corner)
        )

    assert colour(0, 0) == picture.RIGHT_HUE
    assert colour(0, 1) == picture.PAPER
    red, green, blue = colour(3, 8)
    assert red > green + 20
    assert red > blue + 20
    assert (
        image.getpixel((picture.LEFT + picture.CELL * 8 + corner, picture.TOP + picture.CELL * 8 + corner))
        == picture.RIGHT_HUE
    )


def test_a_digit_is_encoded_as_8_bit_grey():
    ink = np.linspace(0, 1, 784, dtype=np.float32).reshape(28, 28, 1)
    image = Image.open(io.BytesIO(picture.digit_png(ink)))
    assert image.mode == "L"
    assert image.size == (28, 28)
    np.testing.assert_array_equal(np.asarray(image), np.rint(ink[:, :, 0] * 255).astype(np.uint8))


def counter(powercap: Path, package: int, microjoules: int, reach: int = 1_000_000_000) -> Path:
    folder = powercap / f"intel-rapl:{package}"
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text(f"{reach}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_energy_is_summed_over_packages_and_a_counter_may_wrap(tmp_path):
    first, second = counter(tmp_path, 0, 5_000_000), counter(tmp_path, 1, 999_000_000)

    def work() -> str:
        first.write_text("8500000\n")
        second.write_text("1000000\n")
        return "done"

    result, spent = cost.measure(work, tmp_path)
    assert result == "done"
    assert spent.joules == pytest.approx(3.5 + 2.0)
    assert spent.wall_s >= 0


@pytest.mark.parametrize("content", ["", "unreadable"])
def test_without_a_readable_counter_no_energy_is_claimed(tmp_path, content):
    counter(tmp_path, 0, 1)
    counter(tmp_path, 1, 1).write_text(content)
    assert cost.measure(lambda: None, tmp_path)[1].joules is None


def test_without_any_counter_no_energy_is_claimed(tmp_path):
    assert cost.measure(lambda: None, tmp_path)[1].joules is None
