"""Accuracy, precision, recall, F1 and the confusion matrix, from labels and scores.

Pure numpy, so that the numbers on the model card can be checked by hand. Knows neither the network nor files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import CLASS_COUNT


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a classifier did.

    `confusion[true, predicted]` counts pictures. The arrays `precision`, `recall`, `f1` have one value per class; where a
    quotient is 0/0 (a class never predicted, or never seen) it is 0, the pessimistic reading.
    """

    confusion: NDArray[np.int64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]

    @property
    def support(self) -> NDArray[np.int64]:
        """Pictures per true class."""
        return np.asarray(self.confusion.sum(axis=1))

    @property
    def accuracy(self) -> float:
        """Share of pictures whose best-scored class is the true one."""
        return float(np.trace(self.confusion) / max(1, int(self.confusion.sum())))

    @property
    def macro_precision(self) -> float:
        """Mean precision over the classes, each counting the same."""
        return float(self.precision.mean())

    @property
    def macro_recall(self) -> float:
        """Mean recall over the classes, each counting the same."""
        return float(self.recall.mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes, each counting the same."""
        return float(self.f1.mean())


def evaluate(labels: NDArray[np.int64], scores: NDArray[np.float32]) -> Evaluation:
    """Compare labels (count,) with scores (count, classes); the highest score is the prediction, the first among equals."""
    predicted = scores.argmax(axis=1)
    confusion = np.zeros((CLASS_COUNT, CLASS_COUNT), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits = np.diag(confusion).astype(np.float64)
    precision = _ratio(hits, confusion.sum(axis=0))
    recall = _ratio(hits, confusion.sum(axis=1))
    return Evaluation(confusion, precision, recall, _ratio(2 * precision * recall, precision + recall))


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float64]:
    quotient = np.zeros(above.shape, dtype=np.float64)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient
