"""What a piece of work cost: wall-clock seconds, CPU seconds, and joules where the machine counts them.

Joules are read from the RAPL counters of the CPU packages, never estimated: without a readable counter there is no number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

POWERCAP = Path("/sys/class/powercap")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Cost:
    """`joules` covers the CPU packages with everything else that ran on them; None where no counter can be read."""

    wall_s: float
    cpu_s: float
    joules: float | None


def measure(work: Callable[[], Result], powercap: Path = POWERCAP) -> tuple[Result, Cost]:
    """Run `work` in this process and say what it returned and cost. A counter is assumed to wrap around at most once."""
    packages = sorted(powercap.glob("intel-rapl:[0-9]"))
    energy_before = [_microjoules(package / "energy_uj") for package in packages]
    wall_before, cpu_before = time.monotonic(), time.process_time()
    result = work()
    wall_s, cpu_s = time.monotonic() - wall_before, time.process_time() - cpu_before
    joules = 0.0 if packages else None
    for package, before in zip(packages, energy_before, strict=True):
        after, reach = _microjoules(package / "energy_uj"), _microjoules(package / "max_energy_range_uj")
        if before is None or after is None or reach is None or joules is None:
            joules = None
        else:
            joules += (after - before if after >= before else after + reach - before) / 1e6
    return result, Cost(wall_s, cpu_s, joules)


def _microjoules(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # only root may read it since CVE-2020-8694; many virtual machines have none
        return None
