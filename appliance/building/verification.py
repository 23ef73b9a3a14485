"""The gate: a candidate engine and the reference answer the same inputs, and only a candidate that agrees may serve.

The reference is the model's own file on ONNX Runtime's CPU provider. Inputs are those kept with the model (golden/*.npz), or
else generated and seeded; labelled samples give the task's metrics of both. Row i alone and row i within a batch must agree.
A number that is not finite is within no limit. Runs in a build process; decides nothing about files, keys or what serves.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from appliance.building.arrays import Archive, ArrayError, as_input
from appliance.building.comparison import (
    DEFAULTS,
    Classification,
    OutputComparison,
    Regression,
    Tolerance,
    compare,
    shown,
    tolerance,
)
from appliance.building.pictures import SampleError, image_layout, scale
from appliance.building.rows import Feeds, differing, joined, row_count, variations
from appliance.building.runner import Runner
from appliance.building.task import metric_failures, metrics, rows_of
from appliance.core.manifest import ModelManifest, PreprocessingManifest, ShapeRange
from appliance.core.tensor import DataType, TensorSpec
from appliance.engines.base import EngineError, EngineOptions, EngineTraits

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED = 20
SIZES = ("opt", "min", "max")
"""The order in which generated runs go through a range of sizes."""

FREE_AXIS = 32
"""The size taken for a free axis that is not the batch, where the manifest names no range for it."""

BATCH_ROWS = 8
"""Rows of the batch beside which each of them is also asked alone."""

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
            f"largest relative error {_largest(self.outputs)}",
            f"cosine {min(output.cosine for output in self.outputs):.6f}",
        ]
        first, second = self.metric_reference, self.metric_candidate
        if isinstance(first, Classification) and isinstance(second, Classification):
            parts.append(f"accuracy {second.accuracy:.4f} (reference {first.accuracy:.4f}, {first.samples} samples)")
        if isinstance(first, Regression) and isinstance(second, Regression):
            parts.append(f"mean squared error {shown(second.mse, '.4g')} (reference {shown(first.mse, '.4g')})")
        parts.append(f"{self.candidate_s * 1000:.3f} ms a row (reference {self.reference_s * 1000:.3f} ms)")
        return ", ".join(parts)


def _largest(outputs: Sequence[OutputComparison]) -> str:
    """The largest relative error of all, in words; one that is not finite is larger than any."""
    errors = [output.max_relative for output in outputs]
    return shown(None if None in errors else max(error or 0.0 for error in errors), ".2g")


OnStep = Callable[[str, float], None]


def verify(order: VerifyOrder, on_step: OnStep = lambda _phase, _share: None) -> Report:
    """Run both and compare. VerificationError if there is nothing to run on; EngineError if the reference itself fails.

    A candidate that cannot run is a failed verification, not an error.
    """
    options = msgspec.structs.replace(
        order.candidate, engine="onnxruntime", model_file=order.reference_file, device="cpu", fallback=""
    )
    with contextlib.closing(Runner(options)) as reference:
        try:
            loaded = Runner(order.candidate)
        except EngineError as error:
            _, source = _feeds(order, reference.traits)
            return _refused(order, reference, source, f"the engine cannot be loaded: {error}")
        with contextlib.closing(loaded) as candidate:
            # in batches that both take: a plan may hold fewer rows than the reference
            rows = min(rows_of(reference.traits), rows_of(candidate.traits))
            feeds, source = _feeds(order, msgspec.structs.replace(reference.traits, max_batch_size=rows))
            on_step("reference", 0.0)
            expected = [reference.run(feed) for feed in feeds]
            on_step("candidate", 0.2)
            try:
                return _judge(order, reference, candidate, feeds, expected, source, on_step)
            except EngineError as error:
                return _refused(order, reference, source, f"the engine refuses an input: {error}")


def _judge(
    order: VerifyOrder,
    reference: Runner,
    candidate: Runner,
    feeds: list[Feeds],
    expected: list[Feeds],
    source: str,
    on_step: OnStep,
) -> Report:
    manifest = order.manifest
    allowed = tolerance(manifest.precision, manifest.verify)
    failures = _contract_failures(reference.traits, candidate.traits)
    if failures:
        return _refused(order, reference, source, *failures)
    found = [candidate.run(feed) for feed in feeds]
    outputs = tuple(_compare(spec, expected, found) for spec in reference.traits.outputs)
    failures += [text for output in outputs for text in output.failures(allowed)]
    on_step("batch invariance", 0.4)
    invariance = _invariance(order, reference, candidate, feeds)
    near = INVARIANCE.get(manifest.precision, DEFAULTS[manifest.precision].max_relative / 2)
    nearly = Tolerance(near, 0.0, allowed.mismatch, 0.0)
    failures += [f"alone and in a batch: {text}" for output in invariance for text in output.failures(nearly)]
    on_step("samples", 0.6)
    try:
        measured = metrics(Path(order.folder), manifest, order.labels, reference, candidate)
    except SampleError as error:
        raise VerificationError(str(error)) from error
    if measured is not None:
        failures += [*measured[2], *metric_failures(measured[0], measured[1], allowed)]
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
        metric_reference=measured[0] if measured else None,
        metric_candidate=measured[1] if measured else None,
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


def _compare(spec: TensorSpec, expected: Sequence[Feeds], found: Sequence[Feeds]) -> OutputComparison:
    return compare(
        spec.name, spec.datatype.value, [run[spec.name] for run in expected], [run[spec.name] for run in found]
    )


def _invariance(
    order: VerifyOrder, reference: Runner, candidate: Runner, feeds: Sequence[Feeds]
) -> tuple[OutputComparison, ...]:
    """Each of some rows alone against the same row among others. Empty for a model that is not batched."""
    if not candidate.traits.batched:
        return ()
    rows = _company(order, reference, feeds, min(BATCH_ROWS, candidate.traits.max_batch_size))
    together = candidate.run(joined(rows))
    alone = [candidate.run(row) for row in rows]
    among = [{name: array[row : row + 1] for name, array in together.items()} for row in range(len(rows))]
    return tuple(_compare(spec, alone, among) for spec in candidate.traits.outputs)


def _company(order: VerifyOrder, reference: Runner, feeds: Sequence[Feeds], count: int) -> list[Feeds]:
    """So many rows, at least two of which differ: the inputs' own, in turn; varied where all inputs are one and the same row.

    VerificationError if there is one row only and the model takes no variation of it.
    """
    rows = differing(feeds, count)
    if len(rows) == 1 and count > 1:
        # all inputs at once, or else one by one: a mask or a length may allow one value only
        for names in (list(rows[0]), *([name] for name in rows[0])):
            made = variations(rows[0], names, order.manifest.verify.ranges, count)
            if len(made) > 1 and _takes(reference, made):
                rows = made
                break
        else:
            raise VerificationError(
                "whether a row is answered alike alone and in a batch cannot be checked on one row: put at least two that differ "
                "into golden/*.npz of the model, or set [batching] max_batch_size = 1"
            )
    return list(itertools.islice(itertools.cycle(rows), count))


def _takes(reference: Runner, rows: Sequence[Feeds]) -> bool:
    """Whether these rows are valid inputs, as far as the model itself says."""
    try:
        reference.run(joined(rows))
    except EngineError:
        return False
    return True


def _feeds(order: VerifyOrder, traits: EngineTraits) -> tuple[list[Feeds], str]:
    """What to run on, and where it comes from, in words."""
    manifest = order.manifest
    _check_ranges(traits, manifest.verify.ranges)
    golden = sorted(Path(order.folder, "golden").glob("*.npz"))
    if golden:
        return [
            feed for file in golden for feed in golden_feeds(file, traits)
        ], f"{len(golden)} file(s) of golden inputs"
    limit, ranges = manifest.verify.inputs, manifest.verify.ranges
    return generate(traits, manifest.preprocessing, manifest.build.shapes, limit, ranges), f"generated, seed {SEED}"


def golden_feeds(file: Path, traits: EngineTraits) -> Iterator[Feeds]:
    """Runs from a file of golden inputs, in batches that the engine takes. VerificationError for one that does not fit."""
    place = f"golden/{file.name}"
    arrays: Feeds = {}
    try:
        with Archive(file, place) as archive:
            for spec in traits.inputs:
                if spec.name not in archive.names:
                    raise VerificationError(f"{place} has no array {spec.name!r}")
                arrays[spec.name] = archive[spec.name]
    except ArrayError as error:
        raise VerificationError(str(error)) from error
    for spec in traits.inputs:
        array = arrays[spec.name]
        if array.ndim != len(spec.shape) or any(
            want not in (-1, size) for want, size in zip(spec.shape, array.shape, strict=True)
        ):
            raise VerificationError(
                f"{place}: input {spec.name!r} has shape {list(spec.shape)}, {list(array.shape)} came"
            )
        try:
            arrays[spec.name] = as_input(array, spec)
        except ArrayError as error:
            raise VerificationError(f"{place}: {error}") from error
    if not traits.batched:
        yield arrays
        return
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise VerificationError(f"{place}: its arrays have different numbers of rows: {said}")
    if not row_count(arrays):
        raise VerificationError(f"{place} holds no row")
    for start in range(0, row_count(arrays), traits.max_batch_size):
        yield {name: array[start : start + traits.max_batch_size] for name, array in arrays.items()}


def _check_ranges(traits: EngineTraits, ranges: Mapping[str, tuple[float, float]]) -> None:
    """VerificationError for a range of an unknown input, upside down, or of values that its datatype cannot hold."""
    specs = {spec.name: spec for spec in traits.inputs}
    for name, bounds in ranges.items():
        low, high = bounds
        if name not in specs:
            names = ", ".join(map(repr, specs))
            raise VerificationError(f"[verify] ranges names {name!r}, which is no input of the model; it has {names}")
        if not low <= high:
            raise VerificationError(
                f"[verify] ranges: {name!r} has its lowest value {low:g} above its highest, {high:g}"
            )
        if specs[name].datatype is DataType.BYTES:
            raise VerificationError(f"[verify] ranges: input {name!r} takes strings, which have no range")
        try:
            as_input(np.array(bounds, np.float64), specs[name])
        except ArrayError as error:
            raise VerificationError(
                f"[verify] ranges: input {name!r} is {specs[name].datatype.value}, which does not hold {low:g} to {high:g}"
            ) from error


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
    _check_ranges(traits, ranges)
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
            # not uniform(low, high), whose difference may overflow
            share = random.random(shape)
            return (low * (1 - share) + high * share).astype(kind)
        return random.integers(int(low), int(high), shape, kind, endpoint=True)
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
