"""Which counter a device's energy is taken from."""

from __future__ import annotations

from appliance.core.energy import EnergyReading
from appliance.core.energy_sources import EnergySources
from appliance.core.readings import Gpu, Snapshot
from tests.core.test_heat import snapshot

GPU = (Gpu(0, "u", "Ada"),)


def at(second: float, readings: dict[str, float | None], gpus: tuple[Gpu, ...] = GPU) -> Snapshot:
    made = snapshot(readings, gpus)
    return Snapshot(1, second, 1e9, 0.0, made.readings, gpus)


def test_a_gpus_own_counter_comes_first() -> None:
    found = EnergySources().readings(at(0, {"gpu.0.energy": 12.5, "gpu.0.power": 70}))
    assert found == {"gpu:0": EnergyReading(12_500_000, "nvml")}


def test_a_gpu_without_a_counter_is_integrated_and_called_an_estimate() -> None:
    sources = EnergySources()
    sources.readings(at(0, {"gpu.0.power": 10}))
    found = sources.readings(at(2, {"gpu.0.power": 20}))["gpu:0"]
    assert (found.counter_uj, found.source, found.estimated) == (30_000_000, "estimate", True)


def test_a_gpu_that_tells_nothing_has_no_account() -> None:
    assert EnergySources().readings(at(0, {"gpu.0.power": None})) == {}


def test_one_processor_package_wraps_where_it_says() -> None:
    readings = {
        "host.rapl.package-0.energy": 5.0,
        "host.rapl.package-0.range": 262_143.0,
        "host.rapl.psys.energy": 99.0,
    }
    found = EnergySources().readings(at(0, readings, ()))
    assert found == {"host": EnergyReading(5_000_000, "rapl", wrap_uj=262_143_000_000)}


def test_several_packages_are_summed_and_called_an_estimate() -> None:
    readings: dict[str, float | None] = {"host.rapl.package-0.energy": 5.0, "host.rapl.package-1.energy": 7.0}
    found = EnergySources().readings(at(0, readings, ()))["host"]
    assert (found.counter_uj, found.estimated) == (12_000_000, True)


def test_a_jetsons_total_rail_stands_for_the_box() -> None:
    sources = EnergySources()
    rails: dict[str, float | None] = {"host.rail.VDD_IN.power": 12.0, "host.rail.VDD_GPU_SOC.power": 4.0}
    sources.readings(at(0, rails, ()))
    found = sources.readings(at(1, rails, ()))["host"]
    assert (found.counter_uj, found.source, found.estimated) == (12_000_000, "ina3221", False)
