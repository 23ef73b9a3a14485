"""What an engine is found by: the parts of its key, and of the verdict on it. Reads files and metadata, imports no library."""

from __future__ import annotations

import hashlib
import logging
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from appliance.building.builder import RECIPE
from appliance.building.orders import BuildError, Outcome, Target
from appliance.building.store import EngineStore, Entry, StoreError, file_digest, key_digest
from appliance.building.version_files import version_files

log = logging.getLogger(__name__)


def engine_key(target: Target) -> dict[str, str]:
    """Everything that the engine's file depends on. OSError if a file of the model cannot be read."""
    manifest, build = target.manifest, target.manifest.build
    key = {
        "model": target.model,
        "engine": target.engine,
        "precision": manifest.precision,
        "machine": platform.machine(),
        "onnxruntime": library_version("onnxruntime"),
        "onnx": library_version("onnx"),
    }
    files, links = version_files(Path(target.source).parent)
    key |= {f"file {name}": file_digest(file) for name, file in files.items()}
    key |= {f"link {name}": place for name, place in links.items()}
    if manifest.precision == "int8":
        key["calibration"] = (
            f"{build.calibration_method} {build.calibration_samples} {_tree(calibration_folder(target))}"
        )
        key["preprocessing"] = _encode(manifest.preprocessing)
    if target.engine != "onnxruntime":
        key |= shared_key(target)
        key["batch"] = str(manifest.batching.max_batch_size)
        key["build"] = _encode(msgspec.structs.replace(build, calibration="", time_budget_s=1))
        key["tf32"] = str(manifest.onnxruntime.tf32)
    return key


def shared_key(target: Target) -> dict[str, str]:
    """What every plan of this box depends on, and its timings: the library, the platform, the GPU, and how we build.

    Of the driver only the major version counts (tactics are timed on the GPU model; `outcome_of` warns of other changes).
    """
    device = target.device
    return {
        "engine": target.engine,
        "library": library_version(target.engine),
        "cuda": library_version("cuda"),
        "machine": platform.machine(),
        "compute capability": device.compute_capability,
        "gpu": device.name,
        "multiprocessors": str(device.multiprocessors),
        "gpu memory": str(device.memory_bytes),
        "driver": device.driver.partition(".")[0],
        "driver's cuda": device.cuda.partition(".")[0],
        "recipe": RECIPE,
    }


def gate_digest(target: Target) -> str:
    """What a verdict depends on besides the engine: the settings, the golden inputs, the samples, the reference's version.

    And how the engine is run: what is right on the CPU may be wrong on a GPU, or under other settings of its library. Not by how
    many threads, which the worker chooses by the cores that it finds, nor how they wait, nor how much memory it may take.
    """
    manifest, session = target.manifest, target.manifest.onnxruntime
    samples = Path(target.folder, manifest.verify.samples) if manifest.verify.samples else None
    parts = [
        _encode(manifest.verify),
        _encode(manifest.preprocessing),
        _tree(Path(target.folder, "golden")),
        _tree(samples) if samples is not None else "",
        "\n".join(target.labels),
        str(manifest.batching.max_batch_size),
        library_version("onnxruntime"),
        # where the package for GPUs is not installed, "cuda" may have been the CPU
        library_version("onnxruntime-gpu"),
        _encode((manifest.device, manifest.fallback, session.graph_optimization, session.tf32, manifest.parameters)),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def library_version(name: str) -> str:
    """The installed version of an engine's library under any of its package names; "" for none."""
    names = {
        "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
        "tensorrt": ("tensorrt", "tensorrt_cu13_bindings", "tensorrt_cu12_bindings"),
        "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings"),
        "cuda": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12", "cuda-bindings"),
    }
    for package in names.get(name, (name,)):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""


def as_is_digest(target: Target) -> str:
    """What a verdict on a model that serves as it is depends on. OSError if a file of the model cannot be read."""
    serving = _encode(target.manifest.onnxruntime)
    return key_digest(engine_key(target) | {"gate": gate_digest(target), "serving": serving})


def golden_digest(target: Target) -> str:
    """A digest of the golden files' bytes; "" if there are none. OSError if one cannot be read."""
    files = sorted(Path(target.folder, "golden").glob("*.npz"))
    parts = [f"{file.name} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""


def _encode(value: Any) -> str:
    return msgspec.json.encode(value, order="sorted").decode()


def _tree(place: Path | None) -> str:
    """A digest of a folder's files (or one file) by name, size and time."""
    if place is None or not place.exists():
        return ""
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    stamps = [(str(file.relative_to(place.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def calibration_folder(target: Target) -> Path | None:
    """Where calibration samples lie: as the manifest says, else golden inputs, else samples; None if there are none.

    BuildError if the manifest names a place outside the model's folder, or one that is not there.
    """
    folder = Path(target.folder)
    named = target.manifest.build.calibration
    if named:
        place = (folder / named).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise BuildError(f"[build] calibration names {named!r}, outside the model's folder")
        if not place.exists():
            raise BuildError(f"[build] calibration names {named!r}, which is not there")
        return place
    return next((folder / name for name in ("golden", "samples") if any(folder.glob(f"{name}/*"))), None)


def find(target: Target) -> Outcome | None:
    """The engine that is kept for exactly this, if any. BuildError if the model or the store cannot be read."""
    try:
        digest = key_digest(engine_key(target))
        entry = EngineStore(Path(target.store)).find(target.model, digest)
    except (OSError, StoreError) as error:
        raise BuildError(f"the kept engines cannot be read: {error}") from error
    return outcome_of(entry, target, built=False) if entry is not None else None


def outcome_of(entry: Entry, target: Target, *, built: bool) -> Outcome:
    """A kept entry, and what the gate as it is now knows of it."""
    sidecar = entry.sidecar
    if not built and sidecar.driver != target.device.driver:
        fields = {"model": target.model, "built_with": sidecar.driver, "now": target.device.driver}
        log.warning("engine.other_driver", extra={"fields": fields})
    current = sidecar.verified_by == gate_digest(target)
    return Outcome(
        entry.digest,
        sidecar.engine,
        str(entry.model_file),
        str(entry.folder),
        sidecar.label,
        sidecar.verified if current else "",
        sidecar.reason if current else "",
        sidecar.summary if current else "",
        built,
        sidecar.seconds,
    )
