"""What is ordered of a build process, and what it answers: the target of a build, the outcome, and the lines between.

Plain structs without any library behind them, so that a daemon that orders a build does not import what builds.
"""

from __future__ import annotations

import msgspec

from appliance.core.manifest import ModelManifest

CONVERTED = ("fp16", "bf16", "int8")
"""The precisions that a graph is converted to; in others it stays as it is."""


class BuildError(Exception):
    """The engine cannot be made; the text says why and what to do."""


class DeviceFacts(msgspec.Struct, frozen=True):
    """The GPU that an engine is built for; all empty on a box without one.

    `driver` is the kernel module's version ("580.95.05"), `cuda` the newest CUDA that it can do ("13.4").
    """

    name: str = ""
    compute_capability: str = ""
    memory_bytes: int = 0
    multiprocessors: int = 0
    driver: str = ""
    cuda: str = ""


class Target(msgspec.Struct, frozen=True):
    """One engine for one model version: where the model lies, and how it is to be run.

    `engine` is onnxruntime, tensorrt or tensorrt_rtx. `folder` is the model's, with golden inputs and samples.
    """

    store: str
    model: str
    version: str
    source: str
    folder: str
    engine: str
    manifest: ModelManifest
    labels: tuple[str, ...] = ()
    device: DeviceFacts = DeviceFacts()

    @property
    def label(self) -> str:
        """What people call it: "int8", "tensorrt fp16"."""
        kind = "" if self.manifest.precision == "as-is" else self.manifest.precision
        return (f"{self.engine} {kind}" if self.engine != "onnxruntime" else kind or "onnxruntime").strip()


class Outcome(msgspec.Struct, frozen=True):
    """An engine that is kept. `verified`: "", "passed" or "failed" under the gate as it is now, with reason and summary."""

    digest: str
    engine: str
    model_file: str
    folder: str
    label: str
    verified: str
    reason: str
    summary: str
    built: bool
    seconds: float


def wanted_engine(manifest: ModelManifest, *, tensorrt: str) -> str:
    """Which engine is to be made ("" for none: the model serves as it is). `tensorrt`: the flavour this box can run, or ""."""
    if manifest.engine == "loopback":
        return ""
    if manifest.device != "cpu" and manifest.engine in ("tensorrt", "tensorrt_rtx"):
        return manifest.engine
    if manifest.device != "cpu" and manifest.engine == "" and tensorrt:
        return tensorrt
    return "onnxruntime" if manifest.precision in CONVERTED else ""


class BuildOrder(msgspec.Struct, frozen=True, tag="build"):
    """Make an engine, unless it is kept; `force` makes it anew."""

    target: Target
    force: bool = False


class CheckOrder(msgspec.Struct, frozen=True, tag="check"):
    """Verify a kept engine; `digest` empty: the model as it serves without one."""

    target: Target
    digest: str


class ProbeOrder(msgspec.Struct, frozen=True, tag="probe"):
    """Look at a GPU."""

    device: int


Order = BuildOrder | CheckOrder | ProbeOrder


class Job(msgspec.Struct, frozen=True):
    """What the process is given: the order, the limit on its memory in MiB (0: none), and whether it gives up what it can."""

    order: Order
    memory_limit_mb: int = 0
    sandbox: bool = True


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far it is."""

    phase: str
    percent: float


class Result(msgspec.Struct, frozen=True, tag="result"):
    """The end. `error` empty: done, with what the order asked for. `report` is a `verification.Report`, undecoded.

    `kept` is the folder of a report on a model as it is; empty if it could not be kept.
    """

    error: str = ""
    outcome: Outcome | None = None
    report: msgspec.Raw = msgspec.Raw(b"null")
    device: DeviceFacts | None = None
    kept: str = ""


Line = Progress | Result
"""What stands on the job's standard output; a Result is the last one."""
