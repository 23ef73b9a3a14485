"""NVIDIA GPUs: the real pynvml against the stub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.readings import GpuState, Part
from appliance.sensors.nvml import NvmlSampler
from appliance.sensors.nvml_tables import RECOVERY, duration_fields
from tests.fakes.nvml import LOST, MISMATCH, NO_DRIVER, NOT_SUPPORTED, RESET_REQUIRED, UNKNOWN, StubNvml

KEYS = (
    *(
        "temperature",
        "power_mw",
        "reasons",
        "energy_mj",
        "utilization",
        "memory.used",
        "fans",
        "mig",
        "fan.0",
        "margin",
    ),
    *("rows.corrected", "rows.failed", "field.82", "field.230", "field.269", "pcie.width", "processes"),
)
FAILURES = [(MISMATCH, "driver-mismatch"), (NO_DRIVER, "driver-missing"), (UNKNOWN, "driver-failed")]


def codes(part: Part) -> list[str]:
    return [finding.code for finding in part.findings]


def value(part: Part, name: str) -> float | None:
    return part.readings[name].value


def test_a_healthy_card_gives_every_reading_it_has(stub: StubNvml, tmp_path: Path) -> None:
    part = NvmlSampler(root=tmp_path).sample(0.0)
    expected = {
        "temperature": 61,
        "temperature.margin": 34,
        "temperature.memory": 70,
        "temperature.slowdown": 95,
        "power": 48.5,
        "power.limit": 70,
        "energy": pytest.approx(123456.789),
        "utilization": 37,
        "memory.total": 20 << 30,
        "memory.reserved": 300 << 20,
        "fan.0": 45,
        "pcie.replays": 2,
        "pcie.width": 8,
        "pcie.width_max": 16,
        "ecc.corrected": 1,
        "rows.pending": 0,
        "recovery_action": 0,
        "throttled.sw_power": 5,
        "throttled.sw_thermal": 3,
        "throttled.hw_thermal": 2,
        "throttled.hw_power_brake": 1,
    }
    assert {name: value(part, f"gpu.0.{name}") for name in expected} == expected
    (gpu,) = part.gpus
    assert (gpu.state, gpu.integrated, gpu.throttle) == (GpuState.OK, False, ())
    assert [(one.pid, one.memory_bytes, one.gpu_instance) for one in gpu.processes] == [
        (1234, 1 << 30, None),
        (77, None, None),
    ]
    assert part.findings == ()


def test_a_card_that_heats_up_names_what_slows_it_down(stub: StubNvml, tmp_path: Path) -> None:
    sampler = NvmlSampler(root=tmp_path)
    seen = []
    for second, (degrees, reasons) in enumerate([(80, 0x1), (92, 0x20), (97, 0x48)]):
        stub.set("0.temperature", degrees)
        stub.set("0.reasons", reasons)
        part = sampler.sample(float(second))
        seen.append((value(part, "gpu.0.temperature"), part.gpus[0].throttle))
    assert seen == [(80, ()), (92, ("SwThermalSlowdown",)), (97, ("HwSlowdown", "HwThermalSlowdown"))]


def test_a_dead_fan_is_missing_and_the_rest_goes_on(stub: StubNvml, tmp_path: Path) -> None:
    stub.set("0.error.nvmlDeviceGetFanSpeed_v2", UNKNOWN)
    part = NvmlSampler(root=tmp_path).sample(0.0)
    assert part.readings["gpu.0.fan.0"].reason == "the driver failed and did not say why"
    assert value(part, "gpu.0.temperature") == 61


@pytest.mark.parametrize(
    ("key", "lie", "name"),
    [
        ("0.temperature", -256, "gpu.0.temperature"),
        ("0.power_mw", 65_535_000, "gpu.0.power"),
        ("0.power_mw", 2**32 - 1, "gpu.0.power"),
        ("0.energy_mj", 2**64 - 1, "gpu.0.energy"),
        ("0.utilization", 101, "gpu.0.utilization"),
        ("0.memory.total", 0, "gpu.0.memory.total"),
        ("0.field.82", 0, "gpu.0.temperature.memory"),
    ],
)
def test_a_lie_is_a_reason_and_not_a_value(stub: StubNvml, tmp_path: Path, key: str, lie: int, name: str) -> None:
    stub.set(key, lie)
    reading = NvmlSampler(root=tmp_path).sample(0.0).readings[name]
    assert reading.value is None
    assert reading.reason


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), number=st.integers(-(2**63), 2**64 - 1))
def test_whatever_a_call_answers_becomes_a_value_or_a_reason(
    stub: StubNvml, tmp_path: Path, key: str, number: int
) -> None:
    stub.set(f"0.{key}", number)
    try:
        part = NvmlSampler(root=tmp_path).sample(0.0)
    finally:
        stub.card(0)
    assert part.gpus[0].state is GpuState.OK
    assert all((reading.value is None) == bool(reading.reason) for reading in part.readings.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(code=st.integers(1, 1100).filter(lambda code: code not in (LOST, RESET_REQUIRED)))
def test_whatever_error_every_call_gives_is_a_reason(stub: StubNvml, tmp_path: Path, code: int) -> None:
    sampler = NvmlSampler(root=tmp_path)
    sampler.sample(0.0)
    stub.set("0.error", code)
    part = sampler.sample(1.0)
    stub.unset("0.error")
    assert part.gpus[0].state is GpuState.OK
    assert part.readings["gpu.0.temperature"].reason


@pytest.mark.parametrize("old", ["TEMPERATURE_V", "EVENT_REASONS", "MEMORY_V2", "PROCESSES_V3"])
def test_an_old_driver_is_asked_by_the_old_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str) -> None:
    if reason := StubNvml.missing():
        pytest.skip(reason)
    StubNvml(tmp_path).start(without=[old]).install(monkeypatch)
    part = NvmlSampler(root=tmp_path).sample(0.0)
    names = ("gpu.0.temperature", "gpu.0.clock.event_reasons", "gpu.0.memory.used")
    assert [value(part, name) for name in names] == [61, 0, 3 << 30]
    assert part.gpus[0].processes[0].pid == 1234


def test_what_a_card_does_not_have_is_not_asked_for_every_second(stub: StubNvml, tmp_path: Path) -> None:
    stub.unset("0.margin")
    sampler = NvmlSampler(root=tmp_path)
    assert sampler.sample(0.0).readings["gpu.0.temperature.margin"].reason == "this GPU does not support it"
    stub.set("0.margin", 30)
    assert value(sampler.sample(1.0), "gpu.0.temperature.margin") is None
    assert value(sampler.sample(1000.0), "gpu.0.temperature.margin") == 30


def test_a_lost_gpu_stays_lost_until_somebody_looks_anew_and_the_other_works(stub: StubNvml, tmp_path: Path) -> None:
    stub.card(1)
    stub.set("gpus", 2)
    sampler = NvmlSampler(root=tmp_path)
    sampler.sample(0.0)
    stub.set("0.error", LOST)
    part = sampler.sample(1.0)
    assert [gpu.state for gpu in part.gpus] == [GpuState.LOST, GpuState.OK]
    assert "Reboot" in part.gpus[0].action
    assert part.readings["gpu.0.power"].reason == "the GPU has fallen off the bus"
    assert (value(part, "gpu.1.power"), codes(part)) == (48.5, ["gpu-lost"])
    stub.unset("0.error")
    assert sampler.sample(2.0).gpus[0].state is GpuState.LOST
    sampler.reopen()
    assert [gpu.state for gpu in sampler.sample(3.0).gpus] == [GpuState.OK, GpuState.OK]


def test_a_gpu_that_needs_a_reset_says_so(stub: StubNvml, tmp_path: Path) -> None:
    stub.set("0.error.nvmlDeviceGetPowerUsage", RESET_REQUIRED)
    part = NvmlSampler(root=tmp_path).sample(0.0)
    assert (part.gpus[0].state, codes(part)) == (GpuState.RESET_REQUIRED, ["gpu-reset-required"])
    assert "--gpu-reset" in part.findings[0].action


def test_damaged_rows_and_the_recovery_that_the_driver_asks_for_are_findings(stub: StubNvml, tmp_path: Path) -> None:
    for key in ("0.rows.pending", "0.rows.failed", "0.field.230"):
        stub.set(key, 1)
    part = NvmlSampler(root=tmp_path).sample(0.0)
    assert codes(part) == ["gpu-recovery", "gpu-rows-pending", "gpu-rows-failed"]


@pytest.mark.parametrize(("code", "finding"), FAILURES)
def test_a_driver_that_does_not_start_is_a_finding_until_it_does(
    stub: StubNvml, tmp_path: Path, code: int, finding: str
) -> None:
    stub.set("init", code)
    sampler = NvmlSampler(root=tmp_path)
    part = sampler.sample(0.0)
    assert (codes(part), part.gpus) == ([finding], ())
    stub.unset("init")
    assert sampler.sample(1.0).gpus == ()
    part = sampler.sample(40.0)
    assert (codes(part), len(part.gpus)) == ([], 1)


def test_mig_instances_have_their_own_memory_and_processes(stub: StubNvml, tmp_path: Path) -> None:
    stub.set("0.mig", 7)
    for key, content in {
        "uuid": "MIG-1",
        "memory.total": 10 << 30,
        "memory.used": 1 << 30,
        "processes": "9:5:3:0",
    }.items():
        stub.set(f"0.mig.2.{key}", content)
    (instance,) = NvmlSampler(root=tmp_path).sample(0.0).gpus[0].mig
    assert (instance.index, instance.uuid, instance.total_bytes, instance.used_bytes) == (2, "MIG-1", 10 << 30, 1 << 30)
    assert [(p.pid, p.memory_bytes, p.gpu_instance, p.compute_instance) for p in instance.processes] == [(9, 5, 3, 0)]


def test_an_integrated_gpu_reports_the_hosts_memory(stub: StubNvml, tree: Callable[[dict[str, object]], Path]) -> None:
    root = tree({"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 400 kB"})
    stub.set("0.name", "NVIDIA GB10")
    part = NvmlSampler(root=root).sample(0.0)
    names = ("total", "free", "used")
    assert [value(part, f"gpu.0.memory.{name}") for name in names] == [1_024_000, 409_600, 1 << 30]
    assert part.gpus[0].integrated


def test_a_card_of_its_own_that_does_not_tell_its_memory_never_borrows_the_hosts(
    stub: StubNvml, tree: Callable[[dict[str, object]], Path]
) -> None:
    stub.set("0.error.nvmlDeviceGetMemoryInfo_v2", NOT_SUPPORTED)
    stub.set("0.error.nvmlDeviceGetMemoryInfo", NOT_SUPPORTED)
    part = NvmlSampler(root=tree({"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 400 kB"})).sample(0.0)
    assert value(part, "gpu.0.memory.total") is None


def test_a_driver_replaced_on_disk_is_reported_while_everything_still_works(
    stub: StubNvml, tree: Callable[[dict[str, object]], Path]
) -> None:
    files: dict[str, object] = {
        "sys/module/nvidia/version": "580.95.05",
        "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.95.05": "",
    }
    root = tree(files)
    sampler = NvmlSampler(root=root)
    assert codes(sampler.sample(0.0)) == []
    library = root / "usr/lib/x86_64-linux-gnu"
    (library / "libnvidia-ml.so.580.95.05").rename(library / "libnvidia-ml.so.580.126.09")
    part = sampler.sample(100.0)
    assert (codes(part), value(part, "gpu.0.temperature")) == (["driver-drift"], 61)
    assert part.findings[0].message.startswith("reboot pending: version 580.95.05 runs")


def test_the_slowdown_times_are_read_where_the_driver_keeps_them() -> None:
    assert [duration_fields(driver) for driver in ("615.71", "580.95.05", "595.10", "rubbish")] == [
        (269, 270, 271),
        (251, 252, 253),
        None,
        None,
    ]


@pytest.mark.parametrize("driver", ["535.261.03", "550.163.01", "595.10"])
def test_a_driver_without_those_numbers_tells_the_time_slowed_for_heat_all_the_same(
    stub: StubNvml, tmp_path: Path, driver: str
) -> None:
    stub.put({"driver": driver, "0.field.75": 7_000_000_000})
    part = NvmlSampler(root=tmp_path).sample(0.0)
    assert (value(part, "gpu.0.throttled.sw_power"), value(part, "gpu.0.throttled.sw_thermal")) == (5, 7)
    assert part.readings["gpu.0.throttled.hw_thermal"].reason == f"nobody knows where driver {driver} keeps it"


def test_every_remedy_of_the_driver_has_words() -> None:
    assert sorted(RECOVERY) == [1, 2, 3, 4, 5, 6, 7]


def test_in_mig_mode_what_is_not_told_has_that_reason_and_comes_back_when_it_is_off(
    stub: StubNvml, tmp_path: Path
) -> None:
    sampler = NvmlSampler(root=tmp_path)
    assert value(sampler.sample(0.0), "gpu.0.utilization") == 37
    stub.put({"0.mig": 7, "0.utilization": None, "0.mig.0.uuid": "MIG-1"})
    part = sampler.sample(1.0)
    assert part.gpus[0].mig_mode is True
    assert "MIG instances" in part.readings["gpu.0.utilization"].reason
    assert value(part, "gpu.0.temperature") == 61
    stub.put({"0.mig": 0, "0.utilization": 37})
    part = sampler.sample(2.0)
    assert (part.gpus[0].mig_mode, value(part, "gpu.0.utilization")) == (False, 37), "asked anew at once"


def test_a_card_without_mig_does_not_say_that_it_is_off(stub: StubNvml, tmp_path: Path) -> None:
    stub.unset("0.mig")
    assert NvmlSampler(root=tmp_path).sample(0.0).gpus[0].mig_mode is None


def test_the_memory_of_a_gpu_that_tells_only_its_instances_is_their_sum(stub: StubNvml, tmp_path: Path) -> None:
    stub.put({"0.error.nvmlDeviceGetMemoryInfo_v2": NOT_SUPPORTED, "0.memory.total": None, "0.mig": 7})
    for number, (total, used) in enumerate(((10, 4), (6, 1))):
        keys = {"uuid": f"MIG-{number}", "memory.total": total << 30, "memory.used": used << 30}
        stub.put({f"0.mig.{number}.{key}": content for key, content in keys.items()})
    part = NvmlSampler(root=tmp_path).sample(0.0)
    names = ("total", "used", "free")
    assert [value(part, f"gpu.0.memory.{name}") for name in names] == [16 << 30, 5 << 30, 11 << 30]


def test_mig_without_an_instance_is_a_finding(stub: StubNvml, tmp_path: Path) -> None:
    stub.set("0.mig", 7)
    part = NvmlSampler(root=tmp_path).sample(0.0)
    assert codes(part) == ["gpu-mig-empty"]
    assert "nvidia-smi mig -cgi" in part.findings[0].action


def test_uncorrected_memory_errors_are_a_finding_and_corrected_ones_are_counted(stub: StubNvml, tmp_path: Path) -> None:
    stub.set("0.ecc.corrected", 4711)
    sampler = NvmlSampler(root=tmp_path)
    assert codes(sampler.sample(0.0)) == []
    stub.set("0.ecc.uncorrected", 1)
    part = sampler.sample(1.0)
    assert codes(part) == ["gpu-ecc-uncorrected"]
    assert part.findings[0].message == "1 uncorrected memory error since the driver was loaded"
    assert part.gpus[0].state is GpuState.OK


def test_the_word_of_the_driver_replaces_what_the_first_failed_call_said(stub: StubNvml, tmp_path: Path) -> None:
    sampler = NvmlSampler(root=tmp_path)
    sampler.sample(0.0)
    stub.set("0.error", LOST)
    assert sampler.sample(1.0).gpus[0].reason == "the GPU has fallen off the bus"
    sampler.mark_lost(0, "XID 79")
    part = sampler.sample(2.0)
    assert (part.gpus[0].reason, part.readings["gpu.0.power"].reason) == ("XID 79", "XID 79")


def test_what_has_begun_to_fail_is_not_foretold(stub: StubNvml, tree: Callable[[dict[str, object]], Path]) -> None:
    library = "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.620.10"
    root = tree({"sys/module/nvidia/version": "615.71", library: ""})
    assert codes(NvmlSampler(root=root).sample(0.0)) == ["driver-drift"]
    stub.set("init", MISMATCH)
    assert codes(NvmlSampler(root=root).sample(0.0)) == ["driver-mismatch"]
