"""The board: temperatures and fans of hwmon and thermal zones, energy (`rapl.py`), and what a Jetson has more (`jetson.py`).

These files ask chips over I2C and may fail, or hang: a sampler of its own, driven by a `lane.Lane`. Which sensors there are is
looked up every minute, their values are read at each sample.
"""

from __future__ import annotations

import re
from pathlib import Path

from appliance.core import quantities as q
from appliance.core.quantities import Quantity
from appliance.core.readings import Part, Reading
from appliance.sensors.base import Every, UnreadableError, names_in, read_reading, read_text
from appliance.sensors.jetson import Jetson
from appliance.sensors.rapl import Rapl

MAX_SENSORS = 128
_HWMON = re.compile(r"^(temp|fan)(\d+)_input$")


class BoardSampler:
    """`jetson` readings ride along where the board is one."""

    name = "board"
    period_s = 1.0

    def __init__(self, *, root: Path = Path("/")) -> None:
        self._root = root
        self._search = Every(60.0)
        self._second = Every(1.0)
        self._sensors: list[tuple[Quantity, str, Path, float]] = []
        self._critical: dict[str, Reading] = {}
        self._jetson = Jetson(root)
        self._rapl = Rapl(root)
        self._last = Part({})

    def sample(self, now_s: float) -> Part:
        """Temperatures, fans, rails; at most once a second, since these chips are slow."""
        if not self._second.due(now_s):
            return self._last
        if self._search.due(now_s):
            self._sensors = [*hwmon(self._root), *zones(self._root)][:MAX_SENSORS]
            self._critical = critical_temperatures(self._sensors, now_s)
            self._jetson.search()
            self._rapl.search()
        readings = {
            name: read_reading(quantity, path, now_s, scale=scale) for quantity, name, path, scale in self._sensors
        }
        jetson = self._jetson.sample(now_s)
        energy = self._rapl.sample(now_s)
        self._last = Part(
            {**readings, **self._critical, **energy.readings, **jetson.readings}, jetson.gpus, jetson.findings
        )
        return self._last

    def close(self) -> None:
        """Nothing is held."""


def hwmon(root: Path) -> list[tuple[Quantity, str, Path, float]]:
    """Every temperature and fan of hwmon: quantity, dotted name, file, and what its number is multiplied by."""
    found = []
    folder = root / "sys/class/hwmon"
    used: set[str] = set()
    for chip in names_in(folder):
        title = _text(folder / chip / "name", chip)
        for file in names_in(folder / chip):
            if match := _HWMON.match(file):
                kind, number = match[1], match[2]
                text = _text(folder / chip / f"{kind}{number}_label", f"{kind}{number}")
                quantity, scale = (q.HOST_TEMPERATURE, 1e-3) if kind == "temp" else (q.HOST_FAN, 1.0)
                name = quantity.name(f"{title}_{text}")
                if name in used:  # two drives of one kind
                    name = quantity.name(f"{chip}_{title}_{text}")
                used.add(name)
                found.append((quantity, name, folder / chip / file, scale))
    return found


def critical_temperatures(sensors: list[tuple[Quantity, str, Path, float]], now_s: float) -> dict[str, Reading]:
    """Where those temperatures become dangerous, as far as the chip or the zone says; it never changes."""
    found = {}
    for quantity, name, path, scale in sensors:
        if quantity is not q.HOST_TEMPERATURE:
            continue
        file = path.with_name(path.name.replace("_input", "_crit")) if path.name != "temp" else _trip_point(path.parent)
        if file is not None and file.exists():
            found[f"{name}.critical"] = read_reading(q.HOST_CRITICAL, file, now_s, scale=scale)
    return found


def _trip_point(zone: Path) -> Path | None:
    """The file with a thermal zone's critical trip point."""
    for file in names_in(zone):
        if file.startswith("trip_point_") and file.endswith("_type") and _text(zone / file, "") == "critical":
            return zone / file.replace("_type", "_temp")
    return None


def zones(root: Path) -> list[tuple[Quantity, str, Path, float]]:
    """Every thermal zone, by its type; those of one type by their number, too."""
    folder = root / "sys/class/thermal"
    found = []
    names = [name for name in names_in(folder) if name.startswith("thermal_zone")]
    types = {name: _text(folder / name / "type", name) for name in names}
    for name, kind in types.items():
        twice = sum(other == kind for other in types.values()) > 1
        text = f"zone_{kind}_{name.removeprefix('thermal_zone')}" if twice else f"zone_{kind}"
        found.append((q.HOST_TEMPERATURE, q.HOST_TEMPERATURE.name(text), folder / name / "temp", 1e-3))
    return found


def _text(path: Path, fallback: str) -> str:
    try:
        return read_text(path) or fallback
    except UnreadableError:
        return fallback
