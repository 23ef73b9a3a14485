"""Labelled samples through something that answers: the task's metrics, the times of the requests, and every one that failed.

Whoever answers is a coroutine given by the caller (a running appliance over HTTP or ZeroMQ); metrics and comparisons are those of
the gate. Knows no transport and decides no exit code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from appliance.building.comparison import (
    Classification,
    OutputComparison,
    Regression,
    Tolerance,
    compare,
    within,
)
from appliance.building.pictures import Sample
from appliance.building.runner import Runner
from appliance.building.task import measure
from appliance.core.errors import ApplianceError, invalid

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]
Ask = Callable[[Arrays], Awaitable[Arrays]]
"""One request: inputs by name, rows first, to outputs by name. ApplianceError if it is not answered."""

PERCENTILES = (50, 90, 99)


class Failure(msgspec.Struct, frozen=True):
    """A request that was not answered: the samples in it, the error's code, its words."""

    samples: tuple[str, ...]
    code: str
    message: str


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds from sending a request to its answer."""

    mean: float
    p50: float
    p90: float
    p99: float
    largest: float


class Answers(msgspec.Struct, frozen=True):
    """What came back: the samples that were answered with their outputs (a row each), the failures, times in seconds."""

    samples: list[Sample]
    outputs: list[Arrays]
    failures: tuple[Failure, ...]
    request_s: list[float]
    seconds: float


class Evaluation(msgspec.Struct, frozen=True):
    """What was found. `top_k` is the share of samples whose label is among the k best; `outputs` compares with a reference."""

    model: str
    version: str
    address: str
    samples: int
    answered: int
    failures: tuple[Failure, ...]
    seconds: float
    latency_ms: Latency | None
    metric: Classification | Regression | None
    top_k: dict[int, float] = {}
    outputs: tuple[OutputComparison, ...] = ()
    tolerance: Tolerance | None = None

    def problems(self, *, min_accuracy: float = 0.0, max_mse: float = float("inf")) -> list[str]:
        """In words, what makes this no success: failed requests, a metric beyond its limit, answers unlike the reference's."""
        found = [f"{self.samples - self.answered} of {self.samples} samples were not answered"] if self.failures else []
        if min_accuracy:
            if not isinstance(self.metric, Classification):
                found.append("there is no accuracy to hold against the minimum: the samples have no labels")
            elif not self.metric.accuracy >= min_accuracy:
                found.append(f"accuracy is {self.metric.accuracy:.4f}, at least {min_accuracy:g} is asked for")
        if isinstance(self.metric, Classification) and self.metric.undecided:
            found.append(f"{self.metric.undecided} of {self.metric.samples} answers are no class: NaN among the scores")
        if isinstance(self.metric, Regression):
            if self.metric.mse is None:
                found.append("the mean squared error is not finite")
            elif not within(self.metric.mse, max_mse):
                found.append(f"mean squared error is {self.metric.mse:.4g}, at most {max_mse:g} is asked for")
        elif max_mse != float("inf"):
            found.append("there is no mean squared error to hold against the maximum: the samples have no targets")
        if self.tolerance is not None:
            found += [text for output in self.outputs for text in output.failures(self.tolerance)]
        return found


async def gather(
    samples: Sequence[Sample], ask: Ask, *, batch: int, concurrency: int, on_done: Callable[[int], None]
) -> Answers:
    """Ask about all samples, `batch` rows a request and so many requests in flight; `on_done` is told the rows of each."""
    begun = time.perf_counter()
    parts = list(_batches(samples, batch))
    answers: list[list[Arrays] | Failure | None] = [None] * len(parts)
    times: list[float] = []
    numbers = iter(range(len(parts)))

    async def work() -> None:
        # all take from one iterator, so that so many are in flight until the last
        for number in numbers:
            part = parts[number]
            inputs = {name: np.concatenate([sample.inputs[name] for sample in part]) for name in part[0].inputs}
            sent = time.perf_counter()
            try:
                outputs = await ask(inputs)
                times.append(time.perf_counter() - sent)
                answers[number] = _split(outputs, len(part))
            except ApplianceError as error:
                answers[number] = Failure(tuple(sample.source for sample in part), str(error.code), error.message)
            on_done(len(part))

    async with asyncio.TaskGroup() as group:
        for number in range(min(concurrency, len(parts))):
            group.create_task(work(), name=f"evaluate-{number}")
    answered = [(part, rows) for part, rows in zip(parts, answers, strict=True) if isinstance(rows, list)]
    return Answers(
        [sample for part, _ in answered for sample in part],
        [row for _, rows in answered for row in rows],
        tuple(failure for failure in answers if isinstance(failure, Failure)),
        times,
        time.perf_counter() - begun,
    )


def _batches(samples: Sequence[Sample], batch: int) -> Iterator[list[Sample]]:
    """Neighbours of the same shapes, at most so many together."""
    part: list[Sample] = []
    for sample in samples:
        if part and (len(part) == batch or _shapes(part[0]) != _shapes(sample)):
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def _shapes(sample: Sample) -> list[tuple[int, ...]]:
    return [array.shape for array in sample.inputs.values()]


def _split(outputs: Arrays, rows: int) -> list[Arrays]:
    """A row of each output for each sample; an output that has no such rows goes to a single sample whole."""
    if rows == 1:
        return [{name: array[0] if array.ndim and len(array) == 1 else array for name, array in outputs.items()}]
    for name, array in outputs.items():
        if not array.ndim or len(array) != rows:
            raise invalid(
                f"output {name!r} has shape {list(array.shape)} for {rows} rows: this model answers one row a request only"
            )
    return [{name: array[row] for name, array in outputs.items()} for row in range(rows)]


def judge(
    answers: Answers,
    *,
    model: str,
    version: str,
    address: str,
    output: str,
    labels: Sequence[str] = (),
    top: Sequence[int] = (),
    compared: tuple[OutputComparison, ...] = (),
    tolerance: Tolerance | None = None,
) -> Evaluation:
    """Metrics of what was answered, from the output of that name. ValueError if labels or targets do not fit the answers."""
    failed = sum(len(failure.samples) for failure in answers.failures)
    judged = [
        (sample, rows[output])
        for sample, rows in zip(answers.samples, answers.outputs, strict=True)
        if sample.label >= 0 or sample.target is not None
    ]
    samples, predictions = [sample for sample, _ in judged], [row for _, row in judged]
    metric = measure(samples, predictions, labels) if judged else None
    return Evaluation(
        model=model,
        version=version,
        address=address,
        samples=len(answers.samples) + failed,
        answered=len(answers.samples),
        failures=answers.failures,
        seconds=answers.seconds,
        latency_ms=latency(answers.request_s),
        metric=metric,
        top_k={k: top_share(samples, predictions, k) for k in top} if isinstance(metric, Classification) else {},
        outputs=compared,
        tolerance=tolerance,
    )


def top_share(samples: Sequence[Sample], predictions: Sequence[NDArray[Any]], k: int) -> float:
    """The share of samples whose label is among the k highest scores."""
    hits = 0
    for sample, row in zip(samples, predictions, strict=True):
        scores = np.asarray(row, np.float64).reshape(-1)
        # among NaN there is no order, and no best
        hits += not np.isnan(scores).any() and sample.label in np.argsort(-scores, kind="stable")[:k]
    return int(hits) / len(samples)


def latency(request_s: Sequence[float]) -> Latency | None:
    """Percentiles of request times in seconds; None for none."""
    if not request_s:
        return None
    milliseconds = np.asarray(request_s) * 1000
    p50, p90, p99 = (float(np.percentile(milliseconds, share)) for share in PERCENTILES)
    return Latency(float(milliseconds.mean()), p50, p90, p99, float(milliseconds.max()))


def against(reference: Runner, answers: Answers) -> tuple[OutputComparison, ...]:
    """Every output of what was answered beside the reference's, row by row. EngineError if the reference refuses an input."""
    expected = [_split(reference.run(sample.inputs), 1)[0] for sample in answers.samples]
    return tuple(
        compare(
            spec.name,
            spec.datatype.value,
            [row[spec.name] for row in expected],
            [row[spec.name] for row in answers.outputs],
        )
        for spec in reference.traits.outputs
    )
