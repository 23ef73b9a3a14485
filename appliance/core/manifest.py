"""What `model.toml` may say. Everything has a default; most models need no file at all.

Pure structs: `lifecycle.repository` reads and checks the files. Unknown keys are refused there, with line and nearest key.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Threads = Annotated[int, msgspec.Meta(ge=0, le=1024)]


class BatchingManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Dynamic batching and the queue before it.

    `max_batch_size` 0 means: up to 32 if the model's batch axis is free, else unbatched. `max_queue_delay_ms` is how long a
    request may wait for company while a worker is idle (timer grain 1 ms). Of the sizes up to `max_batch_size` only those that
    warm-up found to pay are used, unless `only_paying_sizes` is false.
    """

    max_batch_size: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    max_queue_delay_ms: Annotated[float, msgspec.Meta(ge=0, le=10_000)] = 0.0
    max_queue_size: Positive = 1024
    max_queue_bytes: Positive = 256 << 20
    only_paying_sizes: bool = True
    default_priority: Annotated[int, msgspec.Meta(ge=1, le=16)] = 8
    default_timeout_ms: NonNegative = 0


class VersionPolicyManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which versions on disk are served: the newest `latest`, or all, or exactly those listed."""

    latest: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    all: bool = False
    specific: tuple[Positive, ...] = ()


class OnnxRuntimeManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Session options. Thread count 0: chosen from the cores and the instances. Spinning costs idle CPU (docs/performance.md).

    On a GPU: `gpu_memory_limit_mb` (2**20 bytes) bounds the arena, 0 does not; `tf32` trades ten bits of mantissa for speed.
    """

    intra_op_threads: Threads = 0
    inter_op_threads: Threads = 1
    spinning: bool = False
    graph_optimization: Literal["all", "extended", "basic", "disable"] = "all"
    gpu_memory_limit_mb: NonNegative = 0
    tf32: bool = False


class ShapeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sizes that one input may have, each with its batch axis, for engines that are built for a range (TensorRT profiles).

    `opt` is what the engine is tuned for; empty: `max`.
    """

    min: tuple[Positive, ...]
    max: tuple[Positive, ...]
    opt: tuple[Positive, ...] = ()


class BuildManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an engine is built from the ONNX file. Megabytes are 2**20 bytes; 0 leaves the library's own limit.

    `calibration` is a folder of images or .npz files beside `model.toml`, needed for `precision = "int8"` unless the model comes
    quantized. `optimization_level` is TensorRT's, 0 (fast build) to 5 (fast engine).
    """

    workspace_mb: NonNegative = 1024
    tactic_memory_mb: NonNegative = 0
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    time_budget_s: Positive = 3600
    calibration: str = ""
    calibration_method: Literal["minmax", "entropy", "percentile"] = "minmax"
    calibration_samples: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256
    shapes: dict[str, ShapeRange] = {}


class PreprocessingManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How pictures become this model's image input, for calibration, verification and `infer`.

    Values are (pixel * scale - mean) / std per channel, pixels 0 to 255; for FP inputs `scale` 0 means 1/255, for integer
    inputs 1. `layout` and `channels` empty: read from the input's shape. `input` empty: the first one.
    """

    input: str = ""
    layout: Literal["", "NHWC", "NCHW"] = ""
    channels: Literal["", "L", "RGB", "BGR"] = ""
    resize: Literal["stretch", "letterbox", "crop"] = "stretch"
    scale: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class VerifyManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an engine may differ from the reference by; 0 means the default of its precision (docs/compiling.md).

    `samples` is a folder with one subfolder per label, or an .npz, beside `model.toml`; `metric_drop` is the largest loss of
    accuracy (classification), or growth of the mean squared error (regression), that is accepted, as a share; `mismatch` the
    largest share of unequal elements in outputs of integers, booleans and strings. `ranges` are the lowest and highest values of
    generated inputs by name, as for the ids of an embedding.
    """

    max_absolute: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    mean_absolute: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_relative: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    min_cosine: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    mismatch: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    metric_drop: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    samples: str = ""
    ranges: dict[str, tuple[float, float]] = {}
    inputs: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 16


class WorkerManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a version's worker processes run.

    `run_budget_ms`: a batch that runs longer ends its worker. `busy_poll_us`: how long a worker, and the front while a batch
    is running, polls before it sleeps, when requests come that densely; 0 never polls. `max_output_bytes` bounds what one
    batch may return beyond its arena slot (data-dependent shapes).
    """

    instances: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    isolation: Literal["version", "device"] = "version"
    run_budget_ms: Annotated[int, msgspec.Meta(ge=1, le=3_600_000)] = 10_000
    load_budget_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)] = 120_000
    busy_poll_us: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 600
    max_output_bytes: Positive = 256 << 20
    evictable: bool = False
    recycle: bool = True


class ModelManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model folder's `model.toml`.

    `engine` empty: the fastest that this box has for the device (ONNX Runtime while TensorRT builds). `device` is a contract: a
    model that cannot run there does not become READY, unless `fallback` says where else it may. `precision` "as-is" changes
    nothing in the model.
    """

    engine: Literal["", "onnxruntime", "tensorrt", "tensorrt_rtx", "loopback"] = ""
    description: str = ""
    device: Annotated[str, msgspec.Meta(pattern=r"^(cpu|cuda(:[0-9]{1,2})?)$")] = "cpu"
    fallback: Literal["", "cpu"] = ""
    precision: Literal["as-is", "fp32", "fp16", "bf16", "int8"] = "as-is"
    labels: str = ""
    build: BuildManifest = BuildManifest()
    preprocessing: PreprocessingManifest = PreprocessingManifest()
    verify: VerifyManifest = VerifyManifest()
    batching: BatchingManifest = BatchingManifest()
    versions: VersionPolicyManifest = VersionPolicyManifest()
    worker: WorkerManifest = WorkerManifest()
    onnxruntime: OnnxRuntimeManifest = OnnxRuntimeManifest()
    parameters: dict[str, str] = {}
