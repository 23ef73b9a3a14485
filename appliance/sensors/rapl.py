"""RAPL: what the processor's packages have used, counted by the processor itself. Part of the board's sampler.

Source of meaning and units: Linux, Documentation/power/powercap/powercap.rst (microjoules; the counter starts over at
`max_energy_range_uj`). Most kernels let only root read it, since its noise gave secrets away (CVE-2020-8694); then the reading
is missing and says so.
"""

from __future__ import annotations

from pathlib import Path

from appliance.core import quantities as q
from appliance.core.readings import Part
from appliance.sensors.base import UnreadableError, names_in, read_reading, read_text

PREFIXES = ("intel-rapl:", "amd-rapl:")


class Rapl:
    """The top zones ("package-0", "psys"): what is below them is part of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._zones: list[tuple[str, Path]] = []

    def search(self) -> None:
        """Find the zones."""
        folder = self._root / "sys/class/powercap"
        self._zones = []
        for name in names_in(folder):
            if name.startswith(PREFIXES) and name.count(":") == 1:
                try:
                    title = read_text(folder / name / "name") or name
                except UnreadableError:
                    title = name
                self._zones.append((title, folder / name))

    def sample(self, now_s: float) -> Part:
        """The counter of each zone, and where it starts over."""
        readings = {}
        for title, path in self._zones:
            readings[q.RAPL_ENERGY.name(title)] = read_reading(q.RAPL_ENERGY, path / "energy_uj", now_s, scale=1e-6)
            readings[q.RAPL_RANGE.name(title)] = read_reading(
                q.RAPL_RANGE, path / "max_energy_range_uj", now_s, scale=1e-6
            )
        return Part(readings)
