"""Host, board, Jetson and storage, on fake /proc and /sys trees."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance import sensors
from appliance.core import quantities as q
from appliance.sensors.board import BoardSampler
from appliance.sensors.clock import ClockWatch
from appliance.sensors.host import HostSampler
from appliance.sensors.processes import PAGE_BYTES, TICKS_PER_S, Processes
from appliance.sensors.storage import StorageSampler

READERS = "\n".join(file.read_text() for file in Path(sensors.__file__).parent.glob("*.py"))

Tree = Callable[[dict[str, object]], Path]

PC: dict[str, object] = {
    "proc/stat": "cpu 100 0 100 800 0 0 0 0 0 0",
    "proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB\nSwapTotal: 100 kB\nSwapFree: 60 kB",
    "proc/loadavg": "0.50 0.4 0.3 1/100 1",
    "proc/pressure/memory": "some avg10=1.50 avg60=0 avg300=0 total=1\nfull avg10=0.50 avg60=0 avg300=0 total=1",
    "sys/class/net/eth0/carrier": 1,
    "sys/class/net/eth0/carrier_changes": 3,
    "sys/class/net/eth0/statistics/rx_bytes": 1000,
    "sys/class/net/eth0/statistics/tx_bytes": 500,
    "sys/class/net/eth0/statistics/rx_errors": 1,
    "sys/class/net/eth0/statistics/tx_errors": 0,
    "sys/class/net/eth0/statistics/rx_dropped": 2,
    "sys/class/net/eth0/statistics/tx_dropped": 0,
    "sys/class/hwmon/hwmon0/name": "coretemp",
    "sys/class/hwmon/hwmon0/temp1_label": "Package id 0",
    "sys/class/hwmon/hwmon0/temp1_input": 55000,
    "sys/class/hwmon/hwmon1/name": "nvme",
    "sys/class/hwmon/hwmon1/temp1_input": -256000,
    "sys/class/hwmon/hwmon2/name": "nct6775",
    "sys/class/hwmon/hwmon2/fan1_input": 1200,
    "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp",
    "sys/class/thermal/thermal_zone0/temp": "rubbish",
}

ORIN: dict[str, object] = {
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0003\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
    "proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB",
    "sys/class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
    "sys/class/devfreq/17000000.gpu/device/load": 437,
    "sys/class/devfreq/17000000.gpu/cur_freq": 306_000_000,
    "sys/class/devfreq/17000000.gpu/max_freq": 624_750_000,
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": 48000,
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": 46500,
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": 5000,
    "sys/class/hwmon/hwmon1/curr1_input": 1000,
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": 5000,
    "sys/class/hwmon/hwmon1/curr2_input": 300,
    "sys/class/hwmon/hwmon1/in3_label": "NC",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon2/name": "pwmfan",
    "sys/class/hwmon/hwmon2/pwm1": 51,
    "var/lib/nvpmodel/status": "pmode:0002",
}


def test_a_plain_pc(tree: Tree) -> None:
    root = tree(PC)
    host = HostSampler(root=root)
    assert host.sample(0.0).readings["host.cpu.load"].reason == "known from the second sample on"
    tree({"proc/stat": "cpu 150 0 150 900 0 0 0 0 0 0"})
    readings = {**host.sample(1.0).readings, **BoardSampler(root=root).sample(0.0).readings}
    expected = {
        "host.cpu.load": 50.0,
        "host.memory.available": 6_144_000,
        "host.memory.swap_used": 40 * 1024,
        "host.pressure.memory.some": 1.5,
        "host.pressure.memory.full": 0.5,
        "host.network.eth0.up": 1,
        "host.network.eth0.errors": 3,
        "host.temperature.coretemp_Package_id_0": 55.0,
        "host.fan.nct6775_fan1": 1200,
    }
    assert {name: readings[name].value for name in expected} == expected
    reasons = {name: readings[name].reason for name in (
        "host.pressure.cpu.some", "host.temperature.nvme_temp1", "host.temperature.zone_x86_pkg_temp")}  # fmt: skip
    assert reasons == {
        "host.pressure.cpu.some": "this kernel does not have it (pressure stall information)",
        "host.temperature.nvme_temp1": "-256 °C is not believed: outside -60 to 150 °C",
        "host.temperature.zone_x86_pkg_temp": "expected a number, found 'rubbish'",
    }


def test_an_orin_reports_its_gpu_rails_fan_and_mode(tree: Tree) -> None:
    part = BoardSampler(root=tree(ORIN)).sample(0.0)
    expected = {
        "gpu.0.utilization": pytest.approx(43.7),
        "gpu.0.clock.graphics": pytest.approx(306),
        "gpu.0.temperature": pytest.approx(46.5),
        "gpu.0.power": pytest.approx(1.5),
        "gpu.0.memory.free": 6_144_000,
        "host.rail.VDD_IN.power": pytest.approx(5.0),
        "host.fan.pwmfan.duty": pytest.approx(20),
        "host.power_mode": 2,
        "host.temperature.zone_gpu-thermal": pytest.approx(46.5),
    }
    assert {name: part.readings[name].value for name in expected} == expected
    assert {name for name in part.readings if name.startswith("host.rail")} == {
        f"host.rail.{rail}.{kind}" for rail in ("VDD_IN", "VDD_CPU_GPU_CV") for kind in ("power", "voltage")
    }
    assert (part.gpus[0].name, part.gpus[0].integrated) == ("NVIDIA Jetson Orin Nano GPU", True)


def test_thor_takes_the_clock_of_its_graphics_cluster(tree: Tree) -> None:
    root = tree({
        "proc/device-tree/compatible": "nvidia,tegra264",
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor",
        "sys/class/devfreq/gpu-nvd-0/cur_freq": 1,
        "sys/class/devfreq/gpu-gpc-0/cur_freq": 1_575_000_000,
    })  # fmt: skip
    readings = BoardSampler(root=root).sample(0.0).readings
    assert readings["gpu.0.clock.graphics"].value == pytest.approx(1575)
    assert readings["gpu.0.utilization"].reason == "this kernel does not have it"


def test_the_processor_s_clock_is_the_mean_of_the_cores_that_tell(tree: Tree) -> None:
    cpu = "sys/devices/system/cpu"
    root = tree({
        f"{cpu}/cpu0/cpufreq/scaling_cur_freq": 1_400_000,
        f"{cpu}/cpu1/cpufreq/scaling_cur_freq": 3_400_000,
        f"{cpu}/cpu2/online": 0,
        f"{cpu}/cpufreq/boost": 1,
    })  # fmt: skip
    host = HostSampler(root=root)
    assert host.sample(0.0).readings["host.cpu.clock"].value == 2400.0
    tree({f"{cpu}/cpu1/cpufreq/scaling_cur_freq": 2_400_000})
    assert host.sample(1.0).readings["host.cpu.clock"].value == 1900.0


def test_a_guest_without_cpufreq_says_why_it_has_no_clock(tmp_path: Path) -> None:
    reading = HostSampler(root=tmp_path).sample(0.0).readings["host.cpu.clock"]
    assert (reading.value, reading.reason) == (None, "the kernel does not say")


@pytest.mark.parametrize("name", [name for name, value in vars(q).items() if isinstance(value, q.Quantity)])
def test_every_quantity_of_the_table_has_a_sensor_that_reads_it(name: str) -> None:
    assert re.search(rf"\bq\.{name}\b", READERS), (
        f"no file in appliance/sensors reads {name}: it would never have a value"
    )


def test_an_empty_machine_gives_reasons_and_no_exception(tmp_path: Path) -> None:
    for sampler in (HostSampler(root=tmp_path), BoardSampler(root=tmp_path), StorageSampler({}, root=tmp_path)):
        for now_s in (0.0, 1.0):
            part = sampler.sample(now_s)
            assert all((reading.value is None) == bool(reading.reason) for reading in part.readings.values())


def test_own_processes_are_followed_and_one_that_ended_is_missing(tmp_path: Path) -> None:
    host = HostSampler(root=tmp_path)
    host.wanted = {"front": os.getpid(), "worker.a:1:0": 2**22 + 1}
    readings = host.sample(0.0).readings
    assert (readings["process.front.rss"].value or 0) > 1 << 20
    assert (readings["process.front.fds"].value or 0) > 2
    assert readings["process.worker_a:1:0.rss"].reason == "the process has ended"
    assert readings["process.worker_a:1:0.fds"].reason == "the process has ended"
    assert readings["process.front.cpu"].reason == "known from the second sample on"
    assert host.sample(1.0).readings["process.front.cpu"].value is not None
    host.wanted = {}
    assert "process.front.rss" not in host.sample(2.0).readings


def test_wear_is_read_where_the_drive_may_be_asked(tree: Tree) -> None:
    root = tree({"sys/block/mmcblk0/device/life_time": "0x03 0x01", "sys/block/nvme0n1/size": 1, "sys/block/sda/size": 1,
                 "proc/diskstats": "259 0 nvme0n1 1 0 10 0 2 0 20 0 0 0 0"})  # fmt: skip
    asked: list[Path] = []

    def smart(device: Path) -> bytes:
        asked.append(device)
        return bytes([0, 0, 0, 100, 10, 95]) + bytes(506)

    part = StorageSampler({"state": root}, root=root, read_smart=smart).sample(0.0)
    values = {name: part.readings[name].value for name in (
        "host.drive.nvme0n1.wear", "host.drive.mmcblk0.wear", "host.drive.sda.wear", "host.drive.nvme0n1.written")}  # fmt: skip
    assert list(values.values()) == [95, 30, None, 20 * 512]
    assert [path.name for path in asked] == ["nvme0"]
    assert [finding.code for finding in part.findings] == ["drive-worn"]
    assert (part.readings["host.disk.state.free"].value or 0) > 0


def test_a_drive_that_may_not_be_asked_says_what_that_takes(tree: Tree) -> None:
    def forbidden(device: Path) -> bytes:
        raise PermissionError(13, "no")

    sampler = StorageSampler({}, root=tree({"sys/block/nvme0n1/size": 1}), read_smart=forbidden)
    reason = sampler.sample(0.0).readings["host.drive.nvme0n1.wear"].reason
    assert reason == "not permitted (reading /dev/nvme0 takes CAP_SYS_ADMIN)"


def test_a_drive_that_was_taken_out_has_no_readings_and_no_finding_any_more(tree: Tree) -> None:
    line = "259 0 {} 1 0 8 0 1 0 16 0 0 0 0"
    root = tree({
        "proc/diskstats": "\n".join(line.format(drive) for drive in ("nvme0n1", "mmcblk1")),
        "sys/block/nvme0n1/size": 1,
        "sys/block/mmcblk1/device/life_time": "0x0a 0x01",
    })  # fmt: skip
    storage = StorageSampler({"state": root}, root=root, read_smart=lambda device: bytes(512))
    full = storage.sample(0.0)
    assert [finding.subject for finding in full.findings] == ["drive.mmcblk1"]
    tree({"proc/diskstats": line.format("nvme0n1")})
    (root / "sys/block/mmcblk1").rename(root / "out")
    left = storage.sample(10.0)
    assert set(full.readings) - set(left.readings) == {
        f"host.drive.mmcblk1.{name}" for name in ("read", "written", "wear")
    }
    assert "host.disk.state.free" in left.readings
    assert left.findings == ()


def test_a_jump_of_the_clock_is_seen_once_and_slewing_is_not() -> None:
    offsets = iter([1000.0, 1000.3, -2600.0, -2600.0])
    watch = ClockWatch(read_offset=lambda: next(offsets), read_discipline=lambda: (1, 0.01), wall=lambda: 2e9)
    parts = [watch.sample(float(second)) for second in range(4)]
    assert [part.readings["host.clock.steps"].value for part in parts] == [0, 0, 1, 1]
    assert parts[3].readings["host.clock.step"].value == pytest.approx(-3600.3)
    assert parts[3].findings[0].message == "the wall clock jumped by -3600.3 s"


def test_a_clock_that_was_never_set_is_a_finding_and_a_forbidden_adjtimex_a_reason() -> None:
    def forbidden() -> tuple[int, float]:
        raise PermissionError(1, "no")

    part = ClockWatch(read_discipline=forbidden, wall=lambda: 100.0).sample(0.0)
    assert [finding.code for finding in part.findings] == ["clock-unset"]
    assert part.readings["host.clock.synchronized"].reason == "the kernel does not tell us (adjtimex)"


def test_a_pid_that_another_process_got_begins_anew(tree: Tree) -> None:
    def stat(ticks: int, start: int) -> str:
        return f"7 (a ) b) S 1 7 7 0 -1 0 0 0 0 0 {ticks} 5 0 0 20 0 3 0 {start} 999 25 0"

    root = tree({"7/stat": stat(100, 1)})
    (root / "7/fd").mkdir()
    processes = Processes(root)
    first = processes.sample({"x": 7}, 10.0)
    assert (first["process.x.threads"].value, first["process.x.rss"].value) == (3.0, 25.0 * PAGE_BYTES)
    tree({"7/stat": stat(100 + TICKS_PER_S, 1)})
    assert processes.sample({"x": 7}, 12.0)["process.x.cpu"].value == 50.0
    tree({"7/stat": stat(1, 500)})
    anew = processes.sample({"x": 7}, 14.0)
    assert anew["process.x.cpu"].reason == "known from the second sample on"
    tree({"7/stat": "7 (a"})
    assert processes.sample({"x": 7}, 15.0)["process.x.rss"].reason == "its stat file is not as expected"
