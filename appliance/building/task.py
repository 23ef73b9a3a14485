"""The task's metric on labelled samples: of a candidate and its reference side by side, or of answers that came from elsewhere.

Knows runners, files and the manifest; `verification` and `evaluation` make a verdict of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.building.arrays import Archive, ArrayError
from appliance.building.comparison import (
    Classification,
    Regression,
    Tolerance,
    classification,
    disagreement,
    regression,
    shown,
    within,
)
from appliance.building.pictures import LABEL_ARRAYS, Sample, SampleError, SampleSource
from appliance.building.rows import Feeds
from appliance.building.runner import Runner
from appliance.core.manifest import ModelManifest
from appliance.engines.base import EngineError, EngineTraits

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SAMPLES = 2000

Metric = Classification | Regression


def rows_of(traits: EngineTraits) -> int:
    """How many rows a run takes at most; exactly so many where the model's batch is fixed."""
    return (
        traits.max_batch_size if traits.batched else max([1, *(spec.shape[0] for spec in traits.inputs if spec.shape)])
    )


def metrics(
    folder: Path, manifest: ModelManifest, labels: Sequence[str], reference: Runner, candidate: Runner
) -> tuple[Metric, Metric, list[str]] | None:
    """The metric of both on the model's labelled samples, if it has any, and in words where no tolerance helps.

    SampleError for samples that cannot be used; EngineError if the candidate refuses one.
    """
    place = sample_folder(folder, manifest)
    if place is None:
        return None
    source = SampleSource(place, reference.traits.inputs, manifest.preprocessing, labels, limit=MAX_SAMPLES)
    samples = [sample for sample in source if sample.label >= 0 or sample.target is not None]
    if not samples and manifest.verify.samples:
        raise SampleError(
            f"[verify] samples names {manifest.verify.samples!r}, where nothing has a label or a target: expected a folder "
            f"for each label, or in each .npz an array called {', '.join(map(repr, LABEL_ARRAYS))} or 'target'"
        )
    if not samples:
        return None
    name = reference.traits.outputs[0].name
    first: list[NDArray[Any]] = []
    second: list[NDArray[Any]] = []
    failures: dict[str, str] = {}
    for expected, found, rows in _answers(reference, candidate, samples):
        for output, wanted in expected.items():
            if problem := disagreement([wanted], [found[output]]):
                failures.setdefault(output, f"on the samples: output {output!r}: {problem}")
        first += list(expected[name][:rows])
        second += list(found[name][:rows])
    try:
        return measure(samples, first, labels), measure(samples, second, labels), list(failures.values())
    except ValueError as error:
        raise SampleError(f"the samples in {place.name!r} do not fit: {error}") from error


def sample_folder(folder: Path, manifest: ModelManifest) -> Path | None:
    """Where labelled samples lie: as the manifest says, or golden files with labels or targets.

    SampleError if it is not there, or cannot be read.
    """
    named = manifest.verify.samples
    if named:
        place = (folder / named).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise SampleError(f"[verify] samples names {named!r}, outside the model's folder")
        if not place.exists():
            raise SampleError(f"[verify] samples names {named!r}, which is not there")
        return place
    golden = folder / "golden"
    try:
        for file in sorted(golden.glob("*.npz")):
            with Archive(file, f"golden/{file.name}") as archive:
                if {*LABEL_ARRAYS, "target"} & set(archive.names):
                    return golden
    except ArrayError as error:
        raise SampleError(str(error)) from error
    return None


def _answers(reference: Runner, candidate: Runner, samples: Sequence[Sample]) -> Iterator[tuple[Feeds, Feeds, int]]:
    """What both answer, a run at a time, and how many of its rows are samples."""
    step = min(rows_of(reference.traits), rows_of(candidate.traits))
    for start in range(0, len(samples), step):
        chunk = samples[start : start + step]
        try:
            feeds = {key: np.concatenate([sample.inputs[key] for sample in chunk]) for key in chunk[0].inputs}
            runs = [(feeds, len(chunk))]
        except ValueError:  # of different sizes
            runs = [(sample.inputs, 1) for sample in chunk]
        for feed, rows in runs:
            if not reference.traits.batched and rows < step:
                # a model of a fixed batch takes no fewer rows: the last one stands in, and its answers are dropped
                feed = {key: np.concatenate([array, array[-1:].repeat(step - rows, 0)]) for key, array in feed.items()}
            try:
                expected = reference.run(feed)
            except EngineError as error:
                raise SampleError(f"the reference refuses a sample: {error}") from error
            yield expected, candidate.run(feed), rows


def measure(samples: Sequence[Sample], predictions: Sequence[NDArray[Any]], labels: Sequence[str]) -> Metric:
    """The metric that the samples call for: by their targets, or else by their labels. ValueError if they do not fit the answers.

    An output of one value a row is taken as the class itself (integers) or as the probability of class 1 (floats).
    """
    targets = [sample.target for sample in samples if sample.target is not None]
    if targets and len(targets) < len(samples):
        raise ValueError("some samples have a target and some a label: one kind is expected")
    if targets:
        return regression([np.asarray(target) for target in targets], predictions)
    while labels and not labels[-1]:
        labels = labels[:-1]  # empty lines at the end of a file of labels
    scores = int(predictions[0].size)
    if labels and scores > 1 and len(labels) != scores:
        raise ValueError(
            f"the model has {len(labels)} labels, and its answers have {scores} scores: one each is expected"
        )
    classes = len(labels) or (scores if scores > 1 else 0)
    for sample in samples:
        if classes and sample.label >= classes:
            raise ValueError(f"sample {sample.source} has the label {sample.label}, the classes are 0 to {classes - 1}")
    return classification([sample.label for sample in samples], [predicted_class(row) for row in predictions], labels)


def predicted_class(row: NDArray[Any]) -> int:
    """The class that one row of scores means; -1 where a score is NaN, which means none."""
    flat = np.asarray(row).reshape(-1)
    if flat.dtype.kind == "f" and np.isnan(flat).any():
        return -1
    if flat.size > 1:
        return int(np.argmax(flat))
    return int(flat[0] >= 0.5) if flat.dtype.kind == "f" else int(flat[0])


def metric_failures(reference: Metric, candidate: Metric, allowed: Tolerance) -> list[str]:
    """In words, a loss in the task beyond what is allowed, or one that is no number."""
    limit = allowed.metric_drop
    if isinstance(reference, Classification) and isinstance(candidate, Classification):
        if within(reference.accuracy - candidate.accuracy, limit + 1e-12):
            return []
        return [
            f"accuracy falls from {reference.accuracy:.4f} to {candidate.accuracy:.4f}; a drop of {limit:g} is allowed"
        ]
    assert isinstance(reference, Regression)
    assert isinstance(candidate, Regression)
    if reference.mse is not None and within(candidate.mse, reference.mse * (1 + limit) + 1e-12):
        return []
    first, second = shown(reference.mse, ".4g"), shown(candidate.mse, ".4g")
    if reference.mse is None or candidate.mse is None:
        return [f"the mean squared error must be a number: it is {second}, the reference's {first}"]
    return [f"mean squared error grows from {first} to {second}; a growth of {limit:.0%} is allowed"]
