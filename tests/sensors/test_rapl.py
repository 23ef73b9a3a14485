"""RAPL's counters from a tree of files, and the critical temperatures that stand beside sensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.sensors.board import BoardSampler
from appliance.sensors.rapl import Rapl


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


ZONE = "sys/class/powercap/intel-rapl:0"


def test_top_zones_are_counted_and_what_is_below_them_is_not(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            f"{ZONE}/name": "package-0",
            f"{ZONE}/energy_uj": "1500000",
            f"{ZONE}/max_energy_range_uj": "262143328850",
            "sys/class/powercap/intel-rapl:0:0/name": "core",
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "1",
            "sys/class/powercap/dtpm/name": "dtpm",
        },
    )
    rapl = Rapl(tmp_path)
    rapl.search()
    readings = rapl.sample(1.0).readings
    assert set(readings) == {"host.rapl.package-0.energy", "host.rapl.package-0.range"}
    assert readings["host.rapl.package-0.energy"].value == 1.5
    assert readings["host.rapl.package-0.range"].value == pytest.approx(262143.32885)


def test_a_counter_that_may_not_be_read_is_missing_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, {f"{ZONE}/name": "package-0", f"{ZONE}/energy_uj/not_a_file": ""})
    rapl = Rapl(tmp_path)
    rapl.search()
    reading = rapl.sample(1.0).readings["host.rapl.package-0.energy"]
    assert reading.value is None
    assert reading.reason


def test_critical_temperatures_stand_beside_their_sensors(tmp_path: Path) -> None:
    chip, zone = "sys/class/hwmon/hwmon0", "sys/class/thermal/thermal_zone0"
    write(
        tmp_path,
        {
            f"{chip}/name": "coretemp",
            f"{chip}/temp1_label": "Package id 0",
            f"{chip}/temp1_input": "55000",
            f"{chip}/temp1_crit": "100000",
            f"{chip}/temp2_input": "50000",
            f"{zone}/type": "cpu-thermal",
            f"{zone}/temp": "51000",
            f"{zone}/trip_point_0_type": "passive",
            f"{zone}/trip_point_0_temp": "85000",
            f"{zone}/trip_point_1_type": "critical",
            f"{zone}/trip_point_1_temp": "105000",
        },
    )
    readings = BoardSampler(root=tmp_path).sample(1.0).readings
    critical = {name: reading.value for name, reading in readings.items() if name.endswith(".critical")}
    assert critical == {
        "host.temperature.coretemp_Package_id_0.critical": 100.0,
        "host.temperature.zone_cpu-thermal.critical": 105.0,
    }
