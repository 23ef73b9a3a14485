"""From a snapshot of the sensors to what the governor judges: one device for each GPU, and one for the host's processor.

Pure. The host is as hot as the processor sensor that is nearest to its own limit; drives and radios have sensors, too, and are
no reason to refuse requests.
"""

from __future__ import annotations

import re

from appliance.core import quantities as q
from appliance.core.readings import Gpu, GpuState, Snapshot
from appliance.core.thermal import DeviceSample, ThermalSample, Throttle

PROCESSOR = re.compile(r"cpu|core|k10temp|tctl|tdie|package|pkg|soc|(^|_)tj($|_)", re.IGNORECASE)
"""Names of sensors on a processor: coretemp, k10temp, x86_pkg_temp, cpu-thermal, soc0-thermal, tj-thermal."""

THROTTLES = {
    "SwPowerCap": Throttle.POWER_CAP,
    "HwSlowdown": Throttle.HARDWARE,
    "SwThermalSlowdown": Throttle.THERMAL_SOFTWARE,
    "HwThermalSlowdown": Throttle.THERMAL_HARDWARE,
    "HwPowerBrakeSlowdown": Throttle.POWER_BRAKE,
}
"""NVML's names of the reasons."""

TEMPERATURE_PREFIX = "host.temperature."
ASSUMED_CRITICAL_C = 100.0
"""Of processors that do not tell; only to find the nearest to its limit among several."""


def thermal_sample(snapshot: Snapshot) -> ThermalSample:
    """What the governor is told at that moment."""
    devices = [_gpu(snapshot, gpu) for gpu in snapshot.gpus if gpu.state is not GpuState.ABSENT]
    host = _host(snapshot)
    return ThermalSample(snapshot.monotonic_s, (*devices, *((host,) if host is not None else ())))


def _gpu(snapshot: Snapshot, gpu: Gpu) -> DeviceSample:
    def value(quantity: q.Quantity) -> float | None:
        return snapshot.value(quantity.name(gpu.index))

    temperature = value(q.GPU_TEMPERATURE)
    return DeviceSample(
        device=f"gpu:{gpu.index}",
        temperature_c=temperature,
        margin_c=value(q.GPU_MARGIN),
        slowdown_c=value(q.GPU_SLOWDOWN),
        limit_c=value(q.GPU_MAX),
        throttle=frozenset(THROTTLES[name] for name in gpu.throttle if name in THROTTLES),
        power_w=value(q.GPU_POWER),
        power_limit_w=value(q.GPU_POWER_LIMIT),
        clock_mhz=value(q.GPU_CLOCK_SM),
        max_clock_mhz=value(q.GPU_CLOCK_SM_MAX),
        missing="" if temperature is not None else gpu.reason or snapshot.reason(q.GPU_TEMPERATURE.name(gpu.index)),
    )


def _host(snapshot: Snapshot) -> DeviceSample | None:
    """The processor's hottest sensor by what it has left; None on a box that has none."""
    nearest: tuple[float, float, float | None] | None = None
    reason = ""
    for name, reading in snapshot.readings.items():
        if not name.startswith(TEMPERATURE_PREFIX) or name.endswith(".critical"):
            continue
        if not PROCESSOR.search(name.removeprefix(TEMPERATURE_PREFIX)):
            continue
        if reading.value is None:
            reason = reason or reading.reason
            continue
        critical = snapshot.value(f"{name}.critical")
        left = (critical or ASSUMED_CRITICAL_C) - reading.value
        if nearest is None or left < nearest[0]:
            nearest = (left, reading.value, critical)
    if nearest is None:
        return DeviceSample(device="host", missing=reason) if reason else None
    return DeviceSample(device="host", temperature_c=nearest[1], limit_c=nearest[2])


def processor_temperature(snapshot: Snapshot) -> float | None:
    """In °C; None if nothing tells."""
    host = _host(snapshot)
    return host.temperature_c if host is not None else None
