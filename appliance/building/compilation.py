"""Making an engine: the conversion, the build, and the gate, in one place of the store. Runs in a build process.

`orders` says what comes in and goes out, `keys` what an engine is found by, `store` keeps it.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from appliance.building import precision, report
from appliance.building.builder import PlanBuilder
from appliance.building.inspect import InspectError, Inspection, Value, inspect
from appliance.building.keys import (
    as_is_digest,
    calibration_folder,
    engine_key,
    gate_digest,
    golden_digest,
    outcome_of,
    shared_key,
)
from appliance.building.orders import CONVERTED, BuildError, DeviceFacts, Outcome, Target
from appliance.building.pictures import SampleError, SampleSource
from appliance.building.pinned import PinnedFile
from appliance.building.stopping import Stop
from appliance.building.store import (
    REPORT_JSON,
    REPORT_PAGE,
    EngineStore,
    Sidecar,
    StoreError,
    key_digest,
    new_sidecar,
)
from appliance.building.verification import Report, VerificationError, VerifyOrder, verify
from appliance.core.errors import ApplianceError
from appliance.core.tensor import TensorSpec, datatype_of
from appliance.engines.base import EngineError, EngineOptions
from appliance.host.durable import write_durably

log = logging.getLogger(__name__)

OnPercent = Callable[[str, float], None]
"""Told the phase, and how much of the whole is done, in percent."""

MODEL_FILE = "model.onnx"
PLAN_FILE = "model.plan"
LOG_LINES_KEPT = 40
PLAN_BEGINS, PLAN_ENDS = 25.0, 98.0
"""Percent of the whole: a conversion comes before, keeping after."""

LOG_FILE = "build.log"
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


class Made(msgspec.Struct, frozen=True):
    """What lies in the staging folder: the file that the engine loads, its inputs and outputs, and what the log says."""

    model_file: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    log: tuple[str, ...]


def build(target: Target, on_percent: OnPercent, *, force: bool = False, stop: Stop | None = None) -> Outcome:
    """Make the engine and keep it, or find it kept. BuildError says why it cannot be made; nothing half is left.

    SystemExit if `stop` was asked meanwhile.
    """
    store = EngineStore(Path(target.store))
    try:
        found = inspect(Path(target.source))
        key = engine_key(target)
        digest = key_digest(key)
        with store.building(target.model, digest) as staging:
            entry = None if force else store.find(target.model, digest)
            if entry is not None:
                return outcome_of(entry, target, built=False)
            begun = time.monotonic()
            made = _make(target, found, staging, on_percent, stop or Stop())
            seconds = round(time.monotonic() - begun, 3)
            sidecar = _sidecar(target, key, made, seconds)
            on_percent("keeping", 99.0)
            return outcome_of(store.commit(staging, target.model, digest, sidecar), target, built=True)
    except (StoreError, precision.PrecisionError, SampleError) as error:
        raise BuildError(str(error)) from error
    except InspectError as error:
        raise BuildError(f"the model {error}") from error
    except OSError as error:
        raise BuildError(f"{error.strerror or type(error).__name__}") from error


def _sidecar(target: Target, key: dict[str, str], made: Made, seconds: float) -> Sidecar:
    return msgspec.structs.replace(
        new_sidecar(key, target.engine, target.label, made.model_file, seconds),
        inputs=made.inputs,
        outputs=made.outputs,
        golden=golden_digest(target),
        driver=target.device.driver,
        log=made.log[-LOG_LINES_KEPT:],
    )


def _make(target: Target, found: Inspection, staging: Path, on_percent: OnPercent, stop: Stop) -> Made:
    """Build into the folder."""
    log = [f"{target.model} version {target.version}: {target.label}"]
    source, manifest = Path(target.source), target.manifest
    if manifest.precision == "bf16" and target.engine == "onnxruntime":
        raise BuildError("ONNX Runtime has BF16 for few operators; bf16 is for TensorRT: use fp16 or int8 here")
    converted = manifest.precision in CONVERTED
    share = 100.0 if target.engine == "onnxruntime" else 25.0

    def convert_step(phase: str, done: float) -> None:
        on_percent(phase, min(98.0, done * share))

    if converted:
        target_file = staging / MODEL_FILE
        precision.convert(
            source,
            target_file,
            manifest.precision,
            samples=_calibration(target, found) if manifest.precision == "int8" else (),
            method=manifest.build.calibration_method,
            on_step=convert_step,
        )
        log.append(f"converted to {manifest.precision}: {target_file.stat().st_size} bytes")
        source = target_file
    if target.engine == "onnxruntime":
        if not converted:
            raise BuildError("ONNX Runtime runs this model as it is: there is nothing to build")
        _write_log(staging, log)
        inputs, outputs = (_table(values) for values in (found.inputs, found.outputs))
        return Made(MODEL_FILE, inputs, outputs, tuple(log))
    return _make_plan(target, source, staging, log, on_percent, stop)


def _make_plan(target: Target, source: Path, staging: Path, log: list[str], on_percent: OnPercent, stop: Stop) -> Made:
    """The plan of a model, or of the graph it was converted to, which is not kept."""
    begin = PLAN_BEGINS if source.parent == staging else 0.0
    share = (PLAN_ENDS - begin) / 100
    cache = PinnedFile(EngineStore(Path(target.store)), f"timings-{key_digest(shared_key(target))}.cache")
    builder = PlanBuilder(target, lambda percent: on_percent("building", begin + percent * share), stop, cache)
    begun = time.monotonic()
    try:
        plan = builder.build(source)
    finally:
        _write_log(staging, [*log, *builder.log])
    (staging / PLAN_FILE).write_bytes(plan.data)
    log = [*log, *plan.log, f"plan: {len(plan.data)} bytes in {time.monotonic() - begun:.2f} s"]
    _write_log(staging, log)
    if source.parent == staging:
        source.unlink()
    return Made(PLAN_FILE, plan.inputs, plan.outputs, tuple(log))


def _write_log(staging: Path, log: list[str]) -> None:
    (staging / LOG_FILE).write_text("\n".join(log) + "\n")


def _table(values: tuple[Value, ...]) -> dict[str, str]:
    return {value.name: f"{value.datatype} [{', '.join(map(str, value.shape))}]" for value in values}


def probe(device: int) -> DeviceFacts:
    """What GPU there is, asked of CUDA in this process. BuildError if none can be used."""
    from appliance.engines import cuda

    try:
        facts = cuda.facts(device)
    except EngineError as error:
        raise BuildError(f"no NVIDIA GPU can be used: {error}") from error
    return msgspec.structs.replace(
        msgspec.convert(facts, DeviceFacts, from_attributes=True), driver=driver_version(DRIVER_VERSION)
    )


def driver_version(file: Path) -> str:
    """The version of NVIDIA's kernel module, as it tells it itself; empty where it does not (Jetsons before JetPack 6)."""
    try:
        found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def input_specs(found: Inspection) -> tuple[TensorSpec, ...]:
    """A model's inputs as they are served: every symbol a free axis. BuildError for datatypes that cannot be served."""
    try:
        return tuple(
            TensorSpec(
                value.name,
                datatype_of(value.datatype),
                tuple(size if isinstance(size, int) else -1 for size in value.shape),
            )
            for value in found.inputs
        )
    except ApplianceError as error:
        raise BuildError(error.message) from error


def _calibration(target: Target, found: Inspection) -> Iterator[dict[str, Any]]:
    """Feeds for the quantizer. BuildError where there are no samples: noise would calibrate for noise."""
    place = calibration_folder(target)
    if place is None:
        raise BuildError(
            "int8 needs calibration samples: put typical inputs (pictures or .npz) into a folder beside model.toml and name it "
            "under [build] calibration"
        )
    manifest = target.manifest
    source = SampleSource(
        place,
        input_specs(found),
        manifest.preprocessing,
        target.labels if place.name != "samples" else (),
        limit=manifest.build.calibration_samples,
    )
    samples = (sample.inputs for sample in itertools.islice(source, manifest.build.calibration_samples))
    sizes = {value.shape[0] if value.shape else 1 for value in found.inputs}
    size = next(iter(sizes)) if len(sizes) == 1 else 1
    return _joined(samples, size) if isinstance(size, int) and size > 1 else samples


def _joined(samples: Iterator[dict[str, Any]], rows: int) -> Iterator[dict[str, Any]]:
    """Batches for a model of a fixed batch; the last one is filled up with its own last row."""
    import numpy as np

    while some := list(itertools.islice(samples, rows)):
        some += some[-1:] * (rows - len(some))
        yield {name: np.concatenate([one[name] for one in some]) for name in some[0]}


def options_of(target: Target, model_file: str) -> EngineOptions:
    """How a worker would load that engine."""
    manifest = target.manifest
    return EngineOptions(
        engine=target.engine,
        model_file=model_file,
        device=manifest.device,
        max_batch_size=manifest.batching.max_batch_size,
        cores=len(os.sched_getaffinity(0)),
        onnxruntime=manifest.onnxruntime,
        parameters=manifest.parameters,
        fallback=manifest.fallback,
    )


def check(target: Target, digest: str, on_percent: OnPercent) -> tuple[Outcome, Report]:
    """Hold a kept engine against the reference, and keep verdict and report beside it.

    BuildError if it is not kept (any more) or if the verification cannot be done; a failed one is an outcome.
    """
    store = EngineStore(Path(target.store))
    try:
        entry = store.find(target.model, digest)
        if entry is None:
            raise BuildError("the engine is not kept any more, or was altered: build it anew")
        order = VerifyOrder(
            model=target.model,
            version=target.version,
            label=target.label,
            reference_file=target.source,
            candidate=options_of(target, str(entry.model_file)),
            manifest=target.manifest,
            labels=target.labels,
            folder=target.folder,
        )
        found = verify(order, lambda phase, share: on_percent(phase, share * 100))
        keep_report(entry.folder, found)
        verdict = "passed" if found.passed else "failed"
        reason = found.failures[0] if found.failures else ""
        by = gate_digest(target)
        entry = store.record_verification(entry, verdict, by, reason=reason, summary=found.summary)
    except (StoreError, VerificationError) as error:
        raise BuildError(str(error)) from error
    except EngineError as error:
        raise BuildError(f"the reference cannot run: {error}") from error
    except OSError as error:
        raise BuildError(f"the report cannot be kept: {error.strerror}") from error
    return outcome_of(entry, target, built=False), found


def check_as_is(target: Target, on_percent: OnPercent) -> tuple[Report, str]:
    """Verify a model that serves as it is: its own provider against the CPU, its rows alone and in batches, its metrics.

    The report, and the folder where it is kept: empty if it cannot be kept, which takes nothing from what was found.
    """
    order = VerifyOrder(
        model=target.model,
        version=target.version,
        label=target.label,
        reference_file=target.source,
        candidate=options_of(target, target.source),
        manifest=target.manifest,
        labels=target.labels,
        folder=target.folder,
    )
    try:
        found = verify(order, lambda phase, share: on_percent(phase, share * 100))
    except VerificationError as error:
        raise BuildError(str(error)) from error
    except EngineError as error:
        raise BuildError(f"the reference cannot run: {error}") from error
    try:
        store = EngineStore(Path(target.store))
        return found, str(store.keep_as_is(target.model, target.version, as_is_digest(target), _files(found)))
    except (StoreError, OSError) as error:
        log.warning("verification.not_kept", extra={"fields": {"model": target.model, "reason": str(error)}})
        return found, ""


def keep_report(folder: Path, found: Report) -> None:
    """Write the report as JSON and as a page. OSError if it cannot be written."""
    for name, data in _files(found).items():
        write_durably(folder / name, data)


def _files(found: Report) -> dict[str, bytes]:
    return {
        REPORT_JSON: msgspec.json.format(msgspec.json.encode(found), indent=1),
        REPORT_PAGE: report.page(found).encode(),
    }
