"""Metrics of the box: one family for every row of `core.quantities`, GPU states, findings, and what Triton says of GPU and CPU.

Families are made from the table, by Prometheus' rules: base units in the name (celsius, watts, hertz, bytes, ratio for percent),
`_total` for counters, labels from the braces. A reading without a value is no series: its name stands in
`appliance_reading_missing` instead. Driven by `metrics` with the monitor's last snapshot.
"""

from __future__ import annotations

import re

import msgspec

from appliance.core import quantities as q
from appliance.core.quantities import QUANTITIES, Quantity, quantity_of
from appliance.core.readings import Gpu, GpuState, Severity, Snapshot
from appliance.observability.families import Family, Sheet

UNITS: dict[str, tuple[str, float]] = {
    "": ("", 1.0),
    "°C": ("celsius", 1.0),
    "MHz": ("hertz", 1e6),
    "W": ("watts", 1.0),
    "J": ("joules", 1.0),
    "V": ("volts", 1.0),
    "B": ("bytes", 1.0),
    "s": ("seconds", 1.0),
    "%": ("ratio", 0.01),
    "rpm": ("rpm", 1.0),
}
"""Our unit -> how a metric's name says it, and what a value is multiplied by. (Prometheus has no base unit of speed.)"""


class _Column(msgspec.Struct, frozen=True):
    family: Family
    scale: float


def _column(quantity: Quantity) -> _Column:
    word, scale = UNITS[quantity.unit]
    parts = [part for part in re.split(r"[._]", re.sub(r"\.\{\w+\}", "", quantity.template)) if part]
    if word:
        parts.append(word)
    if quantity.kind == "counter":
        parts.append("total")
    text = quantity.help + (" (1 is 100 %)" if quantity.unit == "%" else "")
    labels = tuple(re.findall(r"\{(\w+)\}", quantity.template))
    return _Column(Family("_".join(("appliance", *parts)), quantity.kind, text, labels), scale)


COLUMNS: dict[str, _Column] = {template: _column(quantity) for template, quantity in QUANTITIES.items()}
"""By template."""

TRITON_GPU: tuple[tuple[Family, Quantity, float], ...] = (
    (
        Family("nv_gpu_utilization", "gauge", "GPU utilization rate (0.0 - 1.0)", ("gpu_uuid",)),
        q.GPU_UTILIZATION,
        0.01,
    ),
    (
        Family("nv_gpu_memory_total_bytes", "gauge", "GPU total memory, in bytes", ("gpu_uuid",)),
        q.GPU_MEMORY_TOTAL,
        1.0,
    ),
    (
        Family("nv_gpu_memory_used_bytes", "gauge", "GPU used memory, in bytes", ("gpu_uuid",)),
        q.GPU_MEMORY_USED,
        1.0,
    ),
    (Family("nv_gpu_power_usage", "gauge", "GPU power usage in watts", ("gpu_uuid",)), q.GPU_POWER, 1.0),
    (
        Family("nv_gpu_power_limit", "gauge", "GPU power management limit in watts", ("gpu_uuid",)),
        q.GPU_POWER_LIMIT,
        1.0,
    ),
    (
        Family("nv_energy_consumption", "counter", "GPU energy in joules since its driver was loaded", ("gpu_uuid",)),
        q.GPU_ENERGY,
        1.0,
    ),
)
"""Triton's names, labels and units (its docs/user_guide/metrics.md and src/metrics.cc)."""

CPU_UTILIZATION = Family("nv_cpu_utilization", "gauge", "CPU utilization rate (0.0 - 1.0)")
CPU_MEMORY = Family("nv_cpu_memory_total_bytes", "gauge", "CPU total memory (RAM), in bytes")
CPU_MEMORY_USED = Family("nv_cpu_memory_used_bytes", "gauge", "CPU used memory (RAM), in bytes")

MISSING = Family(
    "appliance_reading_missing", "gauge", "1: a reading that should be here has no value now", ("reading",)
)
SILENT = Family(
    "appliance_sensor_silent_seconds",
    "gauge",
    "For how long sensors have owed an answer beyond sensors.deadline_s; 0: they answer (nvml: NVIDIA's driver)",
    ("sensor",),
)
AGE = Family("appliance_readings_age_seconds", "gauge", "Time since the last sample of the sensors")
DURATION = Family("appliance_readings_duration_seconds", "gauge", "How long the last sample of the sensors took")
GPU_INFO = Family("appliance_gpu_info", "gauge", "1 for every GPU: which one it is", ("gpu", "uuid", "name"))
GPU_STATE = Family("appliance_gpu_state", "gauge", "1 for the state that the GPU is in", ("gpu", "state"))
GPU_PROCESSES = Family("appliance_gpu_processes", "gauge", "Processes on the GPU", ("gpu",))
THROTTLE = Family(
    "appliance_gpu_throttle", "gauge", "1: that slows the GPU's clocks now, by NVML's names", ("gpu", "reason")
)
MIG_INSTANCES = Family(
    "appliance_mig_instances", "gauge", "MIG instances of a GPU that is in MIG mode; no series: it is not", ("gpu",)
)
MIG_MEMORY = Family("appliance_mig_memory_total_bytes", "gauge", "Memory of a MIG instance", ("gpu", "mig"))
MIG_MEMORY_USED = Family("appliance_mig_memory_used_bytes", "gauge", "Memory in use of a MIG instance", ("gpu", "mig"))
FINDING = Family(
    "appliance_finding", "gauge", "1: something an operator must know, by its code", ("code", "severity", "subject")
)
FINDINGS = Family("appliance_findings", "gauge", "How many findings there are, by severity", ("severity",))

THROTTLE_REASONS = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
"""NVML's reasons that mean trouble; shown as 0 while they do not hold. What a GPU names beyond them is shown, too."""

FAMILIES = (
    *(family for family, _, _ in TRITON_GPU),
    *(CPU_UTILIZATION, CPU_MEMORY, CPU_MEMORY_USED),
    *(column.family for column in COLUMNS.values()),
    *(GPU_INFO, GPU_STATE, THROTTLE, GPU_PROCESSES, MIG_INSTANCES, MIG_MEMORY, MIG_MEMORY_USED),
    *(FINDING, FINDINGS, MISSING, SILENT, AGE, DURATION),
)


def collect(snapshot: Snapshot, now_s: float, sheet: Sheet) -> None:
    """Everything that snapshot says; `now_s` (monotonic) tells how old it is."""
    for gpu in snapshot.gpus:
        _triton_gpu(gpu, snapshot, sheet)
    _triton_cpu(snapshot, sheet)
    _readings(snapshot, sheet)
    for gpu in snapshot.gpus:
        _gpu(gpu, snapshot, sheet)
    for finding in snapshot.findings:
        sheet.add(FINDING, 1, finding.code, finding.severity, finding.subject)
    for severity in Severity:
        sheet.add(FINDINGS, sum(finding.severity is severity for finding in snapshot.findings), severity)
    for sensor, silent_s in snapshot.silent_s.items():
        sheet.add(SILENT, silent_s, sensor)
    sheet.add(AGE, max(0.0, now_s - snapshot.monotonic_s))
    sheet.add(DURATION, snapshot.duration_s)


def _readings(snapshot: Snapshot, sheet: Sheet) -> None:
    missing = []
    for name, reading in snapshot.readings.items():
        found = quantity_of(name)
        if found is None:
            continue  # not in the table, so nobody knows what it means
        if reading.value is None:
            missing.append(name)
            continue
        column = COLUMNS[found[0].template]
        sheet.add(column.family, _scaled(reading.value, column.scale), *(value for _, value in found[1]))
    for name in missing:
        sheet.add(MISSING, 1, name)


def _scaled(value: float, scale: float) -> float:
    """Rounded to what the sensors can tell, so that 37 % is 0.37 and not 0.37000000000000005."""
    return value if scale == 1.0 else round(value * scale, 9)


def _triton_gpu(gpu: Gpu, snapshot: Snapshot, sheet: Sheet) -> None:
    if not gpu.uuid:
        return
    for family, quantity, scale in TRITON_GPU:
        value = snapshot.value(quantity.name(gpu.index))
        sheet.add(family, None if value is None else _scaled(value, scale), gpu.uuid)


def _triton_cpu(snapshot: Snapshot, sheet: Sheet) -> None:
    load, total = snapshot.value(q.CPU_LOAD.name()), snapshot.value(q.MEMORY_TOTAL.name())
    available = snapshot.value(q.MEMORY_AVAILABLE.name())
    sheet.add(CPU_UTILIZATION, None if load is None else _scaled(load, 0.01))
    sheet.add(CPU_MEMORY, total)
    if total is not None and available is not None:
        sheet.add(CPU_MEMORY_USED, max(0.0, total - available))


def _gpu(gpu: Gpu, snapshot: Snapshot, sheet: Sheet) -> None:
    index = str(gpu.index)
    sheet.add(GPU_INFO, 1, index, gpu.uuid, gpu.name)
    for state in GpuState:
        sheet.add(GPU_STATE, int(gpu.state is state), index, state)
    # a GPU that does not say why it is slow is not one that nothing slows
    told = snapshot.value(q.GPU_EVENT_REASONS.name(gpu.index)) is not None
    for reason in dict.fromkeys((*(THROTTLE_REASONS if told else ()), *gpu.throttle)):
        sheet.add(THROTTLE, int(reason in gpu.throttle), index, reason)
    if gpu.state is GpuState.OK:
        sheet.add(GPU_PROCESSES, len(gpu.processes), index)
    if gpu.mig_mode:
        sheet.add(MIG_INSTANCES, len(gpu.mig), index)
    for slice_ in gpu.mig:
        sheet.add(MIG_MEMORY, slice_.total_bytes, index, str(slice_.index))
        sheet.add(MIG_MEMORY_USED, slice_.used_bytes, index, str(slice_.index))
