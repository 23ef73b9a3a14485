"""The watch over the box: who is told what of a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from appliance.core.energy import EnergyWindow
from appliance.core.readings import Finding, Gpu, GpuProcess, Severity, Snapshot
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


def test_memory_on_a_gpu_is_what_the_driver_says_of_our_processes() -> None:
    box = Box()
    gpus = (
        Gpu(0, "u", "A", processes=(GpuProcess(11, GIB), GpuProcess(12, 2 * GIB), GpuProcess(13, None))),
        Gpu(1, "v", "Orin", integrated=True, processes=(GpuProcess(11, GIB),)),
    )
    box.monitor.take(0, {"gpu.0.memory.free": 8 * GIB, "gpu.1.memory.free": 8 * GIB}, gpus=gpus)
    assert box.health.gpu_capacity(1024) == {"gpu:0": 7 * GIB}
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
