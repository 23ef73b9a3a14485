"""What the governor is for, held against a simulated GPU in a hot cabinet."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from thermal_sim import LOAD, Plant, Simulation, compare  # noqa: E402

from appliance.core.thermal import ThermalPolicy  # noqa: E402


def test_the_plant_settles_where_its_resistance_says() -> None:
    plant = Plant(ambient_c=20.0)
    for _ in range(3000):
        plant.step(1.0, 1.0)
    assert plant.temperature_c == pytest.approx(20.0 + 0.4 * 150.0)
    one = Plant(ambient_c=20.0, temperature_c=80.0)
    one.step(100.0, 0.0)  # one time constant: 63 % of the way to 32 °C
    assert one.temperature_c == pytest.approx(32.0 + 48.0 * 0.3679, abs=0.01)


@pytest.mark.parametrize("ambient", [42.0, 45.0, 50.0])
def test_with_it_high_priority_stays_quick_and_without_it_the_gpu_throttles(ambient: float) -> None:
    cool, without, governed = compare(1800.0, ambient_c=ambient)
    assert cool.throttled_share == 0
    assert without.throttled_share > 0.1
    assert without.p99_ms["high"] > 1.5 * cool.p99_ms["high"]
    assert governed.throttled_share == 0
    assert governed.p99_ms["high"] <= 1.5 * cool.p99_ms["high"]
    assert governed.goodput["high"] == pytest.approx(LOAD.rates[1], rel=0.1)
    assert governed.goodput["normal"] == pytest.approx(LOAD.rates[8], rel=0.1)


def test_a_cool_box_is_left_alone() -> None:
    run = Simulation("cool", Plant(ambient_c=10.0, temperature_c=20.0), LOAD, ThermalPolicy()).run(1800.0)
    assert (run.transitions, run.refused) == (0, 0)
    assert run.goodput["low"] == pytest.approx(LOAD.rates[12], rel=0.1)


@pytest.mark.parametrize("hours", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_it_does_not_oscillate(hours: int) -> None:
    """Every level may be tried again once in its longest dwell; three levels go on and off: at most 24 changes an hour."""
    run = Simulation("long", Plant(ambient_c=45.0), LOAD, ThermalPolicy()).run(hours * 3600.0)
    assert 0 < run.transitions <= 8 * hours
    assert run.transitions_last_quarter <= 8 * hours / 4
    assert run.throttled_share == 0


def test_the_command_prints_json_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "heat.svg"
    result = subprocess.run(
        [sys.executable, "tools/thermal_sim.py", "--hours", "0.2", "--json", "--svg", str(picture)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert [run["name"] for run in json.loads(result.stdout)] == ["cool", "without governor", "with governor"]
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
