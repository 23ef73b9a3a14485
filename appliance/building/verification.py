"""The gate: a candidate engine and the reference answer the same inputs, and only a candidate that agrees may serve.

The reference is the model's own file on ONNX Runtime's CPU provider. Inputs are those kept with the model (golden/*.npz), or
else generated and seeded; labelled samples give the task's metrics of both. Row i alone and row i within a batch must agree.
Runs in a build process; decides nothing about files, keys or what serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from appliance.building.comparison import (
    DEFAULTS,
    Classification,
    OutputComparison,
    Regression,
    Tolerance,
    classification,
    compare,
    regression,
    tolerance,
)
from appliance.building.pictures import Sample, SampleError, SampleSource, image_layout, scale
from appliance.building.runner import Runner
from appliance.core.manifest import ModelManifest, PreprocessingManifest, ShapeRange
from appliance.core.tensor import DataType, TensorSpec
from appliance.engines.base import EngineError, EngineOptions, EngineTraits

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feeds = dict[str, "NDArray[Any]"]

SEED = 20
MAX_SAMPLES = 2000
SIZES = ("opt", "min", "max")
"""The order in which generated runs go through a range of sizes."""

FREE_AXIS = 32
"""The size taken for a free axis that is not the batch, where the manifest names no range for it."""

INVARIANCE = {"as-is": 1e-4, "fp32": 1e-4}
"""How far a row alone and in a batch may lie apart, as a share; other precisions: half of what they may differ at all.

Not zero: a matrix product of one row adds up in another order than one of eight.
"""


class VerificationError(Exception):
    """The verification could not be done; the text says what is missing."""


class VerifyOrder(msgspec.Struct, frozen=True):
    """What to hold against what. Folders are the model's own; `candidate` is as a worker would load it."""

    model: str
    version: str
    label: str
    reference_file: str
    candidate: EngineOptions
    manifest: ModelManifest
    labels: tuple[str, ...]
    folder: str


class Report(msgspec.Struct, frozen=True):
    """What was found. `passed` is the verdict, `failures` its reasons; times are medians for one row, in seconds."""

    model: str
    version: str
    label: str
    precision: str
    passed: bool
    failures: tuple[str, ...]
    inputs: str
    rows: int
    outputs: tuple[OutputComparison, ...]
    invariance: tuple[OutputComparison, ...]
    tolerance: Tolerance
    reference_provider: str
    candidate_provider: str
    reference_s: float
    candidate_s: float
    metric_reference: Classification | Regression | None = None
    metric_candidate: Classification | Regression | None = None

    @property
    def summary(self) -> str:
        """One line: errors, the task's metric, the speed."""
        if not self.outputs:
            return "; ".join(self.failures)
        parts = [
            f"largest relative error {max(output.max_relative for output in self.outputs):.2g}",
            f"cosine {min(output.cosine for output in self.outputs):.6f}",
        ]
        first, second = self.metric_reference, self.metric_candidate
        if isinstance(first, Classification) and isinstance(second, Classification):
            parts.append(f"accuracy {second.accuracy:.4f} (reference {first.accuracy:.4f}, {first.samples} samples)")
        if isinstance(first, Regression) and isinstance(second, Regression):
            parts.append(f"mean squared error {second.mse:.4g} (reference {first.mse:.4g})")
        parts.append(f"{self.candidate_s * 1000:.3f} ms a row (reference {self.reference_s * 1000:.3f} ms)")
        return ", ".join(parts)


OnStep = Callable[[str, float], None]


def verify(order: VerifyOrder, on_step: OnStep = lambda _phase, _share: None) -> Report:
    """Run both and compare. VerificationError if there is nothing to run on; EngineError if the reference itself fails.

    A candidate that cannot run is a failed verification, not an error.
    """
    manifest = order.manifest
    reference = Runner(
        msgspec.structs.replace(
            order.candidate, engine="onnxruntime", model_file=order.reference_file, device="cpu", fallback=""
        )
    )
    try:
        feeds, source = _feeds(order, reference.traits)
        on_step("reference", 0.0)
        expected = [reference.run(feed) for feed in feeds]
        on_step("candidate", 0.2)
        try:
            candidate = Runner(order.candidate)
        except EngineError as error:
            return _refused(order, reference, source, f"the engine cannot be loaded: {error}")
        try:
            return _judge(order, reference, candidate, feeds, expected, source, manifest, on_step)
        except EngineError as error:
            return _refused(order, reference, source, f"the engine refuses an input: {error}")
        finally:
            candidate.close()
    finally:
        reference.close()


def _judge(
    order: VerifyOrder,
    reference: Runner,
    candidate: Runner,
    feeds: list[Feeds],
    expected: list[Feeds],
    source: str,
    manifest: ModelManifest,
    on_step: OnStep,
) -> Report:
    allowed = tolerance(manifest.precision, manifest.verify)
    failures = _contract_failures(reference.traits, candidate.traits)
    if failures:
        return _refused(order, reference, source, *failures)
    found = [candidate.run(feed) for feed in feeds]
    outputs = tuple(_compare(spec, expected, found) for spec in reference.traits.outputs)
    failures += [text for output in outputs for text in output.failures(allowed)]
    on_step("batch invariance", 0.4)
    invariance = _invariance(candidate, feeds)
    near = INVARIANCE.get(manifest.precision, DEFAULTS[manifest.precision].max_relative / 2)
    within = Tolerance(near, 0.0, allowed.mismatch, 0.0)
    failures += [f"alone and in a batch: {text}" for output in invariance for text in output.failures(within)]
    on_step("samples", 0.6)
    metrics = _metrics(order, reference, candidate)
    if metrics is not None:
        failures += _drop(*metrics, allowed)
    on_step("timing", 0.9)
    one = {name: array[:1] if candidate.traits.batched else array for name, array in feeds[0].items()}
    return Report(
        model=order.model,
        version=order.version,
        label=order.label,
        precision=manifest.precision,
        passed=not failures,
        failures=tuple(failures),
        inputs=source,
        rows=sum(row_count(feed) for feed in feeds),
        outputs=outputs,
        invariance=invariance,
        tolerance=allowed,
        reference_provider=reference.traits.provider,
        candidate_provider=candidate.traits.provider,
        reference_s=reference.seconds(one),
        candidate_s=candidate.seconds(one),
        metric_reference=metrics[0] if metrics else None,
        metric_candidate=metrics[1] if metrics else None,
    )


def _refused(order: VerifyOrder, reference: Runner, source: str, *failures: str) -> Report:
    return Report(
        model=order.model,
        version=order.version,
        label=order.label,
        precision=order.manifest.precision,
        passed=False,
        failures=failures,
        inputs=source,
        rows=0,
        outputs=(),
        invariance=(),
        tolerance=tolerance(order.manifest.precision, order.manifest.verify),
        reference_provider=reference.traits.provider,
        candidate_provider="",
        reference_s=0.0,
        candidate_s=0.0,
    )


def _contract_failures(reference: EngineTraits, candidate: EngineTraits) -> list[str]:
    """Names, datatypes and fixed sizes must be those of the model; a free axis may have become a range."""
    failures = []
    for kind, wanted, came in (
        ("input", reference.inputs, candidate.inputs),
        ("output", reference.outputs, candidate.outputs),
    ):
        have = {spec.name: spec for spec in came}
        for spec in wanted:
            other = have.pop(spec.name, None)
            if other is None:
                failures.append(f"{kind} {spec.name!r} is missing")
            elif other.datatype is not spec.datatype or len(other.shape) != len(spec.shape):
                failures.append(
                    f"{kind} {spec.name!r} is {other.datatype.value} {list(other.shape)} "
                    f"instead of {spec.datatype.value} {list(spec.shape)}"
                )
        failures += [f"{kind} {name!r} is not in the model" for name in have]
    return failures


def row_count(feed: Feeds) -> int:
    """How many rows a run's inputs have."""
    first = next(iter(feed.values()))
    return int(first.shape[0]) if first.ndim else 1


def _compare(spec: TensorSpec, expected: Sequence[Feeds], found: Sequence[Feeds]) -> OutputComparison:
    return compare(
        spec.name, spec.datatype.value, [run[spec.name] for run in expected], [run[spec.name] for run in found]
    )


def _invariance(candidate: Runner, feeds: Sequence[Feeds]) -> tuple[OutputComparison, ...]:
    """Each of some rows alone against the same row among others. Empty for a model that is not batched."""
    if not candidate.traits.batched:
        return ()
    batch = max(feeds, key=row_count)
    rows = min(row_count(batch), 8)
    if rows < 2:
        return ()
    batch = {name: array[:rows] for name, array in batch.items()}
    together = candidate.run(batch)
    alone = [candidate.run({name: array[row : row + 1] for name, array in batch.items()}) for row in range(rows)]
    among = [{name: array[row : row + 1] for name, array in together.items()} for row in range(rows)]
    return tuple(_compare(spec, alone, among) for spec in candidate.traits.outputs)


def _feeds(order: VerifyOrder, traits: EngineTraits) -> tuple[list[Feeds], str]:
    """What to run on, and where it comes from, in words."""
    golden = sorted(Path(order.folder, "golden").glob("*.npz"))
    limit = order.manifest.verify.inputs
    if golden:
        found = [feed for file in golden for feed in golden_feeds(file, traits)]
        if found:
            return found, f"{len(golden)} file(s) of golden inputs"
    manifest = order.manifest
    generated = generate(traits, manifest.preprocessing, manifest.build.shapes, limit, manifest.verify.ranges)
    return generated, f"generated, seed {SEED}"


def golden_feeds(file: Path, traits: EngineTraits) -> Iterator[Feeds]:
    """Runs from a file of golden inputs, in batches that the engine takes. VerificationError for one that does not fit."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {spec.name: archive[spec.name] for spec in traits.inputs if spec.name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise VerificationError(f"golden/{file.name} cannot be read") from error
    missing = [spec.name for spec in traits.inputs if spec.name not in arrays]
    if missing:
        raise VerificationError(f"golden/{file.name} has no array {missing[0]!r}")
    for spec in traits.inputs:
        array = arrays[spec.name]
        if array.ndim != len(spec.shape) or any(
            want not in (-1, size) for want, size in zip(spec.shape, array.shape, strict=True)
        ):
            raise VerificationError(
                f"golden/{file.name}: input {spec.name!r} has shape {list(spec.shape)}, {list(array.shape)} came"
            )
    if not traits.batched:
        yield arrays
        return
    for start in range(0, row_count(arrays), traits.max_batch_size):
        yield {name: array[start : start + traits.max_batch_size] for name, array in arrays.items()}


def generate(
    traits: EngineTraits,
    preprocessing: PreprocessingManifest,
    shapes: Mapping[str, ShapeRange],
    count: int,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> list[Feeds]:
    """Seeded inputs, `count` rows for a batched model and as many runs for others.

    Where `shapes` gives a range, the runs go through its opt, min and max sizes. Values of an input in `ranges` are uniform
    between its bounds, both included for integers. Otherwise pictures of smooth noise through the model's preprocessing where
    an input looks like one, normal noise for other floats, 0 and 1 for integers. VerificationError for strings, which nobody
    can invent, and for bounds that are none.
    """
    ranges = ranges or {}
    for name, (low, high) in ranges.items():
        if not low <= high:
            raise VerificationError(
                f"[verify] ranges: {name!r} has its lowest value {low:g} above its highest, {high:g}"
            )
    random = np.random.default_rng(SEED)
    rows = min(count, traits.max_batch_size) if traits.batched else 1
    runs = max(len(SIZES) if shapes else 1, -(-count // rows))
    return [
        {
            spec.name: _noise(random, spec, _shape(spec, rows, run, shapes), preprocessing, ranges.get(spec.name))
            for spec in traits.inputs
        }
        for run in range(min(runs, max(count, len(SIZES))))
    ]


def _shape(spec: TensorSpec, rows: int, run: int, shapes: Mapping[str, ShapeRange]) -> list[int]:
    """The sizes of an input in that run; the batch axis has `rows`, within the range of the manifest."""
    sizes = shapes.get(spec.name)
    known: tuple[int, ...] = (FREE_AXIS,) * len(spec.shape)
    if sizes is not None:
        known = {"opt": sizes.opt or sizes.max, "min": sizes.min, "max": sizes.max}[SIZES[run % len(SIZES)]]
        if len(known) != len(spec.shape):
            raise VerificationError(
                f"[build.shapes] {spec.name!r} has {len(known)} axes, the model's input has {len(spec.shape)}"
            )
    shape = [size if size >= 0 else known[axis] for axis, size in enumerate(spec.shape)]
    if shape and spec.shape[0] < 0:
        shape[0] = rows if sizes is None else min(max(rows, sizes.min[0]), sizes.max[0])
    return shape


def _noise(
    random: np.random.Generator,
    spec: TensorSpec,
    shape: list[int],
    preprocessing: PreprocessingManifest,
    bounds: tuple[float, float] | None,
) -> NDArray[Any]:
    if spec.datatype is DataType.BYTES:
        raise VerificationError(f"input {spec.name!r} takes strings: put golden inputs into golden/*.npz of the model")
    kind = np.dtype(spec.datatype.numpy or "f4")
    if bounds is not None:
        low, high = bounds
        if kind.kind == "f":
            return random.uniform(low, high, shape).astype(kind)
        return random.integers(int(low), int(high), shape, endpoint=True).astype(kind)
    try:
        image_layout(spec, preprocessing)
    except SampleError:
        pass
    else:
        # smooth, so that neighbouring pixels are alike as in pictures; white noise excites nothing that was trained
        coarse: NDArray[Any] = random.integers(0, 256, shape).astype(np.float32)
        for axis in range(len(shape) - 3, len(shape)):
            if shape[axis] > 8:
                coarse = (coarse + np.roll(coarse, 1, axis) + np.roll(coarse, 2, axis)) / 3
        with np.errstate(all="ignore"):
            flat = PreprocessingManifest(scale=preprocessing.scale)
            return scale(coarse.astype(np.uint8), spec, flat)
    if kind.kind == "f":
        return random.standard_normal(shape).astype(kind)
    return random.integers(0, 2, shape).astype(kind)


def _metrics(
    order: VerifyOrder, reference: Runner, candidate: Runner
) -> tuple[Classification | Regression, Classification | Regression] | None:
    """The task's metric of both on labelled samples, if there are any."""
    place = sample_folder(Path(order.folder), order.manifest)
    if place is None:
        return None
    try:
        source = SampleSource(
            place, reference.traits.inputs, order.manifest.preprocessing, order.labels, limit=MAX_SAMPLES
        )
        samples = [sample for sample in source if sample.label >= 0 or sample.target is not None]
    except SampleError as error:
        raise VerificationError(str(error)) from error
    if not samples:
        return None
    first = measure(samples, _predict(reference, samples), order.labels)
    return first, measure(samples, _predict(candidate, samples), order.labels)


def sample_folder(folder: Path, manifest: ModelManifest) -> Path | None:
    """Where labelled samples lie: as the manifest says, or golden files with labels. VerificationError if it is not there."""
    named = manifest.verify.samples
    if named:
        place = (folder / named).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise VerificationError(f"[verify] samples names {named!r}, outside the model's folder")
        if not place.exists():
            raise VerificationError(f"[verify] samples names {named!r}, which is not there")
        return place
    golden = folder / "golden"
    return golden if any(golden.glob("*.npz")) else None


def _predict(runner: Runner, samples: Sequence[Sample]) -> list[NDArray[Any]]:
    """The first output for every sample, a row each."""
    name = runner.traits.outputs[0].name
    fixed = [spec.shape[0] for spec in runner.traits.inputs if spec.shape]
    step = runner.traits.max_batch_size if runner.traits.batched else max(1, *fixed)
    found: list[NDArray[Any]] = []
    for start in range(0, len(samples), step):
        chunk = samples[start : start + step]
        try:
            feeds = {key: np.concatenate([sample.inputs[key] for sample in chunk]) for key in chunk[0].inputs}
        except ValueError:
            found += [runner.run(sample.inputs)[name][0] for sample in chunk]
            continue
        if not runner.traits.batched and len(chunk) < step:
            # a model of a fixed batch takes no fewer rows: the last one stands in, and its answers are dropped
            feeds = {key: np.concatenate([rows, rows[-1:].repeat(step - len(chunk), 0)]) for key, rows in feeds.items()}
        found += list(runner.run(feeds)[name][: len(chunk)])
    return found


def measure(
    samples: Sequence[Sample], predictions: Sequence[NDArray[Any]], labels: Sequence[str]
) -> Classification | Regression:
    """The metric that the samples call for: by their targets, or else by their labels.

    An output of one value a row is taken as the class itself (integers) or as the probability of class 1 (floats).
    """
    if samples[0].target is not None:
        return regression([np.asarray(sample.target) for sample in samples], predictions)
    return classification([sample.label for sample in samples], [predicted_class(row) for row in predictions], labels)


def predicted_class(row: NDArray[Any]) -> int:
    """The class that one row of scores means."""
    flat = np.asarray(row).reshape(-1)
    if flat.size > 1:
        return int(np.argmax(flat))
    return int(flat[0] >= 0.5) if flat.dtype.kind == "f" else int(flat[0])


def _drop(
    reference: Classification | Regression, candidate: Classification | Regression, allowed: Tolerance
) -> list[str]:
    limit = allowed.metric_drop
    if isinstance(reference, Classification) and isinstance(candidate, Classification):
        drop = reference.accuracy - candidate.accuracy
        if drop > limit + 1e-12:
            return [
                f"accuracy falls from {reference.accuracy:.4f} to {candidate.accuracy:.4f}; a drop of {limit:g} is allowed"
            ]
        return []
    assert isinstance(reference, Regression)
    assert isinstance(candidate, Regression)
    if candidate.mse > reference.mse * (1 + limit) + 1e-12:
        return [
            f"mean squared error grows from {reference.mse:.4g} to {candidate.mse:.4g}; a growth of {limit:.0%} is allowed"
        ]
    return []
