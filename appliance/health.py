"""The box's watch over itself: each snapshot of the sensors goes to the governor, the recorder, energy accounts and the status.

Between the sensors, which only measure, and whoever acts or shows; it decides nothing. `daemon` makes and owns it; everything
runs on the event loop. What changes (a finding, a throttle, a driver's event) becomes an event of the house.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from appliance.core import quantities as q
from appliance.core.energy import EnergyMeter, EnergyWindow, Usage, container
from appliance.core.energy_sources import EnergySources
from appliance.core.heat import processor_temperature, thermal_sample
from appliance.core.memory_budget import HOST
from appliance.core.readings import Finding, Gpu, GpuState, MigInstance, Severity, Snapshot
from appliance.core.thermal import ThermalSample
from appliance.lifecycle.memory import resident_bytes
from appliance.lifecycle.model_version import ModelVersion
from appliance.observability.energy_totals import EnergyTotals
from appliance.observability.events import EventBus
from appliance.sensors.monitor import Monitor
from appliance.sensors.nvml_events import DriverEvent

log = logging.getLogger(__name__)

ENERGY_WINDOW_S = 5.0
RECORD_S = 0.95
"""Samples may come ten times a second; the record has one a second."""

NOT_RECORDED = frozenset(
    row.template
    for row in (
        q.GPU_SHUTDOWN, q.GPU_SLOWDOWN, q.GPU_MEMORY_MAX, q.GPU_MAX, q.GPU_CLOCK_SM_MAX, q.GPU_MEMORY_TOTAL,
        q.GPU_PCIE_GENERATION_MAX, q.GPU_PCIE_WIDTH_MAX, q.MEMORY_TOTAL, q.DISK_TOTAL, q.HOST_CRITICAL, q.RAPL_RANGE,
    )
)  # fmt: skip
"""Constants of the hardware: the status has them, and a year of them tells nobody anything."""

ECC_PERIOD_S = 60.0
"""Memory errors may come by the thousand: of each kind an event a minute at most, with how many there were."""

ECC_KINDS = (("corrected", q.GPU_ECC_CORRECTED, "info"), ("uncorrected", q.GPU_ECC_UNCORRECTED, "error"))
GONE = frozenset({GpuState.LOST, GpuState.ABSENT})
SUBJECTS = {"nvml": "NVIDIA driver", "driver": "NVIDIA driver"}

FIGURES = {"governor.level": "", "requests.rate": "1/s", "requests.p99": "us"}
"""What is recorded beside the sensors' readings. And `gpu.N.throttle`: 1 while anything slows its clocks."""


class Record(Protocol):
    """The recorder, as far as this needs it."""

    def record_sample(self, wall: float, monotonic: float, values: Mapping[str, float]) -> None:
        """See `Recorder.record_sample`."""

    def record_energy(self, window: EnergyWindow) -> None:
        """See `Recorder.record_energy`."""


class Judge(Protocol):
    """The governor, as far as this needs it."""

    def observe(self, sample: ThermalSample) -> None:
        """See `Governor.observe`."""

    def condemn(self, devices: Mapping[str, str]) -> None:
        """See `Governor.condemn`."""


class Health:
    """See the module. `attach` when there are models to look after; `document` is its part of the status document."""

    def __init__(self, monitor: Monitor, events: EventBus, *, governor: Judge | None, record: Record | None) -> None:
        self.energy = EnergyTotals()
        self._monitor = monitor
        self._events = events
        self._governor = governor
        self._record = record
        self._generations: Callable[[], Iterable[ModelVersion]] = tuple
        self._figures: Callable[[], dict[str, float]] = dict
        self._meter = EnergyMeter()
        self._sources = EnergySources()
        self._energy_due_s = self._record_due_s = 0.0
        self._findings: dict[tuple[str, str], Finding] = {}
        self._throttle: dict[int, tuple[str, ...]] = {}
        self._mig: dict[int, tuple[str, ...]] = {}
        self.xids: Counter[tuple[int, int]] = Counter()
        self._ecc: dict[tuple[int, str], tuple[float, float]] = {}
        monitor.subscribe(self.take)
        monitor.on_event(self._driver_event)

    @property
    def latest(self) -> Snapshot | None:
        """The last snapshot."""
        return self._monitor.latest

    def attach(
        self, generations: Callable[[], Iterable[ModelVersion]], figures: Callable[[], dict[str, float]]
    ) -> None:
        """Whose energy is accounted, and which figures of the serving are recorded (see FIGURES)."""
        self._generations = generations
        self._figures = figures

    def processes(self) -> dict[str, int]:
        """Our processes by name, for the sensors."""
        found = {"front": os.getpid()}
        for version in self._generations():
            if version.scheduler is not None:
                for instance in version.scheduler.instances.values():
                    found[f"worker:{version.name}:{version.version}:{instance.number}"] = instance.link.pid
        return found

    # --- a snapshot -------------------------------------------------------------------------------------------------------

    def take(self, snapshot: Snapshot) -> None:
        """Hand a snapshot on."""
        if self._governor is not None:
            self._governor.condemn(gone(snapshot))
            self._governor.observe(thermal_sample(snapshot))
        self._tell_findings(snapshot.findings)
        self._tell_throttle(snapshot.gpus)
        self._tell_mig(snapshot.gpus)
        self._tell_memory_errors(snapshot)
        if snapshot.monotonic_s >= self._energy_due_s:
            self._energy_due_s = snapshot.monotonic_s + ENERGY_WINDOW_S
            self._account(snapshot)
        if self._record is not None and snapshot.monotonic_s >= self._record_due_s:
            self._record_due_s = snapshot.monotonic_s + RECORD_S
            self._record.record_sample(snapshot.wall_s, snapshot.monotonic_s, self._values(snapshot))

    def _values(self, snapshot: Snapshot) -> dict[str, float]:
        """What is recorded of it."""
        found = {}
        for name, reading in snapshot.readings.items():
            row = q.quantity_of(name)
            if reading.value is not None and row is not None and row[0].template not in NOT_RECORDED:
                found[name] = reading.value
        for gpu in snapshot.gpus:
            found[f"gpu.{gpu.index}.throttle"] = float(bool(gpu.throttle))
        return found | self._figures()

    def _tell_findings(self, findings: Iterable[Finding]) -> None:
        """An event when one comes, gets worse or better, and when it goes."""
        now = {(finding.code, finding.subject): finding for finding in findings}
        for key, finding in now.items():
            before = self._findings.get(key)
            if before is None or before.severity is not finding.severity:
                self._publish(finding)
        for (code, subject), finding in self._findings.items():
            if (code, subject) not in now:
                log.info("finding.cleared", extra={"fields": {"code": code, "subject": subject}})
                self._events.publish("finding.cleared", code=code, subject=subject, message=_told(finding))
        self._findings = now

    def _publish(self, finding: Finding) -> None:
        fields = {
            "code": finding.code,
            "subject": finding.subject,
            "message": _told(finding),
            "action": finding.action,
            "severity": "error" if finding.severity is Severity.CRITICAL else str(finding.severity),
        }
        level = logging.ERROR if finding.severity is Severity.CRITICAL else logging.WARNING
        log.log(level, "finding.raised", extra={"fields": fields})
        self._events.publish("finding.raised", **fields)

    def _tell_throttle(self, gpus: Iterable[Gpu]) -> None:
        for gpu in gpus:
            before = self._throttle.get(gpu.index, ())
            if set(before) != set(gpu.throttle):
                severity = "warning" if gpu.throttle else "info"
                self._events.publish("gpu.throttle", gpu=gpu.index, reasons=list(gpu.throttle), severity=severity)
            self._throttle[gpu.index] = gpu.throttle

    def _tell_mig(self, gpus: Iterable[Gpu]) -> None:
        """How a GPU is cut: at the first sight of one that is, and at every change."""
        for gpu in gpus:
            if gpu.mig_mode is None:
                continue  # it cannot be cut, or does not tell now
            now = tuple(one.uuid for one in gpu.mig) if gpu.mig_mode else ()
            if now != self._mig.get(gpu.index, ()):
                self._events.publish("gpu.mig", gpu=gpu.index, mode=gpu.mig_mode, instances=list(now))
            self._mig[gpu.index] = now

    def _tell_memory_errors(self, snapshot: Snapshot) -> None:
        """An event when the counters grow. A counter that starts over was reset with its GPU."""
        for gpu in snapshot.gpus:
            for kind, quantity, severity in ECC_KINDS:
                count = snapshot.value(quantity.name(gpu.index))
                if count is None:
                    continue
                told, due_s = self._ecc.setdefault((gpu.index, kind), (count, 0.0))
                if count > told and snapshot.monotonic_s >= due_s:
                    fields = {"gpu": gpu.index, "kind": kind, "more": int(count - told), "count": int(count)}
                    self._events.publish("gpu.ecc", **fields, severity=severity)
                    self._ecc[gpu.index, kind] = (count, snapshot.monotonic_s + ECC_PERIOD_S)
                elif count < told:
                    self._ecc[gpu.index, kind] = (count, due_s)

    def _driver_event(self, event: DriverEvent) -> None:
        row = event.xid
        fields: dict[str, Any] = {"gpu": event.gpu, "kind": event.kind, "data": event.data}
        if event.kind == "xid":
            self.xids[event.gpu, event.data] += 1 + event.suppressed
        if row is not None:
            fields |= {"meaning": row.meaning, "action": row.action}
        if event.suppressed:
            fields["suppressed"] = event.suppressed
        log.error("gpu.event", extra={"fields": fields})
        self._events.publish("gpu.xid" if event.kind == "xid" else "gpu.event", **fields, severity="error")

    # --- energy -----------------------------------------------------------------------------------------------------------

    def _account(self, snapshot: Snapshot) -> None:
        usage: dict[str, dict[str, Usage]] = {}
        for version in self._generations():
            batches = version.statistics.batches.values()
            busy_s = sum(batch.compute_infer.ns for batch in batches) / 1e9
            name = f"{version.name}:{version.version}"
            usage.setdefault(version.device, {})[name] = Usage(busy_s, version.statistics.inference_count)
        for device, reading in self._sources.readings(snapshot).items():
            # what is counted for a whole board is also what the models on its GPU took
            used = [models for at, models in usage.items() if device in (at, container(at, reading.source))]
            merged = {name: one for models in used for name, one in models.items()}
            window = self._meter.observe(snapshot.monotonic_s, device, reading, merged)
            if window is not None:
                self.energy.add(window)
                if self._record is not None:
                    self._record.record_energy(window)

    # --- what others ask --------------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """Readings by name (None where one is missing), GPUs and findings, for the status document."""
        snapshot = self._monitor.latest
        if snapshot is None:
            return {"readings": {}, "gpus": [], "findings": []}
        return {
            "readings": {name: reading.value for name, reading in snapshot.readings.items()},
            "processor_temperature": processor_temperature(snapshot),
            "gpus": [
                {
                    "index": gpu.index,
                    "name": gpu.name,
                    "uuid": gpu.uuid,
                    "state": str(gpu.state),
                    "reason": gpu.reason,
                    "action": gpu.action,
                    "throttle": list(gpu.throttle),
                    "integrated": gpu.integrated,
                    "mig_mode": gpu.mig_mode,
                    "mig": [
                        {"index": one.index, "uuid": one.uuid, "total": one.total_bytes, "used": one.used_bytes}
                        for one in gpu.mig
                    ],
                    "missing": missing_of(snapshot, gpu),
                }
                for gpu in snapshot.gpus
            ],
            "findings": [
                {
                    "code": finding.code,
                    "subject": finding.subject,
                    "severity": "error" if finding.severity is Severity.CRITICAL else str(finding.severity),
                    "text": _told(finding),
                    "fix": finding.action,
                }
                for finding in snapshot.findings
            ],
        }

    def hottest(self) -> float | None:
        """The hottest GPU, or else the processor, in °C; None if nothing tells."""
        snapshot = self._monitor.latest
        if snapshot is None:
            return None
        temperatures = [snapshot.value(q.GPU_TEMPERATURE.name(gpu.index)) for gpu in snapshot.gpus]
        known = [temperature for temperature in temperatures if temperature is not None]
        return max(known) if known else processor_temperature(snapshot)

    def gpu_capacity(self, reserve_mb: int, since_s: float = 0.0) -> dict[str, int]:
        """What models may take of each GPU with memory of its own: what is free now, less the reserve, in bytes.

        Of a GPU in MIG mode a process gets one instance, so it is what is free there; nothing where there is none. Nothing at all
        if the last sample was begun before that monotonic time.
        """
        snapshot = self._monitor.latest
        if snapshot is not None and snapshot.monotonic_s - snapshot.duration_s < since_s:
            return {}
        found = {}
        for gpu in snapshot.gpus if snapshot is not None else ():
            assert snapshot is not None
            free = snapshot.value(q.GPU_MEMORY_FREE.name(gpu.index))
            if gpu.mig_mode:
                free = _free_of(mig_instance(gpu, os.environ.get("CUDA_VISIBLE_DEVICES", "")))
            if free is not None and not gpu.integrated:
                found[f"gpu:{gpu.index}"] = max(0, int(free) - (reserve_mb << 20))
        return found

    def gpu_most(self, reserve_mb: int) -> dict[str, int]:
        """What models could take of each GPU if nothing else used it, less the reserve, in bytes. Not of those in MIG mode."""
        snapshot = self._monitor.latest
        found = {}
        for gpu in snapshot.gpus if snapshot is not None else ():
            assert snapshot is not None
            total = snapshot.value(q.GPU_MEMORY_TOTAL.name(gpu.index))
            if total is not None and not gpu.integrated and not gpu.mig_mode:
                found[f"gpu:{gpu.index}"] = max(0, int(total) - (reserve_mb << 20))
        return found

    def integrated(self) -> frozenset[str]:
        """The GPUs that share the host's memory."""
        snapshot = self._monitor.latest
        return frozenset(f"gpu:{gpu.index}" for gpu in (snapshot.gpus if snapshot else ()) if gpu.integrated)

    def measure(self, pids: Iterable[int]) -> dict[str, int]:
        """What processes hold, in bytes: resident on the host, and on each GPU where the driver says so."""
        wanted = set(pids)
        found = resident_bytes(wanted)
        snapshot = self._monitor.latest
        for gpu in snapshot.gpus if snapshot is not None else ():
            # a GPU in MIG mode may list its instances' processes, or only the instances do
            lists = (gpu.processes, tuple(process for one in gpu.mig for process in one.processes))
            held = [[one.memory_bytes for one in processes if one.pid in wanted] for processes in lists]
            known = [[nbytes for nbytes in sizes if nbytes is not None] for sizes in held]
            if not any(known):
                continue
            # what a GPU takes of the host's memory is not in any process' resident set
            place = HOST if gpu.integrated else f"gpu:{gpu.index}"
            found[place] = found.get(place, 0) + max(map(sum, known))
        return found


def gone(snapshot: Snapshot) -> dict[str, str]:
    """The devices that nothing can run on, and why with what to do; "gpu:*": no process that starts now gets any GPU."""
    found = {f"gpu:{gpu.index}": f"{gpu.reason}. {gpu.action}".strip() for gpu in snapshot.gpus if gpu.state in GONE}
    for finding in snapshot.findings:
        if finding.code == "driver-mismatch":
            found["gpu:*"] = f"{finding.message}. {finding.action}"
    return found


def mig_instance(gpu: Gpu, visible: str) -> MigInstance | None:
    """The instance that CUDA gives a process: the first that $CUDA_VISIBLE_DEVICES names, else the first of all (NVIDIA's MIG
    user guide: one instance for a process). None if there is none.
    """
    named = [one for name in visible.split(",") for one in gpu.mig if one.uuid == name.strip()]
    return next(iter(named or gpu.mig), None)


def _free_of(instance: MigInstance | None) -> int | None:
    if instance is None:
        return 0
    if instance.total_bytes is None:
        return None
    return instance.total_bytes - (instance.used_bytes or 0)


SHOWN = (q.GPU_TEMPERATURE, q.GPU_POWER, q.GPU_MEMORY_USED, q.GPU_UTILIZATION)


def missing_of(snapshot: Snapshot, gpu: Gpu) -> dict[str, str]:
    """Of the few numbers that people look at first: which this GPU does not tell now, and why; by the name after `gpu.N.`."""
    prefix = f"gpu.{gpu.index}."
    names = [quantity.name(gpu.index) for quantity in SHOWN]
    return {name.removeprefix(prefix): snapshot.reason(name) for name in names if snapshot.value(name) is None}


def _told(finding: Finding) -> str:
    return f"{_words(finding.subject)}: {finding.message}"


def _words(subject: str) -> str:
    """A finding's subject as people say it: "GPU 0", "NVIDIA driver", "host"."""
    kind, _, index = subject.partition(".")
    return f"GPU {index}" if kind == "gpu" and index else SUBJECTS.get(subject, subject)
