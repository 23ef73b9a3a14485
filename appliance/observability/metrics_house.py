"""Metrics of the appliance itself: its release, readiness and events, its faces, the governor, energy, and the flight recorder.

Reads live counters and counts nothing. Driven by `metrics`, with what `daemon` has connected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from appliance import __version__
from appliance.observability.energy_totals import Total
from appliance.observability.families import Family, Sheet
from appliance.observability.sources import HttpCounters, Judgement, RecorderState

BUILD_INFO = Family("appliance_build_info", "gauge", "1: the running release", ("release",))
UPTIME = Family("appliance_uptime_seconds", "gauge", "Seconds since the start")
READY = Family("appliance_ready", "gauge", "1: every required model answers")
DRAINING = Family("appliance_draining", "gauge", "1: it is about to stop, and refuses what is new")
EVENTS = Family("appliance_events_total", "counter", "Events by topic", ("topic",))

HTTP_RESPONSES = Family("appliance_http_responses_total", "counter", "HTTP responses by status code", ("code",))
HTTP_REFUSALS = Family(
    "appliance_http_refusals_total", "counter", "What HTTP's own limits refused, by reason", ("reason",)
)
HTTP_CONNECTIONS = Family("appliance_http_connections", "gauge", "Open HTTP connections")
HTTP_BYTES_IN_FLIGHT = Family(
    "appliance_http_bytes_in_flight", "gauge", "Bytes of HTTP requests being read or answered"
)

ZMQ: dict[str, Family] = {
    counter: Family(f"appliance_zmq_{counter}_total", "counter", text)
    for counter, text in (
        ("messages_received", "Messages received over ZeroMQ"),
        ("messages_unreadable", "Messages dropped without an answer"),
        ("messages_malformed", "Messages refused by the codec"),
        ("requests_busy", "Requests refused by ZeroMQ's own limits"),
        ("replies_sent", "Replies sent"),
        ("replies_delayed", "Replies that waited for a peer to read"),
        ("replies_dropped", "Replies dropped since a peer did not read"),
        ("peers_gone", "Replies whose peer was gone"),
        ("events_published", "Events published"),
        ("events_failed", "Events that could not be published"),
        ("handler_faults", "Messages that met a bug of ours"),
    )
}
"""By the name of the counter."""

LEVEL = Family("appliance_governor_level", "gauge", "Level of the thermal governor: 0 nominal to 3 critical")
LEVELS = Family("appliance_governor_state", "gauge", "1 for the level that the governor is at", ("level",))
MAX_PRIORITY = Family(
    "appliance_governor_max_priority", "gauge", "Requests with a priority number up to this are admitted"
)
BUILDS = Family("appliance_governor_builds_allowed", "gauge", "1: engines may be built")
CONCURRENCY = Family(
    "appliance_governor_concurrency_ratio", "gauge", "Share of a version's workers that may run at once"
)
BATCH_GROWTH = Family(
    "appliance_governor_batch_growth_ratio", "gauge", "Share of the usual rows that a batch may gather"
)
HOLD = Family(
    "appliance_governor_hold_seconds", "gauge", "How long an operator's hold on the governor still lasts; 0: none"
)
DEVICE_LEVEL = Family("appliance_governor_device_level", "gauge", "The same, device by device", ("device",))
HEADROOM = Family(
    "appliance_governor_headroom_celsius",
    "gauge",
    "Degrees below slowdown, less what the trend will take",
    ("device",),
)

XIDS = Family(
    "appliance_gpu_xids_total", "counter", "Errors that NVIDIA's driver reported, by their number (XID)", ("gpu", "xid")
)

ENERGY = Family(
    "appliance_energy_joules_total",
    "counter",
    "Energy since the start, split into idle, active and unattributed; the parts sum to what the device used, and what has "
    'within="" to what the box used',
    ("device", "source", "estimated", "within", "part"),
)
MODEL_ENERGY = Family(
    "appliance_model_energy_joules_total",
    "counter",
    "The active part of the energy, by model; what is within another device (a Jetson's GPU in its board) is in that one's too",
    ("device", "source", "estimated", "within", "model", "version"),
)

RECORDER_OK = Family("appliance_recorder_ok", "gauge", "1: the flight recorder records; 0: see `appliance status`")
RECORDER_COMMITTED = Family("appliance_recorder_committed_total", "counter", "Records on the disk")
RECORDER_DROPPED = Family("appliance_recorder_dropped_total", "counter", "Records lost")
RECORDER_PRUNED = Family("appliance_recorder_pruned_total", "counter", "Records given up for space")
RECORDER_REFUSED = Family(
    "appliance_recorder_series_refused_total", "counter", "Names of readings beyond the recorder's limit"
)
RECORDER_SET_ASIDE = Family(
    "appliance_recorder_set_aside_total", "counter", "Damaged files that the recorder put away, to go on with a new one"
)
RECORDER_BYTES = Family("appliance_recorder_bytes", "gauge", "What the recorder's file uses")
RECORDER_AGE = Family("appliance_recorder_commit_age_seconds", "gauge", "Time since the recorder's last commit")

FAMILIES = (
    *(BUILD_INFO, UPTIME, READY, DRAINING, EVENTS),
    *(HTTP_RESPONSES, HTTP_REFUSALS, HTTP_CONNECTIONS, HTTP_BYTES_IN_FLIGHT),
    *ZMQ.values(),
    *(LEVEL, LEVELS, MAX_PRIORITY, BUILDS, CONCURRENCY, BATCH_GROWTH, HOLD, DEVICE_LEVEL, HEADROOM),
    *(XIDS, ENERGY, MODEL_ENERGY),
    *(RECORDER_OK, RECORDER_COMMITTED, RECORDER_DROPPED, RECORDER_PRUNED, RECORDER_REFUSED),
    *(RECORDER_SET_ASIDE, RECORDER_BYTES, RECORDER_AGE),
)


def collect_status(status: Mapping[str, Any], sheet: Sheet) -> None:
    """The part `status` of the status document."""
    sheet.add(BUILD_INFO, 1, __version__)
    sheet.add(UPTIME, status.get("uptime_s"))
    sheet.add(READY, int(status.get("ready", False)))
    sheet.add(DRAINING, int(status.get("draining", False)))
    for topic, number in sorted(status.get("events", {}).items()):
        sheet.add(EVENTS, number, topic)


def collect_http(http: HttpCounters, sheet: Sheet) -> None:
    """The HTTP face."""
    for status, count in sorted(http.statuses.items()):
        sheet.add(HTTP_RESPONSES, count, str(status))
    for reason, count in sorted(http.refusals.items()):
        sheet.add(HTTP_REFUSALS, count, reason)
    sheet.add(HTTP_CONNECTIONS, http.connections)
    sheet.add(HTTP_BYTES_IN_FLIGHT, http.bytes_in_flight)


def collect_zmq(counters: Mapping[str, int], sheet: Sheet) -> None:
    """The ZeroMQ face."""
    for name, family in ZMQ.items():
        sheet.add(family, counters.get(name))


def collect_governor(judged: Judgement, sheet: Sheet) -> None:
    """The governor's level, what it holds back, and the devices that it judges."""
    gates = judged.gates
    sheet.add(LEVEL, int(gates.level))
    for level in type(gates.level):
        sheet.add(LEVELS, int(level is gates.level), level.name)
    sheet.add(MAX_PRIORITY, gates.max_priority)
    sheet.add(BUILDS, int(gates.builds))
    sheet.add(CONCURRENCY, gates.concurrency)
    sheet.add(BATCH_GROWTH, gates.batch_growth)
    for device in judged.devices:
        sheet.add(DEVICE_LEVEL, int(device.level), device.device)
        sheet.add(HEADROOM, device.headroom_c, device.device)


def collect_xids(xids: Mapping[tuple[int, int], int], sheet: Sheet) -> None:
    """What the driver reported, by GPU and number."""
    for (gpu, number), count in sorted(xids.items()):
        sheet.add(XIDS, count, str(gpu), str(number))


def collect_energy(totals: Iterable[Total], sheet: Sheet) -> None:
    """Energy by part and by model."""
    for total in totals:
        labels = (total.device, total.source, str(total.estimated).lower(), total.within)
        if total.model:
            model, _, version = total.model.rpartition(":")
            sheet.add(MODEL_ENERGY, total.joules, *labels, model, version)
        else:
            sheet.add(ENERGY, total.joules, *labels, total.part)


def collect_recorder(state: RecorderState, now_s: float, sheet: Sheet) -> None:
    """The flight recorder."""
    sheet.add(RECORDER_OK, int(not state.problem))
    sheet.add(RECORDER_COMMITTED, state.committed)
    sheet.add(RECORDER_DROPPED, state.dropped)
    sheet.add(RECORDER_PRUNED, state.pruned)
    sheet.add(RECORDER_REFUSED, state.series_refused)
    sheet.add(RECORDER_SET_ASIDE, state.set_aside)
    sheet.add(RECORDER_BYTES, state.bytes)
    if state.committed_at_s is not None:
        sheet.add(RECORDER_AGE, max(0.0, now_s - state.committed_at_s))
