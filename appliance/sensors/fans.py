"""Fans that stand still where they should turn. Pure; the monitor asks it at each sample.

Cards stop their fans while they are cool, so only one that stands still on a card that is hot is a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from appliance.core import quantities as q
from appliance.core.readings import Finding, Gpu, Reading, Severity

HOT_C = 70.0
"""Cards that stop their fans start them again between 50 and 60 °C."""

ACTION = "Look whether it turns and is clean; let the GPU cool down before it is loaded again."
MAX_FANS = 8
"""Of one card."""


def stopped(readings: Mapping[str, Reading], gpus: Iterable[Gpu]) -> tuple[Finding, ...]:
    """A finding for each GPU that is hot and whose fan stands still."""
    found = []
    for gpu in gpus:
        temperature = readings.get(q.GPU_TEMPERATURE.name(gpu.index))
        if temperature is None or temperature.value is None or temperature.value < HOT_C:
            continue
        fans = (readings.get(q.GPU_FAN.name(gpu.index, fan)) for fan in range(MAX_FANS))
        if any(reading is not None and reading.value == 0 for reading in fans):
            message = f"a fan stands still at {temperature.value:.0f} °C"
            found.append(Finding("gpu-fan-stopped", Severity.WARNING, f"gpu.{gpu.index}", message, ACTION))
    return tuple(found)
