"""Every quantity that is read, once: its dotted name, unit, meaning, and the range in which a value is believed.

Metrics, the recorder, the page and the documentation are made from this table. A name in braces is a label: the quantity
`gpu.{gpu}.temperature` is read as `gpu.0.temperature`. Ranges are what hardware can do, not what is healthy: outside them the
sensor lies (drivers have said -256 °C and 65535 W). Sampled by `appliance.sensors`; pure.
"""

from __future__ import annotations

import functools
import re
from typing import Literal

import msgspec

Kind = Literal["gauge", "counter"]
ANY = 2.0**64


class Quantity(msgspec.Struct, frozen=True):
    """One row. A counter only grows until a restart of what counts; a gauge moves both ways."""

    template: str
    unit: str
    help: str
    low: float = 0.0
    high: float = ANY
    kind: Kind = "gauge"

    def name(self, *labels: object) -> str:
        """The dotted name with its labels filled in, in the template's order."""
        return _filled(self.template, labels)


def label(text: str) -> str:
    """The text as one part of a dotted name: without dots and blanks, at most 64 characters."""
    return re.sub(r"[^A-Za-z0-9_:-]+", "_", text).strip("_")[:64] or "unnamed"


@functools.lru_cache(maxsize=4096)
def _filled(template: str, labels: tuple[object, ...]) -> str:
    parts = (label(str(text)) for text in labels)
    return re.sub(r"\{\w+\}", lambda _: next(parts), template)


QUANTITIES: dict[str, Quantity] = {}
"""By template, in the order of the table."""


def _add(template: str, unit: str, text: str, low: float = 0.0, high: float = ANY, kind: Kind = "gauge") -> Quantity:
    quantity = Quantity(template, unit, text, low, high, kind)
    QUANTITIES[template] = quantity
    return quantity


_MIB_MAX = 2.0**50

GPU_TEMPERATURE = _add("gpu.{gpu}.temperature", "°C", "Temperature of the GPU", -60, 150)
GPU_MARGIN = _add("gpu.{gpu}.temperature.margin", "°C", "Degrees left before the GPU slows down", -100, 200)
GPU_MEMORY_TEMPERATURE = _add("gpu.{gpu}.temperature.memory", "°C", "Temperature of the GPU's memory", 1, 150)
GPU_SHUTDOWN = _add("gpu.{gpu}.temperature.shutdown", "°C", "Where the GPU switches itself off", 1, 150)
GPU_SLOWDOWN = _add("gpu.{gpu}.temperature.slowdown", "°C", "Where the GPU slows down", 1, 150)
GPU_MEMORY_MAX = _add("gpu.{gpu}.temperature.memory_max", "°C", "Where hot memory slows the GPU down", 1, 150)
GPU_MAX = _add("gpu.{gpu}.temperature.max", "°C", "Where software begins to slow the GPU down", 1, 150)
GPU_CLOCK_GRAPHICS = _add("gpu.{gpu}.clock.graphics", "MHz", "Clock of the graphics domain", 0, 10_000)
GPU_CLOCK_SM = _add("gpu.{gpu}.clock.sm", "MHz", "Clock of the multiprocessors", 0, 10_000)
GPU_CLOCK_MEMORY = _add("gpu.{gpu}.clock.memory", "MHz", "Clock of the memory", 0, 30_000)
GPU_CLOCK_SM_MAX = _add("gpu.{gpu}.clock.sm_max", "MHz", "Highest clock of the multiprocessors", 1, 10_000)
GPU_PERFORMANCE_STATE = _add("gpu.{gpu}.performance_state", "", "P-state: 0 is the fastest, 15 the slowest", 0, 15)
GPU_EVENT_REASONS = _add("gpu.{gpu}.clock.event_reasons", "", "NVML's bits for why clocks are low", 0, 0xFFFF)
GPU_POWER = _add("gpu.{gpu}.power", "W", "Power drawn by the board", 0, 2000)
GPU_POWER_LIMIT = _add("gpu.{gpu}.power.limit", "W", "Power limit in force", 1, 2000)
GPU_ENERGY = _add("gpu.{gpu}.energy", "J", "Energy since the driver was loaded", kind="counter", high=1e15)
GPU_UTILIZATION = _add("gpu.{gpu}.utilization", "%", "Share of the last period with a kernel running", 0, 100)
GPU_MEMORY_UTILIZATION = _add(
    "gpu.{gpu}.utilization.memory", "%", "Share of the last period with memory traffic", 0, 100
)
GPU_MEMORY_TOTAL = _add("gpu.{gpu}.memory.total", "B", "Memory of the GPU", 1, _MIB_MAX)
GPU_MEMORY_USED = _add("gpu.{gpu}.memory.used", "B", "Memory in use", 0, _MIB_MAX)
GPU_MEMORY_FREE = _add("gpu.{gpu}.memory.free", "B", "Memory free", 0, _MIB_MAX)
GPU_MEMORY_RESERVED = _add("gpu.{gpu}.memory.reserved", "B", "Memory kept by driver and firmware", 0, _MIB_MAX)
GPU_FAN = _add("gpu.{gpu}.fan.{fan}", "%", "Speed that the fan is told to run at", 0, 150)
GPU_PCIE_REPLAYS = _add("gpu.{gpu}.pcie.replays", "", "PCIe packets sent again", kind="counter", high=2.0**53)
GPU_PCIE_GENERATION = _add("gpu.{gpu}.pcie.generation", "", "PCIe generation of the link now", 1, 10)
GPU_PCIE_GENERATION_MAX = _add("gpu.{gpu}.pcie.generation_max", "", "PCIe generation that the link can do", 1, 10)
GPU_PCIE_WIDTH = _add("gpu.{gpu}.pcie.width", "", "Lanes of the link now", 1, 32)
GPU_PCIE_WIDTH_MAX = _add("gpu.{gpu}.pcie.width_max", "", "Lanes that the link can have", 1, 32)
GPU_ECC_CORRECTED = _add(
    "gpu.{gpu}.ecc.corrected", "", "Corrected memory errors since the driver was loaded", kind="counter"
)
GPU_ECC_UNCORRECTED = _add(
    "gpu.{gpu}.ecc.uncorrected", "", "Uncorrected memory errors since the driver was loaded", kind="counter"
)
GPU_ROWS_CORRECTED = _add("gpu.{gpu}.rows.corrected", "", "Memory rows replaced after corrected errors", 0, 1e6)
GPU_ROWS_UNCORRECTED = _add("gpu.{gpu}.rows.uncorrected", "", "Memory rows replaced after uncorrected errors", 0, 1e6)
GPU_ROWS_PENDING = _add("gpu.{gpu}.rows.pending", "", "1: rows are replaced at the next reset", 0, 1)
GPU_ROWS_FAILED = _add("gpu.{gpu}.rows.failed", "", "1: a row could not be replaced", 0, 1)
GPU_RECOVERY_ACTION = _add("gpu.{gpu}.recovery_action", "", "What the driver asks for; 0: nothing", 0, 7)
GPU_SW_POWER_TIME = _add(
    "gpu.{gpu}.throttled.sw_power", "s", "Time slowed by the power limit", kind="counter", high=1e10
)
GPU_SW_THERMAL_TIME = _add(
    "gpu.{gpu}.throttled.sw_thermal", "s", "Time slowed by software for heat", kind="counter", high=1e10
)
GPU_HW_THERMAL_TIME = _add(
    "gpu.{gpu}.throttled.hw_thermal", "s", "Time slowed by hardware for heat", kind="counter", high=1e10
)
GPU_HW_BRAKE_TIME = _add(
    "gpu.{gpu}.throttled.hw_power_brake", "s", "Time slowed by the power brake", kind="counter", high=1e10
)

CPU_LOAD = _add("host.cpu.load", "%", "Share of all cores that was busy", 0, 100)
CPU_CLOCK = _add("host.cpu.clock", "MHz", "Mean clock of the cores", 1, 20_000)
LOAD_AVERAGE = _add("host.cpu.load_average", "", "Runnable threads, mean of a minute", 0, 1e6)
MEMORY_TOTAL = _add("host.memory.total", "B", "Memory of the host", 1, _MIB_MAX)
MEMORY_AVAILABLE = _add("host.memory.available", "B", "Memory that can be had without swapping", 0, _MIB_MAX)
SWAP_USED = _add("host.memory.swap_used", "B", "Swap in use", 0, _MIB_MAX)
PRESSURE_SOME = _add("host.pressure.{resource}.some", "%", "Time that some task waited, mean of 10 s", 0, 100)
PRESSURE_FULL = _add("host.pressure.{resource}.full", "%", "Time that all tasks waited, mean of 10 s", 0, 100)
HOST_TEMPERATURE = _add("host.temperature.{sensor}", "°C", "Temperature by a sensor of the board", -60, 150)
HOST_CRITICAL = _add("host.temperature.{sensor}.critical", "°C", "Where that sensor's chip counts as too hot", 1, 200)
RAPL_ENERGY = _add("host.rapl.{zone}.energy", "J", "Energy counted by the processor", kind="counter", high=1e12)
RAPL_RANGE = _add("host.rapl.{zone}.range", "J", "Where that counter starts over", 0, 1e12)
HOST_FAN = _add("host.fan.{fan}", "rpm", "Speed of a fan", 0, 100_000)
HOST_FAN_DUTY = _add("host.fan.{fan}.duty", "%", "What a fan is told to do", 0, 100)
RAIL_POWER = _add("host.rail.{rail}.power", "W", "Power of a supply rail", 0, 1000)
RAIL_VOLTAGE = _add("host.rail.{rail}.voltage", "V", "Voltage of a supply rail", 0, 100)
POWER_MODE = _add("host.power_mode", "", "Number of the board's power mode (nvpmodel)", 0, 100)
DISK_FREE = _add("host.disk.{disk}.free", "B", "Free space where we write", 0, 2.0**60)
DISK_TOTAL = _add("host.disk.{disk}.total", "B", "Size of the file system where we write", 1, 2.0**60)
DISK_READ = _add("host.drive.{drive}.read", "B", "Bytes read since the boot", kind="counter")
DISK_WRITTEN = _add("host.drive.{drive}.written", "B", "Bytes written since the boot", kind="counter")
DISK_WEAR = _add("host.drive.{drive}.wear", "%", "Share of the drive's rated life that is used", 0, 255)
NETWORK_UP = _add("host.network.{link}.up", "", "1: the link has a carrier", 0, 1)
NETWORK_CARRIER = _add("host.network.{link}.carrier_changes", "", "How often the link came or went", kind="counter")
NETWORK_RECEIVED = _add("host.network.{link}.received", "B", "Bytes received", kind="counter")
NETWORK_SENT = _add("host.network.{link}.sent", "B", "Bytes sent", kind="counter")
NETWORK_ERRORS = _add("host.network.{link}.errors", "", "Packets damaged or dropped, both ways", kind="counter")
CLOCK_STEPS = _add("host.clock.steps", "", "Jumps of the wall clock since the start", kind="counter")
CLOCK_STEP = _add("host.clock.step", "s", "The last jump of the wall clock", -1e11, 1e11)
CLOCK_SYNCHRONIZED = _add("host.clock.synchronized", "", "1: the kernel's clock is disciplined", 0, 1)
CLOCK_ERROR = _add("host.clock.error", "s", "Largest error of the wall clock, as the kernel estimates it", 0, 1e5)

PROCESS_RSS = _add("process.{process}.rss", "B", "Resident memory", 0, _MIB_MAX)
PROCESS_CPU = _add("process.{process}.cpu", "%", "CPU time in percent of one core", 0, 1e5)
PROCESS_FDS = _add("process.{process}.fds", "", "Open file descriptors", 0, 1e7)
PROCESS_THREADS = _add("process.{process}.threads", "", "Threads", 0, 1e6)

_PATTERNS = tuple(
    (re.compile("^" + re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[A-Za-z0-9_:-]+)", re.escape(template)) + "$"), quantity)
    for template, quantity in QUANTITIES.items()
)


@functools.lru_cache(maxsize=4096)
def quantity_of(name: str) -> tuple[Quantity, tuple[tuple[str, str], ...]] | None:
    """The row for a dotted name and its labels: `gpu.0.power` -> (GPU_POWER, (("gpu", "0"),)); None if there is none."""
    for pattern, quantity in _PATTERNS:
        if match := pattern.match(name):
            return quantity, tuple(match.groupdict().items())
    return None
