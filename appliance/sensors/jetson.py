"""A Jetson: its GPU's load and clock by devfreq, supply rails by INA3221, fan, and power mode. Part of the board's sampler.

Orin has no NVML, so its GPU is reported from here; Thor has, with holes that `monitor.py` fills from here. Paths: Jetson Linux
developer guide, and what jetson_stats reads. Values only; a path that is not there is a reading without a value.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from appliance.core import quantities as q
from appliance.core.quantities import Quantity
from appliance.core.readings import Gpu, Part, Reading, missing
from appliance.sensors.base import UnreadableError, attempt, names_in, read_number, read_reading, read_text
from appliance.sensors.nvml import unified_memory

GPU_NODES = frozenset({"gv11b", "gp10b", "ga10b", "gb10b", "gpu"})
_LABEL = re.compile(r"^in(\d+)_label$")
_MODE = re.compile(r"pmode:(\d+)")


class Jetson:
    """`search` finds what there is, `sample` reads it. Nothing at all on other boards."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._model = ""
        self._gpu: Path | None = None
        self._rails: list[tuple[str, Path, str]] = []
        self._fans: list[tuple[str, Path]] = []

    def search(self) -> None:
        """Look which sensors this board has."""
        self._model = ""
        self._gpu, self._rails, self._fans = None, [], []
        try:
            if "nvidia,tegra" not in read_text(self._root / "proc/device-tree/compatible"):
                return
            self._model = read_text(self._root / "proc/device-tree/model")
        except UnreadableError:
            return
        folder = self._root / "sys/class/devfreq"
        candidates = [folder / name for name in names_in(folder)]
        self._gpu = next((path for path in candidates if _is_gpu(path)), None)
        hwmon = self._root / "sys/class/hwmon"
        for chip in names_in(hwmon):
            self._chip(hwmon / chip)

    def _chip(self, chip: Path) -> None:
        try:
            name = read_text(chip / "name")
        except UnreadableError:
            return
        files = names_in(chip)
        if name == "pwmfan" and "pwm1" in files:
            self._fans.append((f"pwmfan_{chip.name}" if self._fans else "pwmfan", chip / "pwm1"))
        if name != "ina3221":
            return
        for file in files:
            match = _LABEL.match(file)
            # channel 7 is the sum of shunt voltages, and NC is not connected
            if match is None or match[1] == "7":
                continue
            try:
                text = read_text(chip / file)
            except UnreadableError:
                continue
            if text and "NC" not in text and "sum" not in text.lower():
                self._rails.append((text, chip, match[1]))

    def sample(self, now_s: float) -> Part:
        """Rails, fan, mode, and the GPU as number 0."""
        if not self._model:
            return Part({})
        readings: dict[str, Reading] = {}
        for text, chip, number in self._rails:
            readings[q.RAIL_VOLTAGE.name(text)] = read_reading(
                q.RAIL_VOLTAGE, chip / f"in{number}_input", now_s, scale=1e-3
            )
            readings[q.RAIL_POWER.name(text)] = attempt(
                q.RAIL_POWER, partial(_milliwatts, chip, number), now_s, scale=1e-3
            )
        for text, path in self._fans:
            readings[q.HOST_FAN_DUTY.name(text)] = read_reading(q.HOST_FAN_DUTY, path, now_s, scale=100 / 255)
        readings[q.POWER_MODE.name()] = attempt(q.POWER_MODE, self._mode, now_s)
        gpus: tuple[Gpu, ...] = ()
        if self._gpu is not None:
            gpus = (Gpu(0, "jetson-gpu", f"{self._model} GPU", integrated=True),)
            readings |= self._gpu_readings(self._gpu, now_s)
        return Part(readings, gpus)

    def _gpu_readings(self, path: Path, now_s: float) -> dict[str, Reading]:
        rows: tuple[tuple[Quantity, Path, float], ...] = (
            (q.GPU_UTILIZATION, path / "device/load", 0.1),
            (q.GPU_CLOCK_GRAPHICS, path / "cur_freq", 1e-6),
            (q.GPU_CLOCK_SM_MAX, path / "max_freq", 1e-6),
        )
        found = {quantity.name(0): read_reading(quantity, file, now_s, scale=scale) for quantity, file, scale in rows}
        found[q.GPU_TEMPERATURE.name(0)] = attempt(q.GPU_TEMPERATURE, self._temperature, now_s, scale=1e-3)
        found[q.GPU_POWER.name(0)] = self._power(now_s)
        memory = unified_memory(0, (), self._root, now_s)
        used = q.GPU_MEMORY_USED
        memory[used.name(0)] = missing(used, "the memory is the host's, and nobody counts the GPU's share", now_s)
        return {**found, **memory}

    def _temperature(self) -> int:
        folder = self._root / "sys/class/thermal"
        for zone in names_in(folder):
            try:
                kind = read_text(folder / zone / "type").lower()
            except UnreadableError:
                continue
            if kind.startswith("gpu"):
                return read_number(folder / zone / "temp")
        raise UnreadableError("no thermal zone of the GPU")

    def _power(self, now_s: float) -> Reading:
        for text, chip, number in self._rails:
            if "GPU" in text.upper():  # VDD_GPU_SOC, VDD_GPU: with the SoC on some boards
                return attempt(q.GPU_POWER, partial(_milliwatts, chip, number), now_s, scale=1e-3)
        return missing(q.GPU_POWER, "no supply rail of the GPU", now_s)

    def _mode(self) -> int:
        if match := _MODE.search(read_text(self._root / "var/lib/nvpmodel/status")):
            return int(match[1])
        raise UnreadableError("nvpmodel's status is not as expected")


def _milliwatts(chip: Path, number: str) -> float:
    """Power of a channel: millivolts times milliamperes."""
    return read_number(chip / f"in{number}_input") * read_number(chip / f"curr{number}_input") / 1000


def _is_gpu(path: Path) -> bool:
    if path.name.startswith(("gpu-gpc", "gpu-nvd")):  # Thor
        return path.name.startswith("gpu-gpc")
    try:
        return read_text(path / "device/of_node/name") in GPU_NODES
    except UnreadableError:
        return False
