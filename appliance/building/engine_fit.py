"""Which engines of this box could run a model, and why not: from what is installed and what the file holds; loads neither.

Says "probably" at best: only loading and verifying proves it. It imports neither ONNX Runtime nor TensorRT, so that looking costs
nothing and cannot fail. Driven by `appliance inspect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import msgspec

from appliance.building.inspect import Inspection
from appliance.building.profiles import toml_key

DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvhost-ctrl-gpu"))
"""One of them exists where an NVIDIA driver is loaded: of a card, or of a Jetson."""

CEILINGS = {"1.32": (14, 28)}
"""By release of ONNX Runtime: the newest IR version and opset that it loads. Measured; of releases not listed nothing is said."""

ORT_DOMAINS = frozenset({"com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml"})
"""Operator sets that ONNX Runtime brings besides ONNX's own."""

TRT_DATATYPES = frozenset({"FP32", "FP16", "BF16", "INT8", "UINT8", "INT32", "INT64", "BOOL"})
"""What a network of TensorRT holds (tensorrt.DataType), of those that can be served."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})


class EngineFit(msgspec.Struct, frozen=True):
    """One engine. `model` says whether it could run this one: "probably", "perhaps" or "no", for `reasons`.

    `missing` is what this box lacks for it; nothing, and it is here.
    """

    engine: str
    missing: tuple[str, ...]
    model: str
    reasons: tuple[str, ...]


def engines(
    found: Inspection, version_of: Callable[[str], str] | None = None, driver: bool | None = None
) -> tuple[EngineFit, ...]:
    """Every engine that there is. `version_of` a distribution ("" if absent) and `driver` are read from this box if not given."""
    ask = version_of or installed
    loaded = any(path.exists() for path in DRIVERS) if driver is None else driver
    no_driver = [] if loaded else ["no NVIDIA driver is loaded"]
    cpu, gpu = ask("onnxruntime"), ask("onnxruntime-gpu")
    model, reasons = _onnxruntime(found, gpu or cpu)
    rows = [
        EngineFit("onnxruntime", tuple(_absent(cpu or gpu, "onnxruntime")), model, tuple(reasons)),
        EngineFit("onnxruntime cuda", (*_absent(gpu, "onnxruntime-gpu"), *no_driver), model, tuple(reasons)),
    ]
    model, reasons = _tensorrt(found)
    return (
        *rows,
        *(
            EngineFit(engine, (*_absent(ask(engine), engine), *no_driver), model, tuple(reasons))
            for engine in ("tensorrt", "tensorrt_rtx")
        ),
    )


def installed(name: str) -> str:
    """The version of a distribution, or "?" for a module without one (system packages), or "" if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        modules = (name, f"{name}_bindings") if name.startswith("tensorrt") else ()
        return "?" if any(find_spec(module) is not None for module in modules) else ""


def _absent(version: str, package: str) -> list[str]:
    return [] if version else [f"{package} is not installed"]


def _operators(found: Inspection) -> Iterator[tuple[str, str]]:
    """Domain and name of each, without the model's own functions."""
    for operator in found.operators:
        if operator not in found.functions:
            domain, _, name = operator.rpartition(".")
            yield domain, name


def _few(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _onnxruntime(found: Inspection, version: str) -> tuple[str, list[str]]:
    against, notes = [], []
    ir_version, opset = CEILINGS.get(".".join(version.split(".")[:2]), (0, 0))
    if ir_version and found.ir_version > ir_version:
        against.append(f"IR version {found.ir_version} is newer than the {ir_version} that {version} reads")
    if opset and found.opset > opset:
        against.append(f"opset {found.opset} is newer than the {opset} that {version} reads")
    elif unknown := _unknown(found):
        against.append(f"operators that opset {found.opset} does not have: {_few(unknown)}")
    outside = {f"{domain}.{name}" for domain, name in _operators(found) if domain and domain not in ORT_DOMAINS}
    if outside:
        against.append(f"operators outside ONNX and ONNX Runtime: {_few(outside)}")
    own = {f"{domain}.{name}" for domain, name in _operators(found) if domain in ORT_DOMAINS}
    if own:
        notes.append(f"has operators of ONNX Runtime's own sets, which were not looked up: {_few(own)}")
    if unserved := {kind for kind in found.datatypes if kind.startswith("type ")}:
        notes.append(f"has datatypes that few operators take: {_few(unserved)}")
    return ("no" if against else "perhaps" if notes else "probably"), against + notes


def _unknown(found: Inspection) -> set[str]:
    """Operators of ONNX's own set that this opset lacks, as the package `onnx` knows it; newer opsets are not judged."""
    from onnx import defs

    if not 0 < found.opset <= defs.onnx_opset_version():
        return set()
    unknown = set()
    for domain, name in _operators(found):
        if not domain:
            try:
                defs.get_schema(name, found.opset, "")
            except defs.SchemaError:
                unknown.add(name)
    return unknown


def _tensorrt(found: Inspection) -> tuple[str, list[str]]:
    against, notes = [], []
    datatypes = {"strings" if kind == "BYTES" else kind for kind in found.datatypes if not kind.startswith("type ")}
    if foreign := datatypes - TRT_DATATYPES:
        against.append(f"has datatypes that TensorRT does not know: {_few(foreign)}")
    if outside := {f"{domain}.{name}" for domain, name in _operators(found) if domain}:
        notes.append(f"operators outside ONNX need plugins: {_few(outside)}")
    if unknown := _unknown(found):
        against.append(f"operators that opset {found.opset} does not have: {_few(unknown)}")
    if free := [value.name for value in found.inputs if any(isinstance(size, str) for size in value.shape[1:])]:
        tables = ", ".join(f"[build.shapes.{toml_key(name)}]" for name in free)
        notes.append(f"it leaves sizes free and an engine is built for a range: needs {tables} in model.toml")
    if found.data_dependent:
        notes.append(
            f"sizes depend on values ({', '.join(found.data_dependent)}): served unbatched, if its parser takes them"
        )
    if control := CONTROL_FLOW & set(found.operators):
        notes.append(f"has control flow ({_few(set(control))}), which its parser takes within limits")
    return ("no" if against else "perhaps" if notes else "probably"), against + notes
