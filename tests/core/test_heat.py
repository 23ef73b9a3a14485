"""What the governor is told of a snapshot."""

from __future__ import annotations

import pytest

from appliance.core import quantities as q
from appliance.core.heat import processor_temperature, thermal_sample
from appliance.core.readings import Gpu, GpuState, Reading, Snapshot, measured, missing
from appliance.core.thermal import DeviceSample, Throttle


def snapshot(readings: dict[str, float | None], gpus: tuple[Gpu, ...] = ()) -> Snapshot:
    made: dict[str, Reading] = {}
    for name, value in readings.items():
        found = q.quantity_of(name)
        assert found is not None, name
        made[name] = missing(found[0], "the sensor is asleep", 5.0) if value is None else measured(found[0], value, 5.0)
    return Snapshot(1, 5.0, 1e9, 0.0, made, gpus)


def device(found: Snapshot, name: str) -> DeviceSample:
    return next(device for device in thermal_sample(found).devices if device.device == name)


def test_a_gpu_is_told_with_its_limits_its_margin_and_why_it_is_slow() -> None:
    gpu = Gpu(1, "u", "Ada", throttle=("HwThermalSlowdown", "SwPowerCap", "SomethingNew"))
    found = snapshot(
        {"gpu.1.temperature": 88, "gpu.1.temperature.margin": 4, "gpu.1.temperature.slowdown": 95, "gpu.1.power": 60},
        (gpu,),
    )
    told = device(found, "gpu:1")
    assert (told.temperature_c, told.margin_c, told.slowdown_c, told.power_w) == (88, 4, 95, 60)
    assert told.throttle == {Throttle.THERMAL_HARDWARE, Throttle.POWER_CAP}
    assert told.missing == ""


def test_a_gpu_without_a_temperature_is_not_cool_but_says_why() -> None:
    lost = Gpu(0, "u", "Ada", state=GpuState.LOST, reason="it fell off the bus")
    assert device(snapshot({}, (lost,)), "gpu:0").missing == "it fell off the bus"
    asleep = snapshot({"gpu.0.temperature": None}, (Gpu(0, "u", "Ada"),))
    assert device(asleep, "gpu:0").missing == "the sensor is asleep"
    absent = Gpu(0, "u", "Ada", state=GpuState.ABSENT)
    assert thermal_sample(snapshot({}, (absent,))).devices == ()


def test_the_host_is_as_hot_as_the_processor_sensor_nearest_to_its_limit() -> None:
    found = snapshot(
        {
            "host.temperature.coretemp_Package_id_0": 80,
            "host.temperature.coretemp_Package_id_0.critical": 100,
            "host.temperature.zone_cpu-thermal": 78,
            "host.temperature.zone_cpu-thermal.critical": 90,
            "host.temperature.nvme_Composite": 99,
        }
    )
    told = device(found, "host")
    assert (told.temperature_c, told.limit_c) == (78, 90)
    assert processor_temperature(found) == 78


@pytest.mark.parametrize("name", ["nvme_Composite", "iwlwifi_1_temp1", "acpitz_temp1", "drivetemp_temp1"])
def test_what_is_no_processor_does_not_make_the_host_hot(name: str) -> None:
    found = snapshot({f"host.temperature.{name}": 99})
    assert thermal_sample(found).devices == ()
    assert processor_temperature(found) is None


def test_a_processor_whose_sensors_are_all_silent_says_so() -> None:
    found = snapshot({"host.temperature.k10temp_Tctl": None})
    assert device(found, "host").missing == "the sensor is asleep"
    assert device(found, "host").temperature_c is None
