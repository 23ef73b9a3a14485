"""Making an engine: the conversion, the build, and the gate, in one place of the store. Runs in a build process.

`orders` says what comes in and goes out, `keys` what an engine is found by, `store` keeps it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from appliance.building import precision, report
from appliance.building.durable import write_durably
from appliance.building.inspect import InspectError, Inspection, inspect
from appliance.building.keys import calibration_folder, engine_key, gate_digest, outcome_of
from appliance.building.orders import CONVERTED, BuildError, DeviceFacts, Outcome, Target
from appliance.building.pictures import SampleError, SampleSource
from appliance.building.store import REPORT_JSON, REPORT_PAGE, EngineStore, StoreError, key_digest, new_sidecar
from appliance.building.verification import Report, VerificationError, VerifyOrder, verify
from appliance.core.errors import ApplianceError
from appliance.core.tensor import TensorSpec, datatype_of
from appliance.engines.base import EngineError, EngineOptions

OnPercent = Callable[[str, float], None]
"""Told the phase, and how much of the whole is done, in percent."""

MODEL_FILE = "model.onnx"
LOG_FILE = "build.log"


def build(target: Target, on_percent: OnPercent, *, force: bool = False) -> Outcome:
    """Make the engine and keep it, or find it kept. BuildError says why it cannot be made; nothing half is left."""
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
            model_file = _make(target, found, staging, on_percent)
            seconds = round(time.monotonic() - begun, 3)
            sidecar = new_sidecar(key, target.engine, target.label, model_file, seconds)
            on_percent("keeping", 99.0)
            return outcome_of(store.commit(staging, target.model, digest, sidecar), target, built=True)
    except (StoreError, precision.PrecisionError, SampleError) as error:
        raise BuildError(str(error)) from error
    except InspectError as error:
        raise BuildError(f"the model {error}") from error
    except OSError as error:
        raise BuildError(f"{error.strerror or type(error).__name__}") from error


def _make(target: Target, found: Inspection, staging: Path, on_percent: OnPercent) -> str:
    """Build into the folder; the name of the file that the engine loads."""
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
        (staging / LOG_FILE).write_text("\n".join(log) + "\n")
        return MODEL_FILE
    return _make_plan(target, found, source, staging, log, on_percent)


def _make_plan(
    target: Target, found: Inspection, source: Path, staging: Path, log: list[str], on_percent: OnPercent
) -> str:
    raise BuildError(f"this release builds no engines for {target.engine}")


def probe(_device: int) -> DeviceFacts:
    """What GPU there is. BuildError if none can be used."""
    raise BuildError("no NVIDIA driver answers on this box")


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
    return (sample.inputs for sample in itertools.islice(source, manifest.build.calibration_samples))


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


def check_as_is(target: Target, on_percent: OnPercent) -> Report:
    """Verify a model that serves as it is: its own provider against the CPU, its rows alone and in batches, its metrics."""
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
        return verify(order, lambda phase, share: on_percent(phase, share * 100))
    except VerificationError as error:
        raise BuildError(str(error)) from error
    except EngineError as error:
        raise BuildError(f"the reference cannot run: {error}") from error


def keep_report(folder: Path, found: Report) -> None:
    """Write the report as JSON and as a page. OSError if it cannot be written."""
    write_durably(folder / REPORT_JSON, msgspec.json.format(msgspec.json.encode(found), indent=1))
    write_durably(folder / REPORT_PAGE, report.page(found).encode())
