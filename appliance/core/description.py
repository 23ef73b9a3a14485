"""What the house says about itself and its models: values that `service` gives and `protocols` writes down.

No wire format here; `protocols` chooses field names and spelling for each face.
"""

from __future__ import annotations

import msgspec

from appliance.core.histogram import Histogram, RecentTimes
from appliance.core.request import ModelName, Version
from appliance.core.tensor import TensorSpec


class ServerDescription(msgspec.Struct, frozen=True):
    """Name, release and the protocol extensions that really exist here. `boot_id` changes with every start."""

    name: str
    version: str
    extensions: tuple[str, ...]
    boot_id: str


class ModelDescription(msgspec.Struct, frozen=True):
    """One model version as clients see it. Specs include the batch axis; `max_batch_size` 0 means unbatched.

    `paying_batch_sizes` are the sizes the scheduler uses; `provider` is what really runs it (e.g. CPUExecutionProvider).
    `engine` is what was built of it ("int8", "tensorrt fp16"; empty: it runs as it is), `verification` what its check found.
    """

    name: ModelName
    version: Version
    versions: tuple[Version, ...]
    platform: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    max_queue_delay_us: int
    instances: int
    device: str
    provider: str
    labels: tuple[str, ...] = ()
    description: str = ""
    unbatched_reason: str = ""
    paying_batch_sizes: tuple[int, ...] = ()
    engine: str = ""
    verification: str = ""
    parameters: dict[str, str] = {}


class DurationStatistic(msgspec.Struct):
    """How often, and how long in all (nanoseconds)."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count `count` more occurrences that took `ns` together."""
        self.count += count
        self.ns += ns


class BatchStatistic(msgspec.Struct):
    """Executions of one batch size, by phase."""

    batch_size: int
    compute_input: DurationStatistic
    compute_infer: DurationStatistic
    compute_output: DurationStatistic


class ModelStatistics(msgspec.Struct):
    """Triton's statistics of one model version: live counters, written by the scheduler, read by everyone.

    `failures` counts by reason: REJECTED (not admitted), CANCELED, BACKEND (the engine), OTHER. The histograms hold successful
    requests: the whole time (`request_times`, and `recent_times` of the last minute) and that in the queue.
    """

    name: ModelName
    version: Version
    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: DurationStatistic = msgspec.field(default_factory=DurationStatistic)
    fail: DurationStatistic = msgspec.field(default_factory=DurationStatistic)
    queue: DurationStatistic = msgspec.field(default_factory=DurationStatistic)
    compute_input: DurationStatistic = msgspec.field(default_factory=DurationStatistic)
    compute_infer: DurationStatistic = msgspec.field(default_factory=DurationStatistic)
    compute_output: DurationStatistic = msgspec.field(default_factory=DurationStatistic)
    failures: dict[str, int] = msgspec.field(
        default_factory=lambda: {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0}
    )
    batches: dict[int, BatchStatistic] = msgspec.field(default_factory=dict)
    pending: int = 0
    pending_bytes: int = 0
    request_times: Histogram = msgspec.field(default_factory=Histogram)
    queue_times: Histogram = msgspec.field(default_factory=Histogram)
    recent_times: RecentTimes = msgspec.field(default_factory=RecentTimes)


class IndexEntry(msgspec.Struct, frozen=True):
    """One line of the repository index. `state` is Triton's word, or empty for a model nobody asked to load."""

    name: ModelName
    version: str
    state: str
    reason: str


class VerificationRecord(msgspec.Struct, frozen=True):
    """What the gate found: of which engine (empty: of the model as it is), its key in the store, and the report as JSON.

    `serves` False: of an engine that was built and must not serve.
    """

    model: ModelName
    version: Version
    engine: str
    key: str
    serves: bool
    report: msgspec.Raw


class WorkerDescription(msgspec.Struct, frozen=True):
    """One worker process as `appliance ps` shows it. `details` are the engine's own: threads, nodes by provider, a fallback.

    `arena_bytes` is the memory shared with it, which holds `slots` batches. `configured_device` is what the manifest asks for,
    `device` where the engine says that it runs.
    """

    model: str
    version: str
    instance: int
    pid: int
    state: str
    provider: str
    restarts: int
    rss_bytes: int
    batches: int
    batch_size_cap: int
    batch_ms: dict[str, float] = {}
    engine: str = ""
    details: dict[str, str] = {}
    arena_bytes: int = 0
    slots: int = 0
    slots_in_use: int = 0
    configured_device: str = ""
    device: str = ""
