"""The host: CPU, memory, pressure, network, the wall clock's jumps, and our own processes, from /proc and /sys; once a second.

Cheap files that do not hang; what may hang is read elsewhere (`board.py`, `storage.py`). One sampler, driven by a `lane.Lane`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from appliance.core import quantities as q
from appliance.core.readings import Part, Reading, measured, missing
from appliance.sensors.base import UnreadableError, names_in, read_number, read_reading, read_text
from appliance.sensors.clock import ClockWatch
from appliance.sensors.memory import memory_info
from appliance.sensors.processes import Processes

MAX_LINKS = 32
MAX_CORES = 16
"""Whose clock is read: each is a file, some ask the core itself, and the mean of so many is the mean."""
_CORE = re.compile(r"cpu\d+")
MEMORY = ((q.MEMORY_TOTAL, "MemTotal"), (q.MEMORY_AVAILABLE, "MemAvailable"))


class HostSampler:
    """`wanted` is set from the loop before each sample: name -> pid of our processes."""

    name = "host"
    period_s = 1.0

    def __init__(self, *, root: Path = Path("/"), clock: ClockWatch | None = None) -> None:
        self._root = root
        self._clock = clock or ClockWatch()
        self._cpu: tuple[int, int] | None = None
        self._cores: list[Path] | None = None
        self._readings: dict[str, Reading] = {}
        self._processes = Processes()
        self.wanted: Mapping[str, int] = {}

    def sample(self, now_s: float) -> Part:
        """All of it: nothing here changes so fast that it is worth more than one look a second."""
        self._readings = {}
        self._load(now_s)
        self._clocks(now_s)
        self._memory(now_s)
        self._pressure(now_s)
        self._network(now_s)
        clock = self._clock.sample(now_s)
        return Part(
            self._readings | clock.readings | self._processes.sample(self.wanted, now_s), findings=clock.findings
        )

    def close(self) -> None:
        """Nothing is held."""

    def _load(self, now_s: float) -> None:
        name = q.CPU_LOAD.name()
        try:
            words = read_text(self._root / "proc/stat").split("\n", 1)[0].split()[1:9]
            times = [int(word) for word in words]
            idle, total = times[3] + times[4], sum(times)
        except (UnreadableError, ValueError, IndexError) as error:
            reason = str(error) if isinstance(error, UnreadableError) else "/proc/stat is not as expected"
            self._readings[name] = missing(q.CPU_LOAD, reason, now_s)
            return
        before, self._cpu = self._cpu, (idle, total)
        if before is None:
            self._readings[name] = missing(q.CPU_LOAD, "known from the second sample on", now_s)
        elif total > before[1]:
            busy = 100.0 * (1.0 - (idle - before[0]) / (total - before[1]))
            # iowait may run backwards (proc(5)): a hair outside is the edge
            self._readings[name] = measured(q.CPU_LOAD, min(100.0, max(0.0, busy)), now_s)
        else:
            self._readings[name] = missing(q.CPU_LOAD, "the kernel's counters did not move", now_s)

    def _clocks(self, now_s: float) -> None:
        """The mean over the cores that cpufreq tells of, in kHz; a guest of a hypervisor has none."""
        if self._cores is None:
            folder = self._root / "sys/devices/system/cpu"
            names = [name for name in names_in(folder) if _CORE.fullmatch(name)]
            self._cores = [folder / name / "cpufreq/scaling_cur_freq" for name in names[:MAX_CORES]]
        found, reason = [], "the kernel does not say"
        for file in self._cores:
            try:
                found.append(read_number(file))
            except UnreadableError as error:  # a core may be switched off
                reason = str(error)
        self._readings[q.CPU_CLOCK.name()] = (
            measured(q.CPU_CLOCK, sum(found) / len(found) / 1e3, now_s)
            if found
            else missing(q.CPU_CLOCK, reason, now_s)
        )

    def _memory(self, now_s: float) -> None:
        try:
            info = memory_info(read_text(self._root / "proc/meminfo"))
            reason = "the kernel does not say"
        except UnreadableError as error:
            info, reason = {}, str(error)
        values: list[tuple[q.Quantity, int | None]] = [(quantity, info.get(field)) for quantity, field in MEMORY]
        swap = info["SwapTotal"] - info["SwapFree"] if "SwapTotal" in info and "SwapFree" in info else None
        for quantity, value in (*values, (q.SWAP_USED, swap)):
            reading = missing(quantity, reason, now_s) if value is None else measured(quantity, value, now_s)
            self._readings[quantity.name()] = reading

    def _pressure(self, now_s: float) -> None:
        for resource in ("cpu", "memory", "io"):
            values: dict[str, float] = {}
            try:
                for line in read_text(self._root / "proc/pressure" / resource).splitlines():
                    kind, _, rest = line.partition(" avg10=")
                    values[kind] = float(rest.split(" ", 1)[0])
                reason = "the kernel does not say"
            except UnreadableError as error:
                reason = f"{error} (pressure stall information)"
            except ValueError:
                reason = "the file is not as expected"
            for quantity, kind in ((q.PRESSURE_SOME, "some"), (q.PRESSURE_FULL, "full")):
                value = values.get(kind)
                reading = missing(quantity, reason, now_s) if value is None else measured(quantity, value, now_s)
                self._readings[quantity.name(resource)] = reading
        try:
            average: float | None = float(read_text(self._root / "proc/loadavg").split(" ", 1)[0])
            reason = ""
        except (UnreadableError, ValueError) as error:
            average, reason = None, str(error)
        quantity = q.LOAD_AVERAGE
        self._readings[quantity.name()] = (
            missing(quantity, reason, now_s) if average is None else measured(quantity, average, now_s)
        )

    def _network(self, now_s: float) -> None:
        folder = self._root / "sys/class/net"
        links = [name for name in names_in(folder) if name != "lo" and not name.startswith(("veth", "ifb"))]
        for link in links[:MAX_LINKS]:
            base = folder / link
            rows = (
                (q.NETWORK_CARRIER, "carrier_changes"),
                (q.NETWORK_RECEIVED, "statistics/rx_bytes"),
                (q.NETWORK_SENT, "statistics/tx_bytes"),
            )
            for quantity, file in rows:
                self._readings[quantity.name(link)] = read_reading(quantity, base / file, now_s)
            self._readings[q.NETWORK_UP.name(link)] = self._carrier(base, now_s)
            self._readings[q.NETWORK_ERRORS.name(link)] = self._errors(base / "statistics", now_s)

    def _carrier(self, base: Path, now_s: float) -> Reading:
        try:
            return measured(q.NETWORK_UP, read_number(base / "carrier"), now_s)
        except UnreadableError:  # a link that is switched off answers EINVAL
            return measured(q.NETWORK_UP, 0, now_s)

    def _errors(self, base: Path, now_s: float) -> Reading:
        try:
            total = sum(read_number(base / name) for name in ("rx_errors", "tx_errors", "rx_dropped", "tx_dropped"))
        except UnreadableError as error:
            return missing(q.NETWORK_ERRORS, str(error), now_s)
        return measured(q.NETWORK_ERRORS, total, now_s)
