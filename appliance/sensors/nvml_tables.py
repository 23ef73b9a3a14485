"""What NVML is asked for, and how often; which of its bits mean trouble, and what an operator does about them. Tables only.

Read by `nvml.py`. Names and numbers are those of nvml.h; the new call stands first, the one it replaced behind it.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

from appliance.core import quantities as q
from appliance.core.quantities import Quantity
from appliance.core.readings import Finding, Gpu, GpuState, Reading, Severity

Row: TypeAlias = tuple[Quantity, float, tuple[tuple[str, tuple[Any, ...]], ...]]
"""A quantity, what the answer is multiplied by, and the calls (name, arguments after the handle)."""

MAX_GPUS = 64
NONE = 0xFFFFFFFF
NO_VALUE = 0xFFFFFFFFFFFFFFFF
INTEGRATED = re.compile(r"\b(GB10|Thor|Orin|Xavier|Tegra|nvgpu)\b", re.IGNORECASE)
"""Names of GPUs that share the host's memory. No answer of NVML tells it for sure: a failing card, too, says "not supported"."""

THROTTLE = (
    (0x4, "SwPowerCap"),
    (0x8, "HwSlowdown"),
    (0x20, "SwThermalSlowdown"),
    (0x40, "HwThermalSlowdown"),
    (0x80, "HwPowerBrakeSlowdown"),
)
"""Bits of the clocks' event reasons that mean trouble; idling and chosen clocks are left out (nvml.h)."""

RECOVERY = {
    1: ("needs a reset", "Stop the appliance, run `nvidia-smi --gpu-reset`, and start it again."),
    2: ("needs a reboot", "Reboot the box."),
    3: ("must be freed of peer traffic", "Stop the appliance and start it again."),
    4: ("must be freed and reset", "Stop the appliance, run `nvidia-smi --gpu-reset`, and start it again."),
    5: ("needs its IMEX domain recovered", "Restart the IMEX service."),
    6: ("needs a reset of its bus", "Stop the appliance, run `nvidia-smi --gpu-reset`; if that is refused, reboot."),
    7: ("needs a reboot", "Reboot the box."),
}
LOST_ACTION = "Reboot the box. If it comes back, check the card's seat, its power cables and the power supply."
RESET_ACTION = "Stop the appliance, run `nvidia-smi --gpu-reset`, and start it again; if that is refused, reboot."
ECC_ACTION = (
    "Run `nvidia-smi --gpu-reset` at the next stop of the appliance, or reboot; if it comes back, replace the card."
)
ROWS_ACTION = "Reset the GPU at the next stop of the appliance (`nvidia-smi --gpu-reset`), or reboot."
MIG_ACTION = (
    "Make instances (`nvidia-smi mig -cgi PROFILE -C`), or switch MIG off (`nvidia-smi -mig 0`); then start anew."
)
MIG_REASON = "the driver does not tell it while the GPU is cut into MIG instances"

# ten times a second at the most: what the governor judges by, and what changes from one tenth to the next
QUICK: tuple[Row, ...] = (
    (q.GPU_TEMPERATURE, 1, (("nvmlDeviceGetTemperatureV", (0,)), ("nvmlDeviceGetTemperature", (0,)))),
    (q.GPU_MARGIN, 1, (("nvmlDeviceGetMarginTemperature", ()),)),
    (q.GPU_CLOCK_SM, 1, (("nvmlDeviceGetClockInfo", (1,)),)),
    (q.GPU_POWER, 1e-3, (("nvmlDeviceGetPowerUsage", ()),)),
    (
        q.GPU_EVENT_REASONS,
        1,
        (("nvmlDeviceGetCurrentClocksEventReasons", ()), ("nvmlDeviceGetCurrentClocksThrottleReasons", ())),
    ),
)
EVERY_SECOND: tuple[Row, ...] = (
    (q.GPU_CLOCK_GRAPHICS, 1, (("nvmlDeviceGetClockInfo", (0,)),)),
    (q.GPU_CLOCK_MEMORY, 1, (("nvmlDeviceGetClockInfo", (2,)),)),
    (q.GPU_ENERGY, 1e-3, (("nvmlDeviceGetTotalEnergyConsumption", ()),)),
    (q.GPU_PERFORMANCE_STATE, 1, (("nvmlDeviceGetPerformanceState", ()), ("nvmlDeviceGetPowerState", ()))),
    (q.GPU_PCIE_REPLAYS, 1, (("nvmlDeviceGetPcieReplayCounter", ()),)),
    (q.GPU_PCIE_GENERATION, 1, (("nvmlDeviceGetCurrPcieLinkGeneration", ()),)),
    (q.GPU_PCIE_WIDTH, 1, (("nvmlDeviceGetCurrPcieLinkWidth", ()),)),
    (q.GPU_ECC_CORRECTED, 1, (("nvmlDeviceGetTotalEccErrors", (0, 0)),)),
    (q.GPU_ECC_UNCORRECTED, 1, (("nvmlDeviceGetTotalEccErrors", (1, 0)),)),
)
EVERY_MINUTE: tuple[Row, ...] = (
    (q.GPU_SHUTDOWN, 1, (("nvmlDeviceGetTemperatureThreshold", (0,)),)),
    (q.GPU_SLOWDOWN, 1, (("nvmlDeviceGetTemperatureThreshold", (1,)),)),
    (q.GPU_MEMORY_MAX, 1, (("nvmlDeviceGetTemperatureThreshold", (2,)),)),
    (q.GPU_MAX, 1, (("nvmlDeviceGetTemperatureThreshold", (3,)),)),
    (q.GPU_POWER_LIMIT, 1e-3, (("nvmlDeviceGetEnforcedPowerLimit", ()),)),
    (q.GPU_CLOCK_SM_MAX, 1, (("nvmlDeviceGetMaxClockInfo", (1,)),)),
    (q.GPU_PCIE_GENERATION_MAX, 1, (("nvmlDeviceGetMaxPcieLinkGeneration", ()),)),
    (q.GPU_PCIE_WIDTH_MAX, 1, (("nvmlDeviceGetMaxPcieLinkWidth", ()),)),
)
ROWS = (q.GPU_ROWS_CORRECTED, q.GPU_ROWS_UNCORRECTED, q.GPU_ROWS_PENDING, q.GPU_ROWS_FAILED)
MEMORY = (
    (q.GPU_MEMORY_TOTAL, "total"),
    (q.GPU_MEMORY_USED, "used"),
    (q.GPU_MEMORY_FREE, "free"),
    (q.GPU_MEMORY_RESERVED, "reserved"),
)
THERMAL_POLICY = 75
"""NVML_FI_DEV_PERF_POLICY_THERMAL, the sister of 74 (power): ns below the wanted clocks for heat, as nvmlDeviceGetViolationStatus
counts it. Every driver has the number, so it stands for the time slowed by software where the finer ones are not known.
"""
DURATIONS = (q.GPU_SW_THERMAL_TIME, q.GPU_HW_THERMAL_TIME, q.GPU_HW_BRAKE_TIME)


def duration_fields(driver: str) -> tuple[int, int, int] | None:
    """The field numbers of the three slowdown times for that driver; None where nobody knows them.

    NVIDIA renumbered them: 251 to 253 in nvidia-ml-py 13.580, 269 to 271 in 13.615, where 251 is about power smoothing.
    """
    match = re.match(r"(\d+)\.", driver)
    major = int(match[1]) if match else 0
    if major >= 615:
        return (269, 270, 271)
    return (251, 252, 253) if 570 <= major <= 580 else None


def findings(gpus: tuple[Gpu, ...], readings: dict[str, Reading]) -> list[Finding]:
    """What an operator must know of these GPUs."""
    found = []
    for gpu in gpus:
        subject = f"gpu.{gpu.index}"
        asked = readings.get(q.GPU_RECOVERY_ACTION.name(gpu.index))
        words = RECOVERY.get(int(asked.value)) if asked is not None and asked.value else None
        if gpu.state is not GpuState.OK:
            code = "gpu-" + gpu.state.lower().replace("_", "-")
            found.append(Finding(code, Severity.CRITICAL, subject, gpu.reason, words[1] if words else gpu.action))
        elif words is not None:
            found.append(Finding("gpu-recovery", Severity.CRITICAL, subject, f"it {words[0]}", words[1]))
        found += _memory_errors(subject, gpu.index, readings)
        if gpu.mig_mode and not gpu.mig and gpu.state is GpuState.OK:
            text = "MIG is on and there is no instance, so that nothing can run on it"
            found.append(Finding("gpu-mig-empty", Severity.WARNING, subject, text, MIG_ACTION))
    return found


def _memory_errors(subject: str, index: int, readings: dict[str, Reading]) -> list[Finding]:
    """What is known of damaged memory. Corrected errors are only counted: that is what ECC is for."""
    found = []
    errors = readings.get(q.GPU_ECC_UNCORRECTED.name(index))
    if errors is not None and errors.value:
        text = (
            f"{errors.value:.0f} uncorrected memory error{'s' if errors.value > 1 else ''} since the driver was loaded"
        )
        found.append(Finding("gpu-ecc-uncorrected", Severity.WARNING, subject, text, ECC_ACTION))
    pending = readings.get(q.GPU_ROWS_PENDING.name(index))
    if pending is not None and pending.value:
        text = "row remapping pending: a damaged memory row is replaced at the next reset"
        found.append(Finding("gpu-rows-pending", Severity.WARNING, subject, text, ROWS_ACTION))
    failed = readings.get(q.GPU_ROWS_FAILED.name(index))
    if failed is not None and failed.value:
        text = "row remapping failed: a damaged memory row could not be replaced"
        found.append(Finding("gpu-rows-failed", Severity.CRITICAL, subject, text, "Have the card replaced."))
    return found
