"""What can befall a GPU, one record for each: how it is scripted over the stub NVML, and what everybody must be told of it.

A table and the box that it is played on; no test. `tests/e2e/test_troubles.py` plays it before a real daemon and
`tests/page/test_troubles.py` before a real browser; `docs/troubles.md` is compared with it. A cell that is empty by nature says
so: nobody raises a finding for XID 31.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from appliance.cli.connection import Appliance
from tests.e2e.house import LONG_S, House
from tests.fakes.nvml import CARD, LOST, MISMATCH, RESET_REQUIRED, StubNvml

GIB = 1 << 30
DRIVER = "615.71"
"""What runs, and lies on disk, while all is well; the version that the stub's driver answers, too."""

CARD_NAME = str(CARD["name"])
PATIENCE_S = 15.0
"""Nothing takes a third of it; it is there so that what never comes becomes a failure."""

PRIORITIES = (1, 8, 12)
"""High, normal, low."""

HOST_MODEL, GPU_MODEL = "echo", "vision"
RESET = "nvidia-smi --gpu-reset"
COOLING = "see to the cooling"
LOOK_AT_THE_FAN = "Look whether it turns"
REBOOT = "Reboot the box"
REBOOT_LATER = "Reboot at the next chance"

Grade = Literal["good", "note", "warning", "error"]


class Line(msgspec.Struct, frozen=True):
    """A line of `appliance doctor` that is there during the trouble and neither before nor after."""

    check: str
    grade: Grade
    words: str
    fix: str = ""


class Told(msgspec.Struct, frozen=True):
    """An event of the flight recorder: its kind, severity, and some of its fields."""

    kind: str
    severity: str
    fields: dict[str, Any] = {}


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """One row. `values` of the stub's table (None: the driver does not answer it any more), an `xid` before them, the version of
    the driver's `library` on disk. `begins`/`ends` "restart": it takes the daemon's next start, as a reset or reboot implies.

    `metrics` and `healthy` are series and values during, and before and after (None: no such series); `grown` are counters and by
    how much, `above` are series and what they exceed. `check` is the exit status of `appliance check`. `refused_from`: the lowest
    priority number that is refused, with `refusal` in the words and `retry_after_s`; `gpu_refusal`: what a model on that GPU
    answers to everybody. `page`, `sentence` and `shown` are the verdict of the page's overview, `view` stands elsewhere on it.
    """

    name: str
    title: str
    values: dict[str, object | None] = {}
    xid: int = 0
    library: str = ""
    begins: Literal["live", "restart"] = "live"
    ends: Literal["live", "restart"] = "live"
    level: str = "NOMINAL"
    level_reason: str = ""
    state: str = "OK"
    throttle: tuple[str, ...] = ()
    finding: str = ""
    event: Told
    over: Told | None = None
    metrics: dict[str, float]
    healthy: dict[str, float | None] = {}
    grown: dict[str, float] = {}
    above: dict[str, float] = {}
    missing: dict[str, str] = {}
    doctor: tuple[Line, ...] = ()
    check: int = 0
    refused_from: int = 17
    refusal: str = ""
    retry_after_s: int = 1
    gpu_refusal: str = ""
    page: Literal["good", "notice", "bad"] = "good"
    sentence: str = "All is well"
    shown: tuple[str, ...] = ()
    view: tuple[str, ...] = ()
    do: str


def raised(code: str, severity: str = "warning") -> Told:
    return Told("finding.raised", severity, {"code": code})


def cleared(code: str) -> Told:
    return Told("finding.cleared", "info", {"code": code})


def finding(code: str, severity: str = "warning", subject: str = "gpu.0") -> str:
    return f'appliance_finding{{code="{code}",severity="{severity}",subject="{subject}"}}'


COOL = Told("governor.level", "info", {"level": "NOMINAL"})
LEVEL = "appliance_governor_level"
LOST_STATE = 'appliance_gpu_state{gpu="0",state="LOST"}'
TEMPERATURE = 'appliance_gpu_temperature_celsius{gpu="0"}'
BLIND = "it was at 61 °C"

TROUBLES = (
    Trouble(
        name="warm",
        title="It heats up",
        values={"0.margin": 10, "0.temperature": 85},
        level="WARM",
        level_reason="GPU 0 is at 85 °C",
        event=Told("governor.level", "warning", {"level": "WARM"}),
        over=COOL,
        metrics={LEVEL: 1, TEMPERATURE: 85, "appliance_governor_builds_allowed": 0},
        healthy={LEVEL: 0, TEMPERATURE: 61, "appliance_governor_builds_allowed": 1},
        doctor=(Line("governor", "warning", "WARM: GPU 0 is at 85 °C", COOLING),),
        check=1,
        page="notice",
        sentence="One thing to know about",
        shown=("Warm: GPU 0 is at 85 °C", "background builds wait"),
        do="See to the cooling. Background builds of engines wait by themselves.",
    ),
    Trouble(
        name="throttled",
        title="It is hot and throttles",
        values={"0.margin": 5, "0.temperature": 90, "0.reasons": 0x20},
        level="HOT",
        level_reason="it reports software thermal slowdown",
        throttle=("SwThermalSlowdown",),
        event=Told("gpu.throttle", "warning", {"gpu": 0, "reasons": ["SwThermalSlowdown"]}),
        over=Told("gpu.throttle", "info", {"gpu": 0, "reasons": []}),
        metrics={LEVEL: 2, 'appliance_gpu_throttle{gpu="0",reason="SwThermalSlowdown"}': 1},
        healthy={LEVEL: 0, 'appliance_gpu_throttle{gpu="0",reason="SwThermalSlowdown"}': 0},
        doctor=(Line("governor", "error", "HOT: GPU 0 is at 90 °C", COOLING),),
        check=2,
        refused_from=9,
        refusal="is not served now: GPU 0 is at 90 °C",
        page="bad",
        sentence="One thing needs you",
        shown=("Hot: GPU 0 is at 90 °C", "software thermal slowdown", "priorities 9 and lower are refused"),
        do="See to the cooling; `appliance history gpu.0.temperature` shows since when.",
    ),
    Trouble(
        name="critical",
        title="It is about to switch itself off",
        values={"0.margin": 0, "0.temperature": 95, "0.reasons": 0x40},
        level="CRITICAL",
        level_reason="hardware thermal slowdown",
        throttle=("HwThermalSlowdown",),
        event=Told("governor.level", "error", {"level": "CRITICAL", "max_priority": 1}),
        over=COOL,
        metrics={
            LEVEL: 3,
            'appliance_governor_state{level="CRITICAL"}': 1,
            'appliance_gpu_throttle{gpu="0",reason="HwThermalSlowdown"}': 1,
            'appliance_gpu_temperature_margin_celsius{gpu="0"}': 0,
        },
        healthy={LEVEL: 0, 'appliance_governor_state{level="CRITICAL"}': 0},
        doctor=(Line("governor", "error", "CRITICAL: GPU 0 is at 95 °C", COOLING),),
        check=2,
        refused_from=2,
        refusal="is not served now: GPU 0 is at 95 °C",
        page="bad",
        sentence="One thing needs you",
        shown=("Critical: GPU 0 is at 95 °C", "only priority 1 is served"),
        do="Take load off, see to the cooling now.",
    ),
    Trouble(
        name="fan",
        title="A fan stands still",
        values={"0.fan.0": 0, "0.temperature": 78, "0.margin": 17},
        finding="gpu-fan-stopped",
        event=raised("gpu-fan-stopped"),
        over=cleared("gpu-fan-stopped"),
        metrics={finding("gpu-fan-stopped"): 1, 'appliance_gpu_fan_ratio{gpu="0",fan="0"}': 0, LEVEL: 0},
        healthy={finding("gpu-fan-stopped"): None, 'appliance_gpu_fan_ratio{gpu="0",fan="0"}': 0.45},
        doctor=(Line("hardware", "warning", "GPU 0: a fan stands still at 78 °C", LOOK_AT_THE_FAN),),
        check=1,
        page="notice",
        sentence="One thing to know about",
        shown=("GPU 0: a fan stands still at 78 °C", LOOK_AT_THE_FAN),
        do="Look whether it turns and is clean.",
    ),
    Trouble(
        name="xid-31",
        title="XID 31, an application's fault",
        xid=31,
        event=Told("gpu.xid", "error", {"gpu": 0, "data": 31}),
        metrics={LEVEL: 0, 'appliance_gpu_state{gpu="0",state="OK"}': 1, 'appliance_findings{severity="critical"}': 0},
        grown={'appliance_gpu_xids_total{gpu="0",xid="31"}': 1},
        view=("XID 31", "The worker is replaced by itself"),
        do="Nothing: the worker is replaced by itself. If it comes back, suspect the model or the driver.",
    ),
    Trouble(
        name="xid-79",
        title="XID 79, it has fallen off the bus",
        xid=79,
        values={"0.error": LOST},
        ends="restart",
        level="WARM",
        level_reason="GPU 0 cannot be read (XID 79: the GPU has fallen off the bus)",
        state="LOST",
        finding="gpu-lost",
        event=Told("gpu.xid", "error", {"gpu": 0, "data": 79}),
        metrics={finding("gpu-lost", "critical"): 1, LOST_STATE: 1, LEVEL: 1},
        healthy={finding("gpu-lost", "critical"): None, LOST_STATE: 0, LEVEL: 0},
        grown={'appliance_gpu_xids_total{gpu="0",xid="79"}': 1},
        missing={"gpu.0.temperature": "XID 79"},
        doctor=(
            Line(
                "governor", "warning", f"WARM: GPU 0 cannot be read (XID 79: the GPU has fallen off the bus); {BLIND}"
            ),
            Line("hardware", "error", "GPU 0: XID 79: the GPU has fallen off the bus", REBOOT),
        ),
        check=2,
        gpu_refusal="GPU 0 cannot be used: XID 79: the GPU has fallen off the bus. Reboot the box",
        retry_after_s=60,
        page="bad",
        sentence="One thing needs you",
        shown=("GPU 0: XID 79: the GPU has fallen off the bus", REBOOT),
        view=("Lost", "Reboot the box"),
        do="Reboot the box; if it comes back, check the card's seat, its power cables and the power supply.",
    ),
    Trouble(
        name="lost",
        title="It is lost without a word",
        values={"0.error": LOST},
        ends="restart",
        level="WARM",
        level_reason="GPU 0 cannot be read (the GPU has fallen off the bus)",
        state="LOST",
        finding="gpu-lost",
        event=raised("gpu-lost", "error"),
        metrics={finding("gpu-lost", "critical"): 1, LOST_STATE: 1, LEVEL: 1},
        healthy={finding("gpu-lost", "critical"): None, LOST_STATE: 0, LEVEL: 0},
        missing={"gpu.0.temperature": "the GPU has fallen off the bus"},
        doctor=(
            Line("governor", "warning", f"WARM: GPU 0 cannot be read (the GPU has fallen off the bus); {BLIND}"),
            Line("hardware", "error", "GPU 0: the GPU has fallen off the bus", REBOOT),
        ),
        check=2,
        gpu_refusal="GPU 0 cannot be used: the GPU has fallen off the bus. Reboot the box",
        retry_after_s=60,
        page="bad",
        sentence="One thing needs you",
        shown=("GPU 0: the GPU has fallen off the bus", REBOOT),
        view=("Lost", "Reboot the box"),
        do="Reboot the box; if it comes back, check the card's seat, its power cables and the power supply.",
    ),
    Trouble(
        name="reset-required",
        title="The driver wants it reset",
        values={"0.error.nvmlDeviceGetPowerUsage": RESET_REQUIRED, "0.field.230": 1},
        state="RESET_REQUIRED",
        finding="gpu-reset-required",
        event=raised("gpu-reset-required", "error"),
        over=cleared("gpu-reset-required"),
        metrics={
            finding("gpu-reset-required", "critical"): 1,
            'appliance_gpu_recovery_action{gpu="0"}': 1,
            'appliance_gpu_state{gpu="0",state="RESET_REQUIRED"}': 1,
        },
        healthy={finding("gpu-reset-required", "critical"): None, 'appliance_gpu_recovery_action{gpu="0"}': 0},
        missing={"gpu.0.power": "the GPU needs a reset"},
        doctor=(Line("hardware", "error", "GPU 0: the GPU needs a reset", RESET),),
        check=2,
        page="bad",
        sentence="One thing needs you",
        shown=("GPU 0: the GPU needs a reset", RESET),
        view=("Needs a reset",),
        do="Stop the appliance, run `nvidia-smi --gpu-reset`, start it again; if that is refused, reboot.",
    ),
    Trouble(
        name="ecc-corrected",
        title="ECC corrects memory errors",
        values={"0.ecc.corrected": 41},
        event=Told("gpu.ecc", "info", {"gpu": 0, "kind": "corrected", "more": 40, "count": 41}),
        metrics={'appliance_gpu_ecc_corrected_total{gpu="0"}': 41, 'appliance_findings{severity="warning"}': 0},
        healthy={'appliance_gpu_ecc_corrected_total{gpu="0"}': 1},
        view=("40 corrected memory errors",),
        do="Nothing: that is what ECC is for. Watch whether it grows.",
    ),
    Trouble(
        name="ecc-uncorrected",
        title="ECC meets errors that it cannot correct",
        xid=48,
        values={"0.ecc.uncorrected": 2},
        ends="restart",
        finding="gpu-ecc-uncorrected",
        event=Told("gpu.ecc", "error", {"gpu": 0, "kind": "uncorrected", "more": 2, "count": 2}),
        metrics={
            finding("gpu-ecc-uncorrected"): 1,
            finding("gpu-xid", "critical"): 1,
            'appliance_gpu_ecc_uncorrected_total{gpu="0"}': 2,
        },
        healthy={
            finding("gpu-ecc-uncorrected"): None,
            finding("gpu-xid", "critical"): None,
            'appliance_gpu_ecc_uncorrected_total{gpu="0"}': 0,
        },
        grown={'appliance_gpu_xids_total{gpu="0",xid="48"}': 1},
        doctor=(
            Line("hardware", "warning", "GPU 0: 2 uncorrected memory errors since the driver was loaded", RESET),
            Line("hardware", "error", "GPU 0: XID 48: an uncorrectable memory error", RESET),
        ),
        check=2,
        page="bad",
        sentence="One thing needs you",
        shown=("GPU 0: XID 48: an uncorrectable memory error", "GPU 0: 2 uncorrected memory errors", RESET),
        do="Reset the GPU (stop the appliance, `nvidia-smi --gpu-reset`) or reboot; if it comes back, replace the card.",
    ),
    Trouble(
        name="rows-pending",
        title="A damaged memory row waits to be replaced",
        values={"0.rows.pending": 1},
        finding="gpu-rows-pending",
        event=raised("gpu-rows-pending"),
        over=cleared("gpu-rows-pending"),
        metrics={finding("gpu-rows-pending"): 1, 'appliance_gpu_rows_pending{gpu="0"}': 1},
        healthy={finding("gpu-rows-pending"): None, 'appliance_gpu_rows_pending{gpu="0"}': 0},
        doctor=(Line("hardware", "warning", "GPU 0: row remapping pending", "Reset the GPU at the next stop"),),
        check=1,
        page="notice",
        sentence="One thing to know about",
        shown=("GPU 0: row remapping pending", "Reset the GPU at the next stop"),
        do="Reset the GPU at the next stop of the appliance (`nvidia-smi --gpu-reset`), or reboot.",
    ),
    Trouble(
        name="rows-failed",
        title="A damaged memory row could not be replaced",
        values={"0.rows.failed": 1},
        finding="gpu-rows-failed",
        event=raised("gpu-rows-failed", "error"),
        over=cleared("gpu-rows-failed"),
        metrics={finding("gpu-rows-failed", "critical"): 1, 'appliance_gpu_rows_failed{gpu="0"}': 1},
        healthy={finding("gpu-rows-failed", "critical"): None, 'appliance_gpu_rows_failed{gpu="0"}': 0},
        doctor=(Line("hardware", "error", "GPU 0: row remapping failed", "Have the card replaced"),),
        check=2,
        page="bad",
        sentence="One thing needs you",
        shown=("GPU 0: row remapping failed", "Have the card replaced"),
        do="Have the card replaced.",
    ),
    Trouble(
        name="hang",
        title="NVIDIA's driver hangs",
        values={"0.hang": 1},
        level="WARM",
        level_reason="GPU 0 cannot be read (the driver has not answered",
        state="SILENT",
        finding="sensor-silent",
        event=raised("sensor-silent", "error"),
        over=cleared("sensor-silent"),
        metrics={
            finding("sensor-silent", "critical", "nvml"): 1,
            'appliance_gpu_state{gpu="0",state="SILENT"}': 1,
            'appliance_reading_missing{reading="gpu.0.temperature"}': 1,
            LEVEL: 1,
        },
        above={'appliance_sensor_silent_seconds{sensor="nvml"}': 0.5},
        healthy={
            finding("sensor-silent", "critical", "nvml"): None,
            'appliance_sensor_silent_seconds{sensor="nvml"}': 0,
            'appliance_reading_missing{reading="gpu.0.temperature"}': None,
            TEMPERATURE: 61,
            LEVEL: 0,
        },
        missing={"gpu.0.temperature": "the driver has not answered for"},
        doctor=(
            Line("governor", "warning", "WARM: GPU 0 cannot be read (the driver has not answered"),
            Line("hardware", "error", "NVIDIA driver: it has not answered for", "If it stays"),
            Line("GPU", "note", "not asked: the driver hangs"),
        ),
        check=2,
        page="bad",
        sentence="One thing needs you",
        shown=("NVIDIA driver: it has not answered for", "If it stays, the driver hangs: reboot the box"),
        view=("Silent",),
        do="If it stays, reboot the box: what hangs in the kernel cannot be ended.",
    ),
    Trouble(
        name="drift",
        title="The driver was upgraded underneath, before the next start",
        library="620.10",
        finding="driver-drift",
        event=raised("driver-drift"),
        over=cleared("driver-drift"),
        metrics={finding("driver-drift", subject="driver"): 1, TEMPERATURE: 61, LEVEL: 0},
        healthy={finding("driver-drift", subject="driver"): None},
        doctor=(
            Line(
                "hardware",
                "warning",
                f"NVIDIA driver: reboot pending: version {DRIVER} runs, but its libraries on disk are 620.10",
                REBOOT_LATER,
            ),
        ),
        check=1,
        page="notice",
        sentence="One thing to know about",
        shown=(f"reboot pending: version {DRIVER} runs, but its libraries on disk are 620.10", REBOOT_LATER),
        do="Reboot at the next chance: what runs goes on, what starts anew may fail.",
    ),
    Trouble(
        name="mismatch",
        title="The driver was upgraded underneath, after the next start",
        values={"init": MISMATCH},
        library="620.10",
        begins="restart",
        ends="restart",
        state="",
        finding="driver-mismatch",
        event=raised("driver-mismatch", "error"),
        metrics={finding("driver-mismatch", "critical", "driver"): 1, LEVEL: 0},
        healthy={finding("driver-mismatch", "critical", "driver"): None},
        doctor=(Line("hardware", "error", "NVIDIA driver: the NVIDIA driver and its library on disk differ", REBOOT),),
        check=2,
        gpu_refusal="GPU 0 cannot be used: the NVIDIA driver and its library on disk differ. Reboot the box",
        retry_after_s=60,
        page="bad",
        sentence="One thing needs you",
        shown=("the NVIDIA driver and its library on disk differ", REBOOT),
        do="Reboot the box.",
    ),
    Trouble(
        name="mig",
        title="It is cut into MIG instances",
        values={
            "0.utilization": None,
            "0.mig.0.uuid": "MIG-one",
            "0.mig.0.memory.total": 12 * GIB,
            "0.mig.0.memory.used": 1 * GIB,
            "0.mig.1.uuid": "MIG-two",
            "0.mig.1.memory.total": 6 * GIB,
            "0.mig.1.memory.used": 2 * GIB,
            "0.mig": 7,
        },
        event=Told("gpu.mig", "info", {"gpu": 0, "mode": True, "instances": ["MIG-one", "MIG-two"]}),
        over=Told("gpu.mig", "info", {"gpu": 0, "mode": False, "instances": []}),
        metrics={
            'appliance_mig_instances{gpu="0"}': 2,
            'appliance_mig_memory_total_bytes{gpu="0",mig="0"}': 12 * GIB,
            'appliance_mig_memory_used_bytes{gpu="0",mig="1"}': 2 * GIB,
            'appliance_reading_missing{reading="gpu.0.utilization"}': 1,
            TEMPERATURE: 61,
        },
        healthy={
            'appliance_mig_instances{gpu="0"}': None,
            'appliance_mig_memory_total_bytes{gpu="0",mig="0"}': None,
            'appliance_gpu_utilization_ratio{gpu="0"}': 0.37,
        },
        missing={"gpu.0.utilization": "the driver does not tell it while the GPU is cut into MIG instances"},
        doctor=(
            Line("GPU 0", "good", f"{CARD_NAME}, MIG: 2 instances (12.9 GB + 6.4 GB), of which a worker gets one"),
        ),
        view=(
            "GPU 0 · MIG 0",
            "1.07 GB",
            "in use of 12.9 GB",
            "GPU 0 · MIG 1",
            "2.15 GB",
            "in use of 6.44 GB",
            "cut into MIG instances",
        ),
        do="Nothing: models run on the first instance, or on the one that CUDA_VISIBLE_DEVICES names, and its memory counts.",
    ),
    Trouble(
        name="mig-empty",
        title="MIG is on, without an instance",
        values={"0.utilization": None, "0.mig": 7},
        finding="gpu-mig-empty",
        event=raised("gpu-mig-empty"),
        over=cleared("gpu-mig-empty"),
        metrics={'appliance_mig_instances{gpu="0"}': 0, finding("gpu-mig-empty"): 1},
        healthy={'appliance_mig_instances{gpu="0"}': None, finding("gpu-mig-empty"): None},
        missing={"gpu.0.utilization": "MIG instances"},
        doctor=(
            Line("hardware", "warning", "GPU 0: MIG is on and there is no instance", "nvidia-smi mig -cgi"),
            Line("GPU 0", "good", f"{CARD_NAME}, MIG"),
        ),
        check=1,
        page="notice",
        sentence="One thing to know about",
        shown=("GPU 0: MIG is on and there is no instance", "nvidia-smi mig -cgi"),
        do="Make instances (`nvidia-smi mig -cgi PROFILE -C`), or switch MIG off (`nvidia-smi -mig 0`); then start anew.",
    ),
    Trouble(
        name="unified",
        title="It shares the host's memory (GB10, Thor, Jetson)",
        values={"0.name": "NVIDIA GB10", "0.memory.total": None, "0.memory.used": None, "0.memory.reserved": None},
        begins="restart",
        ends="restart",
        event=Told("daemon.start", "info"),
        metrics={'appliance_gpu_memory_used_bytes{gpu="0"}': 1 * GIB, 'appliance_findings{severity="warning"}': 0},
        healthy={'appliance_gpu_memory_total_bytes{gpu="0"}': 20 * GIB},
        doctor=(Line("GPU 0", "good", "NVIDIA GB10, shares the host's memory"),),
        view=("Memory used", "NVIDIA GB10 · the host's memory"),
        do="Nothing: models on it are booked on the host's memory.",
    ),
)


class Box:
    """The house with its GPU and its file system, on which troubles are played."""

    def __init__(self, folder: Path) -> None:
        self.nvml = StubNvml(_made(folder / "nvml")).start()
        self.root = folder / "root"
        self.house = House(folder / "house")
        self.house.environment = self.nvml.environment()
        self.house.loopback(HOST_MODEL, shape="4")
        self.house.loopback(GPU_MODEL, 'device = "cuda"\n', shape="4")
        self.house.settings["sensors"] = {"interval_s": 0.1, "deadline_s": 0.5, "root": str(self.root)}
        self.house.settings["governor"] = {"dwell_s": 0.2, "max_dwell_s": 0.4, "lookahead_s": 0.0, "blind_s": 0.5}
        self._file_system()

    def _file_system(self) -> None:
        """Where /proc and /dev are as they are, and the driver's files are ours."""
        (_made(self.root / "dev") / "nvidiactl").touch()
        for name in ("stat", "meminfo", "loadavg", "pressure"):
            (_made(self.root / "proc") / name).symlink_to(f"/proc/{name}")
        version = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {DRIVER}  Tue Sep 1 00:00:00 UTC 2026\n"
        (_made(self.root / "proc/driver/nvidia") / "version").write_text(version)
        self.install_library(DRIVER)

    def install_library(self, version: str) -> None:
        """What a package upgrade does: the new file, then the soname on it."""
        folder = _made(self.root / "usr/lib/x86_64-linux-gnu")
        (folder / f"libnvidia-ml.so.{version}").touch()
        (folder / "next").symlink_to(f"libnvidia-ml.so.{version}")
        (folder / "next").rename(folder / "libnvidia-ml.so.1")

    def start(self) -> Box:
        self.house.start()
        # the port stays the same from one start to the next
        self.house.settings["http"] = {"port": int(self.house.http.rpartition(":")[2])}
        return self

    def restart(self, between: Callable[[], object] = lambda: None) -> None:
        assert self.house.stop() == 0
        between()
        self.nvml.forget_events()
        self.house.start()

    def begin(self, trouble: Trouble) -> None:
        if trouble.xid:
            self.nvml.event(0, trouble.xid)
        self.nvml.put(trouble.values)
        if trouble.library:
            self.install_library(trouble.library)
        if trouble.begins == "restart":
            self.restart()

    def end(self, trouble: Trouble) -> None:
        """Somebody has mended it: cooled, replaced, reset, rebooted."""
        self.nvml.put({key: CARD.get(key.removeprefix("0.")) for key in trouble.values})
        if trouble.library:
            self.install_library(DRIVER)
        if trouble.ends == "restart":
            self.restart()

    def heal(self) -> None:
        """Whatever was played before: a healthy card, and a daemon that knows nothing else."""
        self.nvml.close()
        self.nvml.put({key: None for trouble in TROUBLES for key in trouble.values})
        self.nvml.card(0)
        self.install_library(DRIVER)
        self.restart()
        self.until(healthy)

    def finish(self) -> None:
        self.nvml.close()
        self.house.finish()

    # --- what it says ---------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        return Appliance(self.house.http).get(path)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = self.get("/v2/appliance/status")
        return document

    def until(self, condition: Callable[[dict[str, Any]], bool], limit_s: float = PATIENCE_S) -> dict[str, Any]:
        """The first status document that fulfils the condition. What is waited for happens in another process."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            document = self.status()
            if condition(document):
                return document
            time.sleep(0.03)
        raise AssertionError(f"not within {limit_s} s: {json.dumps(without_series(self.status()))[:4000]}")

    def series(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.house.http}/metrics", timeout=LONG_S) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def without_series(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "readings"}


def healthy(document: dict[str, Any]) -> bool:
    """Nothing is the matter: what is so before every trouble, and after it."""
    return (
        bool(document["gpus"])
        and document["gpus"][0]["name"] == CARD_NAME
        and document["gpus"][0]["state"] == "OK"
        and not document["gpus"][0]["mig_mode"]
        and not document["findings"]
        and document["governor"]["level"] == "NOMINAL"
        and document["readings"]["gpu.0.temperature"] == CARD["temperature"]
        and document["readings"]["gpu.0.utilization"] == CARD["utilization"]
        and document["readings"]["gpu.0.ecc.corrected"] == CARD["ecc.corrected"]
        and document["readings"]["gpu.0.ecc.uncorrected"] == 0
        and document["status"]["ready"]
    )


def arrived(trouble: Trouble) -> Callable[[dict[str, Any]], bool]:
    """The trouble has reached the status document whole."""

    def has(document: dict[str, Any]) -> bool:
        gpu = document["gpus"][0] if document["gpus"] else {"state": "", "throttle": [], "missing": {}, "mig": []}
        codes = {found["code"] for found in document["findings"]}
        slices = sum(key.startswith("0.mig.") and key.endswith(".uuid") for key in trouble.values)
        return (
            document["governor"]["level"] == trouble.level
            and trouble.level_reason in document["governor"]["reason"]
            and gpu["state"] == trouble.state
            and tuple(gpu["throttle"]) == trouble.throttle
            and (trouble.finding in codes if trouble.finding else not codes)
            and all(
                words in gpu["missing"].get(name.removeprefix("gpu.0."), "") for name, words in trouble.missing.items()
            )
            and len(gpu["mig"]) == slices
        )

    return has


def kinds(trouble: Trouble) -> set[str]:
    """The kinds of events that it brings, of those that speak of hardware: these and no others."""
    found = {"finding.raised"} if trouble.finding else set()
    found |= {"gpu.throttle"} if trouble.throttle else set()
    found |= {"gpu.xid"} if trouble.xid else set()
    found |= {trouble.event.kind} if trouble.event.kind.startswith("gpu.") else set()
    return found | ({"governor.level"} if trouble.level != "NOMINAL" else set())


def row(trouble: Trouble) -> str:
    """Its line in docs/troubles.md."""
    events = ", ".join(f"`{kind}`" for kind in sorted(kinds(trouble)))
    series = next(iter({**trouble.grown, **trouble.metrics}))
    if trouble.gpu_refusal:
        clients = "models on it: UNAVAILABLE; others: served"
    elif trouble.refused_from < 17:
        clients = f"priorities {trouble.refused_from} to 16: UNAVAILABLE; higher ones: served"
    else:
        clients = "all served"
    cells = (
        trouble.title,
        trouble.level,
        f"`{trouble.finding}`" if trouble.finding else "none",
        events or "none",
        f"`{series}`",
        clients,
        str(trouble.check),
        trouble.do,
    )
    return f"| {' | '.join(cells)} |"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
