"""How far two sets of answers lie apart, and what that costs in the task: errors, tolerances, metrics.

Plain arithmetic on arrays; knows no engine, file or process. `verification` feeds it and decides nothing of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from appliance.core.manifest import VerifyManifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

HISTOGRAM_BINS = 24


class Tolerance(msgspec.Struct, frozen=True):
    """What a candidate may differ by. Relative errors are shares of the output's largest magnitude in the reference.

    (An element near zero has no relative error of its own worth speaking of.) `max_absolute`, `mean_absolute` 0: no limit.
    `mismatch` is the share of unequal elements in outputs of integers, booleans and strings; `metric_drop` the loss of
    accuracy, or the growth of a regression's mean squared error, as a share.
    """

    max_relative: float
    min_cosine: float
    mismatch: float
    metric_drop: float
    max_absolute: float = 0.0
    mean_absolute: float = 0.0


DEFAULTS = {
    "as-is": Tolerance(1e-3, 0.9999, 0.0, 0.0),
    "fp32": Tolerance(1e-3, 0.9999, 0.0, 0.0),
    "fp16": Tolerance(2e-2, 0.999, 0.005, 0.005),
    "bf16": Tolerance(1e-1, 0.99, 0.02, 0.01),
    "int8": Tolerance(2.5e-1, 0.97, 0.05, 0.02),
}
"""By precision: a few units in the last place of the format (2**-11, 2**-8, 1/127), times the growth that a deep network adds."""


def tolerance(precision: str, wanted: VerifyManifest) -> Tolerance:
    """The defaults of a precision, with what the manifest says instead."""
    chosen = DEFAULTS[precision]
    return Tolerance(
        max_relative=wanted.max_relative or chosen.max_relative,
        min_cosine=wanted.min_cosine or chosen.min_cosine,
        mismatch=chosen.mismatch,
        metric_drop=wanted.metric_drop or chosen.metric_drop,
        max_absolute=wanted.max_absolute,
        mean_absolute=wanted.mean_absolute,
    )


class OutputComparison(msgspec.Struct, frozen=True):
    """One output over all inputs. For integers, booleans and strings only `mismatch` counts: the share of unequal elements.

    `histogram` counts elements by absolute error, in equal bins from 0 to `max_absolute`.
    """

    name: str
    datatype: str
    elements: int
    max_absolute: float = 0.0
    mean_absolute: float = 0.0
    max_relative: float = 0.0
    mean_relative: float = 0.0
    cosine: float = 1.0
    mismatch: float = 0.0
    problem: str = ""
    histogram: tuple[int, ...] = ()

    def failures(self, allowed: Tolerance) -> list[str]:
        """In words, every limit that is exceeded."""
        if self.problem:
            return [f"output {self.name!r}: {self.problem}"]
        checks = [
            ("largest relative error", self.max_relative, allowed.max_relative),
            ("share of unequal elements", self.mismatch, allowed.mismatch),
        ]
        if allowed.max_absolute:
            checks.append(("largest absolute error", self.max_absolute, allowed.max_absolute))
        if allowed.mean_absolute:
            checks.append(("mean absolute error", self.mean_absolute, allowed.mean_absolute))
        found = [
            f"output {self.name!r}: {what} is {value:.3g}, {limit:.3g} is allowed"
            for what, value, limit in checks
            if not value <= limit
        ]
        if not self.cosine >= allowed.min_cosine:
            found.append(
                f"output {self.name!r}: cosine similarity is {self.cosine:.5f}, at least {allowed.min_cosine:g} is asked for"
            )
        return found


def compare(
    name: str, datatype: str, reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]
) -> OutputComparison:
    """One output of both, an array for each run. Non-finite values must stand in the same places with the same sign."""
    for number, (wanted, came) in enumerate(zip(reference, candidate, strict=True)):
        if wanted.shape != came.shape:
            problem = f"shape {list(came.shape)} instead of {list(wanted.shape)} for input {number}"
            return OutputComparison(name, datatype, 0, problem=problem)
    if not reference or sum(array.size for array in reference) == 0:
        return OutputComparison(name, datatype, 0)
    expected = np.concatenate([array.reshape(-1) for array in reference])
    found = np.concatenate([array.reshape(-1) for array in candidate])
    if expected.dtype.kind != "f":
        return OutputComparison(name, datatype, expected.size, mismatch=float(np.mean(expected != found)))
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        wrong = int(np.count_nonzero(np.isfinite(found) != finite))
        return OutputComparison(
            name,
            datatype,
            expected.size,
            problem=f"{max(wrong, 1)} values are not finite where the reference is, or the reverse",
        )
    return _errors(name, datatype, expected[finite], found[finite])


def _errors(name: str, datatype: str, expected: NDArray[Any], found: NDArray[Any]) -> OutputComparison:
    if not expected.size:
        return OutputComparison(name, datatype, 0)
    errors = np.abs(found - expected)
    scale = float(np.max(np.abs(expected)))
    norms = float(np.linalg.norm(expected) * np.linalg.norm(found))
    largest = float(errors.max())
    cosine = min(1.0, float(expected @ found) / norms) if norms > 0 else float(largest == 0)
    counts, _ = np.histogram(errors, HISTOGRAM_BINS, (0.0, largest or 1.0))
    return OutputComparison(
        name,
        datatype,
        expected.size,
        max_absolute=largest,
        mean_absolute=float(errors.mean()),
        max_relative=largest / scale if scale else (0.0 if largest == 0 else float("inf")),
        mean_relative=float(errors.mean()) / scale if scale else 0.0,
        cosine=cosine,
        histogram=tuple(int(count) for count in counts),
    )


class ClassMetrics(msgspec.Struct, frozen=True):
    """One class: shares between 0 and 1 (0 where nothing was predicted, or nothing was there), and how many samples it has."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Classification(msgspec.Struct, frozen=True, tag="classification"):
    """Accuracy, macro averages over the classes that occur, and the confusion matrix (rows: true, columns: predicted)."""

    samples: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]


def classification(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str] = ()) -> Classification:
    """Metrics of predicted against true class indices. ValueError for none, or for different lengths.

    Precision, recall and F1 as in van Rijsbergen, "Information Retrieval" (1979), chapter 7.
    """
    if not len(truth) or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} true and {len(predicted)} predicted classes came")
    count = max(len(labels), max(truth) + 1, max(predicted) + 1)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (np.asarray(truth), np.asarray(predicted)), 1)
    right = np.diag(confusion).astype(np.float64)
    support, given = confusion.sum(1), confusion.sum(0)
    precision = np.divide(right, given, out=np.zeros(count), where=given > 0)
    recall = np.divide(right, support, out=np.zeros(count), where=support > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros(count), where=both > 0)
    occurs = (support > 0) | (given > 0)
    names = [labels[index] if index < len(labels) else str(index) for index in range(count)]
    return Classification(
        len(truth),
        float(right.sum() / len(truth)),
        float(precision[occurs].mean()),
        float(recall[occurs].mean()),
        float(f1[occurs].mean()),
        tuple(
            ClassMetrics(names[i], float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i in range(count)
        ),
        tuple(tuple(int(value) for value in row) for row in confusion),
    )


class Regression(msgspec.Struct, frozen=True, tag="regression"):
    """Mean squared and mean absolute error over all elements of all samples."""

    samples: int
    mse: float
    mae: float


def regression(truth: Sequence[NDArray[Any]], predicted: Sequence[NDArray[Any]]) -> Regression:
    """Errors of predictions against targets of the same shapes. ValueError for none, or for different shapes."""
    if not truth or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} targets and {len(predicted)} predictions came")
    for target, prediction in zip(truth, predicted, strict=True):
        if target.size != prediction.size:
            raise ValueError(f"a target has {target.size} values and its prediction {prediction.size}")
    errors = np.concatenate(
        [
            prediction.reshape(-1).astype(np.float64) - target.reshape(-1).astype(np.float64)
            for target, prediction in zip(truth, predicted, strict=True)
        ]
    )
    return Regression(len(truth), float(np.mean(errors**2)), float(np.mean(np.abs(errors))))
