"""Which counter a device's energy is taken from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from appliance.core.energy import Counter, EnergyMeter, EnergyReading
from appliance.core.energy_sources import EnergySources
from appliance.core.readings import Gpu, Snapshot
from tests.core.test_heat import snapshot

GPU = (Gpu(0, "u", "Ada"),)


def at(second: float, readings: dict[str, float | None], gpus: tuple[Gpu, ...] = GPU) -> Snapshot:
    made = snapshot(readings, gpus)
    return Snapshot(1, second, 1e9, 0.0, made.readings, gpus)


def test_a_gpus_own_counter_comes_first() -> None:
    found = EnergySources().readings(at(0, {"gpu.0.energy": 12.5, "gpu.0.power": 70}))
    assert found == {"gpu:0": EnergyReading({"gpu.0.energy": Counter(12_500_000)}, "nvml")}


def only(reading: EnergyReading) -> int:
    [counter] = reading.counters.values()
    return counter.counter_uj


def test_a_gpu_without_a_counter_is_integrated_and_called_an_estimate() -> None:
    sources = EnergySources()
    sources.readings(at(0, {"gpu.0.power": 10}))
    found = sources.readings(at(2, {"gpu.0.power": 20}))["gpu:0"]
    assert (only(found), found.source, found.estimated) == (30_000_000, "estimate", True)


def test_a_gpu_that_tells_nothing_has_no_account() -> None:
    assert EnergySources().readings(at(0, {"gpu.0.power": None})) == {}


def booked(
    samples: Iterable[tuple[float, Mapping[str, float | None]]], gpus: tuple[Gpu, ...] = GPU
) -> dict[str, float]:
    """Joules by device, as they are accounted; and each window's watts are checked against what it can be."""
    sources, meter, total = EnergySources(), EnergyMeter(), dict[str, float]()
    for second, readings in samples:
        for device, reading in sources.readings(at(second, dict(readings), gpus)).items():
            window = meter.observe(second, device, reading, {})
            if window is not None:
                total[device] = total.get(device, 0.0) + window.total_uj / 1e6
                assert 45 <= window.total_uj / 1e6 / window.window_s <= 105
    return total


@pytest.mark.parametrize("gone", [1, 3, 11])
def test_a_counter_that_cannot_be_read_for_a_while_tells_afterwards_what_was_used(gone: int) -> None:
    samples = [
        (
            5.0 * number,
            {"gpu.0.energy": None if 4 <= number < 4 + gone else 123_457 + 250.0 * number, "gpu.0.power": 50},
        )
        for number in range(30)
    ]
    assert booked(samples)["gpu:0"] == 250.0 * 29


def test_a_counter_that_is_gone_for_long_is_estimated_and_its_return_books_nothing_twice() -> None:
    samples = [
        (5.0 * number, {"gpu.0.energy": 123_457 + 250.0 * number if not 4 <= number < 40 else None, "gpu.0.power": 50})
        for number in range(50)
    ]
    total = booked(samples)["gpu:0"]
    assert 250.0 * 35 <= total <= 250.0 * 49, "what was used while nobody counted is not known"


def test_processor_packages_start_over_each_where_it_says() -> None:
    readings = {
        "host.rapl.package-0.energy": 5.0,
        "host.rapl.package-0.range": 262_143.0,
        "host.rapl.package-1.energy": 7.0,
        "host.rapl.psys.energy": 99.0,
    }
    found = EnergySources().readings(at(0, readings, ()))["host"]
    assert (found.source, found.estimated) == ("rapl", False)
    assert [(one.counter_uj, one.wrap_uj) for one in found.counters.values()] == [
        (5_000_000, 262_143_000_000),
        (7_000_000, 0),
    ]


@pytest.mark.parametrize("gone", [range(0), range(3, 4), range(3, 9), range(2, 60)])
def test_two_packages_make_no_energy_by_starting_over_or_by_being_unreadable(gone: range) -> None:
    samples = [
        (
            float(second),
            {
                "host.rapl.package-0.energy": (262_100 + 50.0 * second) % 262_144,
                "host.rapl.package-1.energy": None if second in gone else 100_000 + 50.0 * second,
                "host.rapl.package-0.range": 262_144.0,
                "host.rapl.package-1.range": 262_144.0,
            },
        )
        for second in range(90)
    ]
    assert booked(samples, ())["host"] == 100.0 * 89


def test_a_package_that_is_gone_for_good_leaves_the_others() -> None:
    samples = [
        (float(second), {"host.rapl.package-0.energy": 50.0 * second, "host.rapl.package-1.energy": 50.0 * second})
        for second in range(10)
    ]
    samples += [
        (float(second), {"host.rapl.package-0.energy": 50.0 * second, "host.rapl.package-1.energy": None})
        for second in range(10, 200)
    ]
    assert booked(samples, ())["host"] >= 100.0 * 9 + 50.0 * 129


def test_a_jetsons_total_rail_stands_for_the_box_and_has_its_gpu_in_it() -> None:
    sources = EnergySources()
    rails: dict[str, float | None] = {"host.rail.VDD_IN.power": 12.0, "host.rail.VDD_GPU_SOC.power": 4.0}
    sources.readings(at(0, rails | {"gpu.0.power": 4.0}))
    found = sources.readings(at(1, rails | {"gpu.0.power": 4.0}))
    host = found["host"]
    assert (only(host), host.source, host.estimated, host.within) == (12_000_000, "ina3221", False, "")
    assert found["gpu:0"].within == "host"
    [gpu] = sources.readings(at(2, {"gpu.0.power": 4.0, "host.rail.VDD_IN.power": None})).values()
    assert gpu.within == "host", "though the rail cannot be read now"


def test_a_board_without_a_total_rail_is_the_sum_of_those_that_feed_it() -> None:
    sources = EnergySources()
    names = {"VDD_GPU_SOC": 4.0, "VDD_CPU_CV": 3.0, "VIN_SYS_5V0": 5.0, "VDDQ_VDD2_1V8AO": 1.0}
    rails: dict[str, float | None] = {f"host.rail.{name}.power": power for name, power in names.items()}
    sources.readings(at(0, rails, ()))
    assert only(sources.readings(at(1, rails, ()))["host"]) == 12_000_000
    assert sources.readings(at(2, rails | {"host.rail.VDD_CPU_CV.power": None}, ())) == {}


def test_power_that_was_not_known_for_long_is_not_taken_for_nothing() -> None:
    samples = [(5.0 * number, {"gpu.0.power": None if 5 <= number < 12 else 50.0}) for number in range(20)]
    assert booked(samples)["gpu:0"] == 250.0 * 11
