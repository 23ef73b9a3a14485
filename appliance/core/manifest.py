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
    """Session options. Thread count 0: chosen from the cores and the instances. Spinning costs idle CPU (docs/performance.md)."""

    intra_op_threads: Threads = 0
    inter_op_threads: Threads = 1
    spinning: bool = False
    graph_optimization: Literal["all", "extended", "basic", "disable"] = "all"


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


class ModelManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model folder's `model.toml`. `engine` is empty: chosen by the file found in the version folder."""

    engine: Literal["", "onnxruntime", "loopback"] = ""
    description: str = ""
    device: Literal["cpu"] = "cpu"
    labels: str = ""
    batching: BatchingManifest = BatchingManifest()
    versions: VersionPolicyManifest = VersionPolicyManifest()
    worker: WorkerManifest = WorkerManifest()
    onnxruntime: OnnxRuntimeManifest = OnnxRuntimeManifest()
    parameters: dict[str, str] = {}
