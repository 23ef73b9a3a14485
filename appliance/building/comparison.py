"""How far two sets of answers lie apart, and what that costs in the task: errors, tolerances, metrics.

Plain arithmetic on arrays; knows no engine, file or process. `verification` feeds it and decides nothing of its own. A number
that is not finite is None in what is found here, since JSON has no word for it, and None is within no limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from appliance.core.manifest import VerifyManifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

HISTOGRAM_BINS = 24
TINY = 1e-300


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
        mismatch=wanted.mismatch or chosen.mismatch,
        metric_drop=wanted.metric_drop or chosen.metric_drop,
        max_absolute=wanted.max_absolute,
        mean_absolute=wanted.mean_absolute,
    )


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


def shown(value: float | None, form: str) -> str:
    """The number in that format, for people."""
    return "not finite" if value is None else format(value, form)


def within(value: float | None, limit: float) -> bool:
    """Whether it is a number, and none beyond the limit."""
    return value is not None and value <= limit


class OutputComparison(msgspec.Struct, frozen=True):
    """One output over all inputs. For integers, booleans and strings only `mismatch` counts: the share of unequal elements.

    None is an error that is not finite: one that overflows, or a relative one where the reference has zeros only. `histogram`
    counts elements by absolute error, in equal bins from 0 to `max_absolute`.
    """

    name: str
    datatype: str
    elements: int
    max_absolute: float | None = 0.0
    mean_absolute: float | None = 0.0
    max_relative: float | None = 0.0
    mean_relative: float | None = 0.0
    cosine: float = 1.0
    mismatch: float = 0.0
    problem: str = ""
    histogram: tuple[int, ...] = ()

    def failures(self, allowed: Tolerance) -> list[str]:
        """In words, every limit that is exceeded."""
        if self.problem:
            return [f"output {self.name!r}: {self.problem}"]
        checks: list[tuple[str, float | None, float]] = [
            ("largest relative error", self.max_relative, allowed.max_relative),
            ("share of unequal elements", self.mismatch, allowed.mismatch),
        ]
        if allowed.max_absolute:
            checks.append(("largest absolute error", self.max_absolute, allowed.max_absolute))
        if allowed.mean_absolute:
            checks.append(("mean absolute error", self.mean_absolute, allowed.mean_absolute))
        found = [
            f"output {self.name!r}: {what} is {shown(value, '.3g')}, {limit:.3g} is allowed"
            for what, value, limit in checks
            if not within(value, limit)
        ]
        if not self.cosine >= allowed.min_cosine:
            found.append(
                f"output {self.name!r}: cosine similarity is {self.cosine:.5f}, at least {allowed.min_cosine:g} is asked for"
            )
        return found


def compare(
    name: str, datatype: str, reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]
) -> OutputComparison:
    """One output of both, an array for each run.

    Non-finite values must stand in the same places with the same sign; where there is nothing else, nothing was compared, and
    that is a problem too.
    """
    elements = sum(array.size for array in reference)
    problem = disagreement(reference, candidate)
    if problem or not elements:
        return OutputComparison(name, datatype, elements, problem=problem)
    expected = np.concatenate([array.reshape(-1) for array in reference])
    found = np.concatenate([array.reshape(-1) for array in candidate])
    if expected.dtype.kind != "f":
        return OutputComparison(name, datatype, elements, mismatch=float(np.mean(expected != found)))
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    known = np.isfinite(expected)
    if not known.any():
        problem = f"none of the reference's {elements} values is finite: nothing could be compared"
        return OutputComparison(name, datatype, elements, problem=problem)
    return _errors(name, datatype, expected[known], found[known])


def disagreement(reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]) -> str:
    """In words, why no tolerance can help: another shape, or values that are not finite in other places; empty if neither."""
    wrong = 0
    for number, (wanted, came) in enumerate(zip(reference, candidate, strict=True)):
        if wanted.shape != came.shape:
            return f"shape {list(came.shape)} instead of {list(wanted.shape)} for input {number}"
        if wanted.dtype.kind == "f":
            special = ~(np.isfinite(wanted) & np.isfinite(came))
            first, second = wanted[special], came[special]
            wrong += int(np.count_nonzero((first != second) & ~(np.isnan(first) & np.isnan(second))))
    return f"{wrong} values are not finite where the reference is, or the reverse" if wrong else ""


def _errors(name: str, datatype: str, expected: NDArray[Any], found: NDArray[Any]) -> OutputComparison:
    """Errors of finite values in FP64. What overflows on the way is None, and no warning."""
    with np.errstate(all="ignore"):
        errors = np.abs(found - expected)
        scale, largest, mean = float(np.max(np.abs(expected))), float(errors.max()), float(errors.mean())
        most, average = (float(np.divide(error, scale)) if error else 0.0 for error in (largest, mean))
    # numpy refuses bins that are narrower than its smallest numbers
    end = largest if largest > TINY else 1.0
    counts = np.histogram(errors, HISTOGRAM_BINS, (0.0, end))[0] if math.isfinite(largest) else ()
    return OutputComparison(
        name,
        datatype,
        expected.size,
        max_absolute=finite(largest),
        mean_absolute=finite(mean),
        max_relative=finite(most),
        mean_relative=finite(average),
        cosine=_cosine(expected, found),
        histogram=tuple(int(count) for count in counts),
    )


def _cosine(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Of finite vectors; 1 for two of zeros only, 0 for one."""
    sizes = [float(np.max(np.abs(vector))) for vector in (expected, found)]
    if not all(sizes):
        return float(not any(sizes))
    # brought to largest magnitude 1, so that no square overflows, and none vanishes
    first, second = expected / sizes[0], found / sizes[1]
    return min(1.0, float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second))))


class ClassMetrics(msgspec.Struct, frozen=True):
    """One class: shares between 0 and 1 (0 where nothing was predicted, or nothing was there), and how many samples it has."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Classification(msgspec.Struct, frozen=True, tag="classification"):
    """Accuracy, macro averages over the classes that occur, and the confusion matrix (rows: true, columns: predicted).

    `undecided` answers are no class (NaN, or a negative number): they count as wrong, and stand in no column.
    """

    samples: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    undecided: int = 0


def classification(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str] = ()) -> Classification:
    """Metrics of predicted against true class indices, predicted ones below 0 for no class.

    ValueError for none, or for different lengths. Precision, recall and F1 as in van Rijsbergen, "Information Retrieval" (1979),
    chapter 7.
    """
    if not len(truth) or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} true and {len(predicted)} predicted classes came")
    count = max(len(labels), max(truth) + 1, max(predicted) + 1)
    true, said = np.asarray(truth), np.asarray(predicted)
    decided = said >= 0
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (true[decided], said[decided]), 1)
    right = np.diag(confusion).astype(np.float64)
    support, given = np.bincount(true, minlength=count), confusion.sum(0)
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
        int(np.count_nonzero(~decided)),
    )


class Regression(msgspec.Struct, frozen=True, tag="regression"):
    """Mean squared and mean absolute error over all elements of all samples; None if that is not finite."""

    samples: int
    mse: float | None
    mae: float | None


def regression(truth: Sequence[NDArray[Any]], predicted: Sequence[NDArray[Any]]) -> Regression:
    """Errors of predictions against targets of the same shapes. ValueError for none, or for different shapes."""
    if not truth or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} targets and {len(predicted)} predictions came")
    for target, prediction in zip(truth, predicted, strict=True):
        if target.size != prediction.size:
            raise ValueError(f"a target has {target.size} values and its prediction {prediction.size}")
    with np.errstate(all="ignore"):
        errors = np.concatenate(
            [
                prediction.reshape(-1).astype(np.float64) - target.reshape(-1).astype(np.float64)
                for target, prediction in zip(truth, predicted, strict=True)
            ]
        )
        return Regression(len(truth), finite(np.mean(errors**2)), finite(np.mean(np.abs(errors))))
