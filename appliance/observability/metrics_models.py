"""Metrics of models and their workers: requests, times, batches, states, refusals, memory.

Triton's names, types and units stay as they are (perf_analyzer and its relatives read them): `nv_inference_*`, microseconds, no
`_total`. Reads live counters and counts nothing. Driven by `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from appliance.core.description import ModelStatistics
from appliance.core.histogram import Histogram
from appliance.core.states import ModelState
from appliance.observability.families import Family, Sheet
from appliance.observability.sources import Source

LABELS = ("model", "version")

COUNTERS: tuple[tuple[Family, Callable[[ModelStatistics], int]], ...] = (
    (
        Family("nv_inference_request_success", "counter", "Successful inference requests", LABELS),
        lambda s: s.success.count,
    ),
    (
        Family("nv_inference_count", "counter", "Inferences performed (rows, not requests)", LABELS),
        lambda s: s.inference_count,
    ),
    (Family("nv_inference_exec_count", "counter", "Batches executed", LABELS), lambda s: s.execution_count),
    (
        Family("nv_inference_request_duration_us", "counter", "Request time, end to end, summed", LABELS),
        lambda s: s.success.ns // 1000,
    ),
    (
        Family("nv_inference_queue_duration_us", "counter", "Time in the queue, summed", LABELS),
        lambda s: s.queue.ns // 1000,
    ),
    (
        Family("nv_inference_compute_input_duration_us", "counter", "Time to place inputs, summed", LABELS),
        lambda s: s.compute_input.ns // 1000,
    ),
    (
        Family("nv_inference_compute_infer_duration_us", "counter", "Time in the engine, summed", LABELS),
        lambda s: s.compute_infer.ns // 1000,
    ),
    (
        Family("nv_inference_compute_output_duration_us", "counter", "Time to place outputs, summed", LABELS),
        lambda s: s.compute_output.ns // 1000,
    ),
    (
        Family("nv_inference_pending_request_count", "gauge", "Requests queued or running", LABELS),
        lambda s: s.pending,
    ),
    (Family("appliance_queue_bytes", "gauge", "Bytes of the requests that wait", LABELS), lambda s: s.pending_bytes),
)
FAILURE = Family("nv_inference_request_failure", "counter", "Failed inference requests, by reason", (*LABELS, "reason"))
HISTOGRAMS: tuple[tuple[Family, Callable[[ModelStatistics], tuple[Histogram, int]]], ...] = (
    (
        Family(
            "appliance_request_duration_seconds",
            "histogram",
            "Successful requests by the time from arrival to answer",
            LABELS,
        ),
        lambda s: (s.request_times, s.success.ns),
    ),
    (
        Family(
            "appliance_queue_duration_seconds",
            "histogram",
            "Successful requests by the time from arrival to dispatch",
            LABELS,
        ),
        lambda s: (s.queue_times, s.queue.ns),
    ),
)
BATCHES = Family(
    "appliance_batches_total", "counter", "Batches executed, by the rows that they held", (*LABELS, "batch_size")
)
REFUSED = Family(
    "appliance_refused_total",
    "counter",
    "Requests refused, by error code; an empty model: there is none of that name",
    ("model", "code"),
)
STATE = Family("appliance_model_state", "gauge", "1 for the state that the version is in", (*LABELS, "state"))
READY = Family("appliance_model_ready", "gauge", "1: the version is READY and a worker of it lives", LABELS)
WORKERS = Family("appliance_workers", "gauge", "Workers that live", LABELS)
WANTED = Family("appliance_workers_wanted", "gauge", "Workers that the model's manifest asks for", LABELS)
RESTARTS = Family("appliance_worker_restarts_total", "counter", "Workers replaced since the version was loaded", LABELS)

PER_WORKER = (*LABELS, "worker")
MEMORY = Family("appliance_worker_resident_memory_bytes", "gauge", "Resident memory of a worker", PER_WORKER)
RUNS = Family("appliance_worker_batches_total", "counter", "Batches that this worker process has run", PER_WORKER)
ARENA = Family("appliance_arena_bytes", "gauge", "Memory shared with a worker", PER_WORKER)
SLOTS = Family("appliance_arena_slots", "gauge", "Batches that fit into that memory", PER_WORKER)
SLOTS_USED = Family("appliance_arena_slots_in_use", "gauge", "Batches that are in it", PER_WORKER)

FAMILIES = (
    *(family for family, _ in COUNTERS),
    FAILURE,
    *(family for family, _ in HISTOGRAMS),
    BATCHES,
    REFUSED,
    *(STATE, READY, WORKERS, WANTED, RESTARTS),
    *(MEMORY, RUNS, ARENA, SLOTS, SLOTS_USED),
)

SERVING = (str(ModelState.READY), str(ModelState.DRAINING))


def collect(source: Source, documents: list[dict[str, Any]], sheet: Sheet) -> None:
    """Everything about models and workers; `documents` are those of the status document."""
    for statistics in source.statistics():
        _statistics(statistics, sheet)
    for (model, code), count in source.refusals().items():
        sheet.add(REFUSED, count, model, code)
    _states(documents, sheet)
    for worker in source.workers():
        labels = (worker.model, worker.version, str(worker.instance))
        # 0: it ended before it could be looked at
        sheet.add(MEMORY, worker.rss_bytes or None, *labels)
        sheet.add(RUNS, worker.batches, *labels)
        sheet.add(ARENA, worker.arena_bytes, *labels)
        sheet.add(SLOTS, worker.slots, *labels)
        sheet.add(SLOTS_USED, worker.slots_in_use, *labels)


def _statistics(statistics: ModelStatistics, sheet: Sheet) -> None:
    labels = (statistics.name, statistics.version)
    for family, number in COUNTERS:
        sheet.add(family, number(statistics), *labels)
    for reason, count in statistics.failures.items():
        sheet.add(FAILURE, count, *labels, reason)
    for family, read in HISTOGRAMS:
        times, total_ns = read(statistics)
        sheet.histogram(family, _buckets(times), total_ns / 1e9, *labels)
    for size, batch in sorted(statistics.batches.items()):
        sheet.add(BATCHES, batch.compute_infer.count, *labels, str(size))


def _buckets(times: Histogram) -> list[tuple[str, int]]:
    """Buckets as Prometheus counts them, in seconds. (Our bounds exclude their own microsecond, its include it.)"""
    found = [(f"{bound / 1e6:g}", count) for bound, count in times.cumulative()]
    return [*found[:-1], ("+Inf", found[-1][1])]


def _states(documents: list[dict[str, Any]], sheet: Sheet) -> None:
    """The state of each version. Of two generations of one version, the one that serves is shown."""
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for document in documents:
        key = (document["name"], document["version"])
        if key not in shown or shown[key]["detail"] not in SERVING or document["detail"] == ModelState.READY:
            shown[key] = document
    for labels, document in shown.items():
        for state in ModelState:
            sheet.add(STATE, int(document["detail"] == state), *labels, str(state))
        sheet.add(READY, int(document["detail"] == ModelState.READY and document["workers"] > 0), *labels)
        sheet.add(WORKERS, document["workers"], *labels)
        sheet.add(WANTED, document["instances"], *labels)
        sheet.add(RESTARTS, document["restarts"], *labels)
