"""Every metric's name, once, and how it is read from live counters when somebody asks.

Nothing is counted here: the scheduler's statistics are the counters, so that a request costs no metric calls. Triton's names and
formats are kept where they exist: tools that know Triton read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance import __version__
from appliance.core.description import ModelStatistics, WorkerDescription
from appliance.core.histogram import Histogram

LABELS = ("model", "version")

REQUEST_SUCCESS = "nv_inference_request_success"
REQUEST_FAILURE = "nv_inference_request_failure"
INFERENCE_COUNT = "nv_inference_count"
EXECUTION_COUNT = "nv_inference_exec_count"
PENDING = "nv_inference_pending_request_count"
DURATIONS: tuple[tuple[str, str, Callable[[ModelStatistics], int]], ...] = (
    ("nv_inference_request_duration_us", "Request time, end to end, summed", lambda s: s.success.ns),
    ("nv_inference_queue_duration_us", "Time in the queue, summed", lambda s: s.queue.ns),
    ("nv_inference_compute_input_duration_us", "Time to place inputs, summed", lambda s: s.compute_input.ns),
    ("nv_inference_compute_infer_duration_us", "Time in the engine, summed", lambda s: s.compute_infer.ns),
    ("nv_inference_compute_output_duration_us", "Time to place outputs, summed", lambda s: s.compute_output.ns),
)
HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStatistics], tuple[Histogram, int]]], ...] = (
    (
        "appliance_request_duration_seconds",
        "Successful requests by the time from arrival to answer",
        lambda s: (s.request_times, s.success.ns),
    ),
    (
        "appliance_queue_duration_seconds",
        "Successful requests by the time from arrival to dispatch",
        lambda s: (s.queue_times, s.queue.ns),
    ),
)
BUILD_INFO = "appliance_build_info"
UPTIME = "appliance_uptime_seconds"
READY = "appliance_ready"
EVENTS = "appliance_events_total"
WORKER_RSS = "appliance_worker_resident_memory_bytes"
WORKER_RESTARTS = "appliance_worker_restarts"
BATCHES = "appliance_worker_batches"
HTTP_RESPONSES = "appliance_http_responses_total"
HTTP_REFUSALS = "appliance_http_refusals_total"
HTTP_CONNECTIONS = "appliance_http_connections"
HTTP_BYTES_IN_FLIGHT = "appliance_http_bytes_in_flight"


class Source(Protocol):
    """Where numbers come from: the service, seen from below."""

    def statistics(self) -> list[ModelStatistics]:
        """Live counters of every served version."""

    def workers(self) -> list[WorkerDescription]:
        """The worker processes."""

    def snapshot(self) -> dict[str, Any]:
        """The status document."""


class HttpCounters(Protocol):
    """The HTTP face's own counters."""

    statuses: dict[int, int]
    refusals: dict[str, int]
    bytes_in_flight: int

    @property
    def connections(self) -> int:
        """Open connections."""


def _counter(name: str, documentation: str) -> Metric:
    """A counter whose samples have exactly this name: Triton's carry no `_total`, which the library's own class would add."""
    return Metric(name.removesuffix("_total"), documentation, "counter")


def _buckets(times: Histogram, total_ns: int) -> tuple[list[tuple[str, float]], float]:
    """Buckets as Prometheus counts them, in seconds, and the sum. (Our bounds exclude their own microsecond, its include it.)"""
    found = [(f"{bound / 1e6:g}", float(count)) for bound, count in times.cumulative()]
    return [*found[:-1], ("+Inf", found[-1][1])], total_ns / 1e9


class Metrics(Collector):
    """The registry of this process."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.http: HttpCounters | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering must not read the counters."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric, now."""
        yield from self._models(self._source.statistics())
        yield from self._house()
        if self.http is not None:
            yield from self._http(self.http)

    def _http(self, http: HttpCounters) -> Iterator[Metric]:
        responses = _counter(HTTP_RESPONSES, "HTTP responses by status code")
        for status, count in sorted(http.statuses.items()):
            responses.add_sample(HTTP_RESPONSES, {"code": str(status)}, count)
        yield responses
        refusals = _counter(HTTP_REFUSALS, "What HTTP's own limits refused, by reason")
        for reason, count in sorted(http.refusals.items()):
            refusals.add_sample(HTTP_REFUSALS, {"reason": reason}, count)
        yield refusals
        yield GaugeMetricFamily(HTTP_CONNECTIONS, "Open HTTP connections", value=http.connections)
        yield GaugeMetricFamily(
            HTTP_BYTES_IN_FLIGHT, "Bytes of HTTP requests being read or answered", value=http.bytes_in_flight
        )

    def _models(self, models: list[ModelStatistics]) -> Iterator[Metric]:
        success = _counter(REQUEST_SUCCESS, "Successful inference requests")
        failure = _counter(REQUEST_FAILURE, "Failed inference requests, by reason")
        count = _counter(INFERENCE_COUNT, "Inferences performed (rows, not requests)")
        executions = _counter(EXECUTION_COUNT, "Batches executed")
        pending = GaugeMetricFamily(PENDING, "Requests queued or running", labels=LABELS)
        durations = [(_counter(name, text), read) for name, text, read in DURATIONS]
        histograms = [(HistogramMetricFamily(name, text, labels=LABELS), read) for name, text, read in HISTOGRAMS]
        for model in models:
            labels = {"model": model.name, "version": model.version}
            success.add_sample(REQUEST_SUCCESS, labels, model.success.count)
            count.add_sample(INFERENCE_COUNT, labels, model.inference_count)
            executions.add_sample(EXECUTION_COUNT, labels, model.execution_count)
            pending.add_metric((model.name, model.version), model.pending)
            for reason, number in model.failures.items():
                failure.add_sample(REQUEST_FAILURE, {**labels, "reason": reason}, number)
            for metric, read in durations:
                metric.add_sample(metric.name, labels, read(model) // 1000)
            for histogram, times in histograms:
                histogram.add_metric((model.name, model.version), *_buckets(*times(model)))
        yield from (success, failure, count, executions, pending)
        yield from (metric for metric, _ in durations)
        yield from (histogram for histogram, _ in histograms)

    def _house(self) -> Iterator[Metric]:
        status = self._source.snapshot()["status"]
        build = GaugeMetricFamily(BUILD_INFO, "The running release", labels=("release",))
        build.add_metric((__version__,), 1)
        yield build
        yield GaugeMetricFamily(UPTIME, "Seconds since the start", value=status.get("uptime_s", 0))
        yield GaugeMetricFamily(READY, "Whether every required model answers", value=int(status.get("ready", False)))
        events = _counter(EVENTS, "Events by topic")
        for topic, number in sorted(status.get("events", {}).items()):
            events.add_sample(EVENTS, {"topic": topic}, number)
        yield events
        labels = ("model", "version", "instance")
        memory = GaugeMetricFamily(WORKER_RSS, "Resident memory of a worker", labels=labels)
        batches = GaugeMetricFamily(BATCHES, "Batches that this worker process has run", labels=labels)
        restarts = GaugeMetricFamily(WORKER_RESTARTS, "Workers replaced since the version was loaded", labels=LABELS)
        for worker in self._source.workers():
            values = (worker.model, worker.version, str(worker.instance))
            memory.add_metric(values, worker.rss_bytes)
            batches.add_metric(values, worker.batches)
            if worker.instance == 0:
                restarts.add_metric(values[:2], worker.restarts)
        yield from (memory, batches, restarts)

    def render(self) -> bytes:
        """The text that Prometheus reads. Counters and sizes as plain digits: perf_analyzer reads no exponents."""
        return b"\n".join(_plain(line) for line in generate_latest(self._registry).split(b"\n"))


def _plain(line: bytes) -> bytes:
    """A line as Triton would write it: no exponents, and the library's `_total` taken off Triton's names."""
    if line.startswith(b"#"):
        word, _, rest = line[2:].partition(b" ")
        name, _, text = rest.partition(b" ")
        if name.startswith(b"nv_"):
            return b"# %b %b %b" % (word, name.removesuffix(b"_total"), text)
        return line
    head, _, value = line.rpartition(b" ")
    if b"e+" in value or value.endswith(b".0"):
        return head + b" " + str(int(float(value))).encode()
    if b"e-" in value:
        return head + b" %.9f" % float(value)
    return line
