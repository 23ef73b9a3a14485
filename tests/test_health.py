"""The watch over the box: who is told what of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.core.energy import EnergyWindow
from appliance.core.readings import Finding, Gpu, GpuProcess, GpuState, MigInstance, Severity, Snapshot
from appliance.core.thermal import ThermalSample
from appliance.health import Health
from appliance.observability.events import Event, EventBus
from appliance.sensors.nvml_events import DriverEvent
from tests.core.test_heat import snapshot

GIB = 1 << 30


class Monitor:
    """As much of the monitor as is asked of it."""

    def __init__(self) -> None:
        self.latest: Snapshot | None = None
        self.tell: Callable[[Snapshot], None] = lambda _: None
        self.tell_event: Callable[[DriverEvent], None] = lambda _: None

    def subscribe(self, listener: Callable[[Snapshot], None]) -> Callable[[], None]:
        self.tell = listener
        return lambda: None

    def on_event(self, listener: Callable[[DriverEvent], None]) -> Callable[[], None]:
        self.tell_event = listener
        return lambda: None

    def take(self, second: float, readings: dict[str, float | None], **more: Any) -> None:
        made = snapshot(readings, more.get("gpus", ()))
        self.latest = Snapshot(1, second, 1e9 + second, 0.0, made.readings, made.gpus, more.get("findings", ()))
        self.tell(self.latest)


class Record:
    def __init__(self) -> None:
        self.samples: list[tuple[float, Mapping[str, float]]] = []
        self.windows: list[EnergyWindow] = []

    def record_sample(self, wall: float, monotonic: float, values: Mapping[str, float]) -> None:
        self.samples.append((monotonic, values))

    def record_energy(self, window: EnergyWindow) -> None:
        self.windows.append(window)


class Judge:
    def __init__(self) -> None:
        self.samples: list[ThermalSample] = []

        self.condemned: dict[str, str] = {}

    def observe(self, sample: ThermalSample) -> None:
        self.samples.append(sample)

    def condemn(self, devices: Mapping[str, str]) -> None:
        self.condemned = dict(devices)


class Box:
    def __init__(self) -> None:
        self.monitor, self.record, self.judge, self.bus = Monitor(), Record(), Judge(), EventBus()
        self.events: list[Event] = []
        self.bus.subscribe(self.events.append)
        self.health = Health(self.monitor, self.bus, governor=self.judge, record=self.record)  # type: ignore[arg-type]  a stand-in

    def topics(self) -> list[str]:
        return [event.topic for event in self.events]


def test_every_sample_is_judged_and_one_a_second_is_recorded_without_the_hardwares_constants() -> None:
    box = Box()
    box.health.attach(tuple, lambda: {"requests.rate": 3.0})
    for tenth in range(11):
        box.monitor.take(
            tenth / 10, {"gpu.0.temperature": 61, "gpu.0.temperature.slowdown": 95}, gpus=(Gpu(0, "u", "A"),)
        )
    assert len(box.judge.samples) == 11
    assert [second for second, _ in box.record.samples] == [0.0, 1.0]
    assert box.record.samples[0][1] == {"gpu.0.temperature": 61, "gpu.0.throttle": 0.0, "requests.rate": 3.0}


def test_a_finding_is_told_when_it_comes_when_it_gets_worse_and_when_it_goes() -> None:
    box = Box()
    mild = Finding("driver-drift", Severity.WARNING, "host", "reboot pending", "reboot")
    grave = Finding("driver-drift", Severity.CRITICAL, "host", "reboot now", "reboot")
    for second, findings in enumerate([(mild,), (mild,), (grave,), (), ()]):
        box.monitor.take(second, {}, findings=findings)
    assert box.topics() == ["finding.raised", "finding.raised", "finding.cleared"]
    assert [event.data.get("severity") for event in box.events] == ["warning", "error", None]


def test_throttling_is_told_once_for_each_change() -> None:
    box = Box()
    for second, reasons in enumerate([(), ("SwPowerCap",), ("SwPowerCap",), ()]):
        box.monitor.take(second, {}, gpus=(Gpu(0, "u", "A", throttle=reasons),))
    assert [event.data["reasons"] for event in box.events] == [["SwPowerCap"], []]
    assert [sample["gpu.0.throttle"] for _, sample in box.record.samples] == [0.0, 1.0, 1.0, 0.0]


def test_an_xid_is_told_with_its_meaning_and_what_to_do() -> None:
    box = Box()
    box.monitor.tell_event(DriverEvent(1.0, "xid", 0, 79))
    event = box.events[0]
    assert (event.topic, event.data["data"], event.data["severity"]) == ("gpu.xid", 79, "error")
    assert event.data["meaning"]
    assert event.data["action"]


def test_energy_is_counted_in_windows_that_sum_to_the_counter() -> None:
    box = Box()
    for second in range(11):
        box.monitor.take(second, {"gpu.0.energy": 100 + 7.0 * second}, gpus=(Gpu(0, "u", "A"),))
    assert [window.total_uj for window in box.record.windows] == [35_000_000, 35_000_000]
    assert sum(total.joules for total in box.health.energy if not total.model) == 70


def test_a_jetson_s_board_has_its_gpu_in_it_with_the_models_there() -> None:
    class Busy:
        """A model on the GPU that is busy half of the time from the tenth second on."""

        name, version, device = "m", "1", "gpu:0"

        @property
        def statistics(self) -> Any:
            busy_ns = max(0, box.now_s - 10) * 500_000_000
            batch = SimpleNamespace(compute_infer=SimpleNamespace(ns=busy_ns))
            return SimpleNamespace(batches={1: batch}, inference_count=busy_ns // 1_000_000)

    class Jetson(Box):
        now_s = 0

    box = Jetson()
    box.health.attach(lambda: [Busy()], dict)  # type: ignore[list-item]  as much of a version as is looked at
    for box.now_s in range(0, 61, 5):
        power = 4.0 if box.now_s <= 10 else 8.0
        readings: dict[str, float | None] = {"host.rail.VDD_IN.power": power + 4.0, "gpu.0.power": power}
        box.monitor.take(float(box.now_s), readings, gpus=(Gpu(0, "u", "A", integrated=True),))
    assert sum(total.joules for total in box.health.energy if not total.model and not total.within) == 80 + 50 + 540
    host, gpu = (
        [total for total in box.health.energy if (total.device, total.part) == (device, "active") and total.model]
        for device in ("host", "gpu:0")
    )
    assert [(total.model, total.joules, total.within) for total in host] == [("m:1", 190.0, "")]
    assert [(total.model, total.within) for total in gpu] == [("m:1", "host")]


def test_memory_on_a_gpu_is_what_the_driver_says_of_our_processes() -> None:
    box = Box()
    gpus = (
        Gpu(0, "u", "A", processes=(GpuProcess(11, GIB), GpuProcess(12, 2 * GIB), GpuProcess(13, None))),
        Gpu(1, "v", "Orin", integrated=True, processes=(GpuProcess(11, GIB),)),
    )
    readings = {"gpu.0.memory.free": 8 * GIB, "gpu.1.memory.free": 8 * GIB, "gpu.0.memory.total": 10 * GIB}
    box.monitor.take(5, readings, gpus=gpus)
    assert box.health.gpu_capacity(1024) == {"gpu:0": 7 * GIB}
    assert box.health.gpu_capacity(1024, since_s=6) == {}, "it tells of before"
    assert box.health.gpu_most(1024) == {"gpu:0": 9 * GIB}
    found = box.health.measure([11, 13, 999_999_999])
    assert found["gpu:0"] == GIB
    assert "gpu:1" not in found, "what a chip shares with the host is counted there"
    assert found["host"] >= GIB, "and is not in the processes' resident set"
    assert box.health.integrated() == {"gpu:1"}


def test_the_status_has_missing_readings_as_none_and_findings_with_what_to_do() -> None:
    box = Box()
    assert box.health.document() == {"readings": {}, "gpus": [], "findings": []}
    assert box.health.hottest() is None
    finding = Finding("gpu-lost", Severity.CRITICAL, "gpu.0", "it is gone", "reboot")
    box.monitor.take(0, {"gpu.0.temperature": None, "host.cpu.load": 5}, findings=(finding,))
    document = box.health.document()
    assert document["readings"] == {"gpu.0.temperature": None, "host.cpu.load": 5}
    assert document["findings"] == [
        {"code": "gpu-lost", "subject": "gpu.0", "severity": "error", "text": "GPU 0: it is gone", "fix": "reboot"}
    ]


def test_memory_errors_are_told_when_they_grow_and_at_most_once_a_minute_of_each_kind() -> None:
    box = Box()
    gpus = (Gpu(0, "u", "A"),)
    for second, corrected, uncorrected in ((0, 7, 0), (1, 9, 0), (2, 400, 1), (62, 500, 1), (63, 0, 0), (200, 3, 0)):
        readings: dict[str, float | None] = {"gpu.0.ecc.corrected": corrected, "gpu.0.ecc.uncorrected": uncorrected}
        box.monitor.take(second, readings, gpus=gpus)
    told = [(e.data["kind"], e.data["more"], e.data["count"], e.data["severity"]) for e in box.events]
    assert told == [
        ("corrected", 2, 9, "info"),
        ("uncorrected", 1, 1, "error"),
        ("corrected", 491, 500, "info"),
        ("corrected", 3, 3, "info"),
    ], "what there was before the start is no news, and a counter that starts over is none either"


def test_how_a_gpu_is_cut_is_told_at_first_sight_and_when_it_changes() -> None:
    box = Box()
    first, second = MigInstance(0, "MIG-1", 2 * GIB, 0), MigInstance(1, "MIG-2", 2 * GIB, 0)
    cuts: list[tuple[bool | None, tuple[MigInstance, ...]]] = [
        (True, (first,)),
        (True, (first,)),
        (None, ()),
        (True, (first, second)),
        (False, ()),
    ]
    for moment, (mode, mig) in enumerate(cuts):
        box.monitor.take(moment, {}, gpus=(Gpu(0, "u", "A", mig=mig, mig_mode=mode),))
    assert [(event.data["mode"], event.data["instances"]) for event in box.events] == [
        (True, ["MIG-1"]),
        (True, ["MIG-1", "MIG-2"]),
        (False, []),
    ]


def test_the_governor_hears_which_devices_are_gone_and_what_to_do() -> None:
    box = Box()
    lost = Gpu(1, "v", "B", state=GpuState.LOST, reason="it fell off the bus", action="Reboot the box.")
    box.monitor.take(0, {}, gpus=(Gpu(0, "u", "A"), lost, Gpu(2, "w", "C", state=GpuState.SILENT, reason="silent")))
    assert box.judge.condemned == {"gpu:1": "it fell off the bus. Reboot the box."}
    mismatch = Finding("driver-mismatch", Severity.CRITICAL, "driver", "they differ", "Reboot the box.")
    box.monitor.take(1, {}, findings=(mismatch,))
    assert box.judge.condemned == {"gpu:*": "they differ. Reboot the box."}
    box.monitor.take(2, {}, gpus=(Gpu(0, "u", "A"), Gpu(1, "v", "B")))
    assert box.judge.condemned == {}


@pytest.mark.parametrize(("visible", "free"), [("", 3), ("MIG-2", 8), ("GPU-7,MIG-2,MIG-1", 8), ("MIG-9", 3)])
def test_of_a_gpu_in_mig_mode_models_may_take_what_the_instance_has_that_cuda_gives_them(
    monkeypatch: pytest.MonkeyPatch, visible: str, free: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    box = Box()
    mig = (MigInstance(0, "MIG-1", 4 * GIB, 1 * GIB), MigInstance(1, "MIG-2", 8 * GIB, None))
    gpus = (
        Gpu(0, "u", "A", mig=mig, mig_mode=True),
        Gpu(1, "v", "B", mig_mode=True),
        Gpu(2, "w", "C", mig_mode=True, mig=(MigInstance(0, "MIG-1", None, None),)),
    )
    box.monitor.take(0, {"gpu.0.memory.free": 20 * GIB, "gpu.1.memory.free": 20 * GIB}, gpus=gpus)
    assert box.health.gpu_capacity(0) == {"gpu:0": free * GIB, "gpu:1": 0}
    assert box.health.gpu_most(0) == {}


def test_processes_that_only_the_instances_list_are_found_and_none_counts_twice() -> None:
    box = Box()
    inside = (GpuProcess(11, GIB, 1, 0),)
    mig = (MigInstance(0, "MIG-1", 4 * GIB, GIB, inside),)
    for listed in ((), inside):
        box.monitor.take(0, {}, gpus=(Gpu(0, "u", "A", processes=listed, mig=mig, mig_mode=True),))
        assert box.health.measure([11])["gpu:0"] == GIB


def test_the_status_says_why_a_number_that_people_look_for_is_missing() -> None:
    box = Box()
    readings: dict[str, float | None] = {"gpu.0.temperature": 61, "gpu.0.power": 50, "gpu.0.memory.used": 1}
    box.monitor.take(0, {**readings, "gpu.0.utilization": None}, gpus=(Gpu(0, "u", "A"),))
    (gpu,) = box.health.document()["gpus"]
    assert list(gpu["missing"]) == ["utilization"]
    assert gpu["missing"]["utilization"]
