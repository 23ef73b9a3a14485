"""TensorRT in a real appliance: real processes, over a stub of libcuda.so.1 and a stand-in for the library.

What cannot be seen here is the GPU's own behaviour; tests/gpu is for that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from appliance.cli.connection import Appliance
from appliance.client import Client
from appliance.core.errors import ApplianceError, ErrorCode
from tests.e2e.house import LONG_S, House
from tests.e2e.test_compiling import GOLDEN, Asking, _command, _parameters, _reason, _shown
from tests.e2e.test_device_faults import ready
from tests.fakes import cuda_stub

WISH = 'engine = "tensorrt"\ndevice = "cuda"\nfallback = "cpu"\n'


class Box:
    """A house over the stub: its GPU can be described, made to fail, and its builds held."""

    def __init__(self, house: House, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.house = house
        self.folder = cuda_stub.build(folder)
        self.held = folder / "held"
        self._monkeypatch = monkeypatch
        self.setenv(cuda_stub.environment(self.folder) | {"TENSORRT_FAKE_HOLD": str(self.held)})
        house.settings["workers"] = {"crash_limit": 3, "backoff_initial_s": 0.3, "backoff_max_s": 0.3}

    def setenv(self, values: dict[str, str]) -> None:
        for name, value in values.items():
            self._monkeypatch.setenv(name, value)

    def fail(self, *rules: str) -> None:
        (self.folder / "failures").write_text("\n".join(rules))

    def model(self, name: str = "digits", more: str = "") -> None:
        self.house.digits(name)
        manifest = self.house.models / name / "model.toml"
        manifest.write_text(f"{WISH}{manifest.read_text()}\n{more}")

    def serving(self, name: str = "digits") -> list[dict[str, Any]]:
        workers = Appliance(self.house.http).get("/v2/appliance/workers")
        return [worker for worker in workers if worker["model"] == name]

    def until_switched(self, name: str = "digits") -> None:
        self.house.wait_for("model.state", model=name, state="VERIFYING")
        self.house.wait_for("model.state", model=name, state="READY")
        self.house.wait_for("model.state", model=name, state="UNLOADED")

    def until_reason(self, words: str) -> None:
        """Until some model's reason in the index has these words."""
        end = time.monotonic() + LONG_S
        while words not in (said := self.reasons()):
            assert "FAILED" not in said, said
            assert time.monotonic() < end, said
            # the index is asked, since it is what people look at; no event tells that it has changed
            threading.Event().wait(0.01)

    def reasons(self) -> str:
        return "; ".join(entry["reason"] for entry in Appliance(self.house.http).post("/v2/repository/index"))

    def plans(self) -> set[Path]:
        return set((self.house.models / ".engines").glob("*/[0-9a-f]*/model.plan"))

    def builders(self) -> list[psutil.Process]:
        alive = [child for child in self.house.children() if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in alive if "appliance.building.job" in " ".join(child.cmdline())]


@pytest.fixture
def box(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(house, tmp_path / "stub", monkeypatch)


class Listening:
    """The events of an appliance, from now on."""

    def __init__(self, house: House) -> None:
        self.heard: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._stream = urllib.request.urlopen(f"{house.http}/v2/appliance/events", timeout=LONG_S)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            with self._changed:
                self.heard.append(json.loads(line))
                self._changed.notify_all()

    def wait_for(self, topic: str, **fields: Any) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [
                event
                for event in self.heard
                if event["topic"] == topic and all(event["data"].get(key) == value for key, value in fields.items())
            ]

        with self._changed:
            assert self._changed.wait_for(found, LONG_S), self.heard
            return found()[0]


def test_onnx_runtime_serves_until_the_plan_does_and_no_request_is_lost(box: Box) -> None:
    house = box.house
    box.model()
    box.held.touch()
    house.start()
    [worker] = box.serving()
    assert (worker["provider"], worker["engine"]) == ("CPUExecutionProvider", "")
    events = Listening(house)
    with Asking(house) as asking:
        box.until_reason("tensorrt: BUILDING building 54 %")
        assert _reason(house)[0] == "READY"
        listed = _command(house, "models", "list")[1]
        assert "tensorrt: BUILDING building 54 %" in listed
        [builder] = box.builders()
        assert builder.nice() == min(19, psutil.Process().nice() + 10)
        box.held.unlink()
        progress = events.wait_for("model.progress", model="digits", phase="building", percent=98.0)
        assert progress["data"]["state"] == "BUILDING"
        box.until_switched()
        before = asking.answers
        while asking.answers < before + 50 and not asking.wrong:
            asking._some.wait(0.01)
    assert asking.wrong == []
    [worker] = box.serving()
    assert (worker["provider"], worker["engine"]) == ("TensorRT 11.4.0", "tensorrt")
    details = worker["details"]
    assert details["device"] == "cuda:0 Stub GPU, compute capability 8.9"
    assert details["host_memory"] == "pinned"
    assert details["profiles"] == "image [1, 28, 28, 1] to [32, 28, 28, 1]"
    assert "captured, 0 refused" in details["cuda_graphs"]
    assert _parameters(house)["appliance.engine"] == "tensorrt"
    assert "tensorrt of digits passed" in _shown(house).stdout
    assert _reason(house) == ("READY", "")
    assert house.stop() == 0


def test_a_sticky_error_ends_the_worker_and_want_of_memory_a_request(box: Box) -> None:
    house = box.house
    box.model()
    house.start()
    box.until_switched()
    with Client(house.ipc, timeout_s=LONG_S) as client:
        box.fail("cuMemcpyHtoDAsync_v2=2")
        with pytest.raises(ApplianceError, match="OUT_OF_MEMORY") as caught:
            client.infer("digits", {"image": GOLDEN["image"][:1]})
        assert caught.value.code is ErrorCode.ENGINE_FAULT
        box.fail()
        [before] = house.worker_pids("digits")
        with Asking(house) as asking:
            box.fail("cuStreamSynchronize=700")
            lost = house.wait_for("worker.lost", model="digits")
            assert [ready(house, path) for path in ("/v2/models/digits/ready", "/v2/health/ready")] == [False, False]
            box.fail()
            house.wait_for("worker.replaced", model="digits", restarts=1)
            answers = asking.answers
            while asking.answers < answers + 50 and not asking.wrong:
                asking._some.wait(0.01)
        assert asking.wrong == []
    assert (lost["pid"], lost["device_fault"]) == (before, True)
    assert "cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700)" in lost["reason"]
    assert ready(house, "/v2/health/ready")
    [worker] = box.serving()
    assert (worker["engine"], worker["restarts"]) == ("tensorrt", 1)
    assert house.stop() == 0


@pytest.mark.slow
def test_whatever_a_plan_depends_on_another_is_built_and_an_altered_one_is_never_loaded(box: Box) -> None:
    house = box.house
    box.model()
    house.start()
    box.until_switched()
    assert house.stop() == 0
    [plan] = box.plans()
    good = plan.read_bytes()

    def comes_up(*, building: bool) -> None:
        house.log.clear()
        house.start()
        states = [entry.get("state") for entry in house.log]
        if building:
            assert "VERIFYING" not in states
            with Asking(house, clients=1) as asking:
                box.until_switched()
            assert asking.wrong == []
        assert ("BUILDING" in [entry.get("state") for entry in house.log]) == building
        assert box.serving()[0]["engine"] == "tensorrt"
        assert house.stop() == 0

    comes_up(building=False)
    # a plan that runs, and answers something else: only its seal says that this box did not make it so
    altered = json.loads(good) | {"off_by": 1.0}
    plan.write_text(json.dumps(altered))
    comes_up(building=True)
    assert plan.read_bytes() == good
    for change in ("name=Other GPU", "cuda=14000", "version"):
        if change == "version":
            box.setenv(cuda_stub.install(box.folder, "11.5.0.3"))
        else:
            (box.folder / "device").write_text(f"{change}\n")
        known = box.plans()
        comes_up(building=True)
        assert len(box.plans() - known) == 1, change
        comes_up(building=False)
    assert _same_digest_again(box, good)


def _same_digest_again(box: Box, good: bytes) -> bool:
    """Back on the old card with the old library, the first plan is found: nothing is built."""
    (box.folder / "device").write_text("")
    box.setenv(cuda_stub.install(box.folder, cuda_stub.VERSION))
    box.house.log.clear()
    box.house.start()
    assert box.serving()[0]["engine"] == "tensorrt"
    return "BUILDING" not in [entry.get("state") for entry in box.house.log] and box.house.stop() == 0


def test_a_gpu_without_room_keeps_the_plan_and_the_model_serves_on_the_cpu_meanwhile(box: Box) -> None:
    house = box.house
    box.model()
    house.start()
    box.until_switched()
    assert house.stop() == 0
    plans = box.plans()
    box.fail("cuMemAlloc_v2=2")
    house.log.clear()
    house.start()
    state, reason = _reason(house)
    assert state == "READY"
    assert reason.startswith("tensorrt: FAILED the GPU has no room for")
    assert box.serving()[0]["provider"] == "CPUExecutionProvider"
    assert box.plans() == plans
    box.fail()
    Appliance(house.http).post("/v2/repository/models/digits/load")
    assert box.serving()[0]["engine"] == "tensorrt"
    assert _reason(house) == ("READY", "")
    assert "BUILDING" not in [entry.get("state") for entry in house.log]


def test_an_unload_ends_the_build_of_a_plan_and_leaves_nothing(box: Box) -> None:
    house = box.house
    box.model()
    box.held.touch()
    house.start()
    box.until_reason("building 54 %")
    assert _reason(house)[0] == "READY"
    assert box.builders()
    Appliance(house.http).post("/v2/repository/models/digits/unload")
    assert box.builders() == []
    assert _reason(house) == ("UNAVAILABLE", "unloaded")
    assert not list((house.models / ".engines" / "digits").glob(".staging-*"))
    assert box.plans() == set()


def test_two_models_are_built_one_after_the_other_and_both_switch(box: Box) -> None:
    house = box.house
    box.model()
    box.model("twins")
    box.held.touch()
    house.start()
    box.until_reason("building 54 %")
    assert len(box.builders()) == 1
    box.held.unlink()
    while {worker["engine"] for name in ("digits", "twins") for worker in box.serving(name)} != {"tensorrt"}:
        house.wait_for("model.state", state="UNLOADED")
    assert len(box.plans()) == 2
    with Asking(house, clients=1) as asking:
        pass
    assert asking.wrong == []


def test_a_plan_that_answers_otherwise_never_serves_and_its_report_says_by_how_much(box: Box) -> None:
    house = box.house
    box.model()
    box.setenv({"TENSORRT_FAKE_OFF_BY": "3"})
    house.start()
    house.wait_for("model.state", model="digits", state="FAILED")
    assert "tensorrt: FAILED it failed its verification: output 'scores'" in _reason(house)[1]
    assert box.serving()[0]["provider"] == "CPUExecutionProvider"
    record = Appliance(house.http).get("/v2/appliance/models/digits/verification")
    assert (record["engine"], record["serves"]) == ("tensorrt", False)
    assert record["report"]["outputs"][0]["max_absolute"] == pytest.approx(3, abs=0.01)


def test_ctrl_c_on_a_compile_ends_its_build_and_leaves_nothing(box: Box) -> None:
    house = box.house
    house.digits()
    box.held.touch()
    command = [sys.executable, "-m", "appliance", "compile", "digits", "--engine", "tensorrt"]
    compiling = subprocess.Popen(
        [*command, "--repository", str(house.models)], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert compiling.stderr is not None
    for line in compiling.stderr:
        if "building" in line:
            break
    builders = psutil.Process(compiling.pid).children(recursive=True)
    assert ["appliance.building.job" in " ".join(one.cmdline()) for one in builders] == [True]
    compiling.send_signal(signal.SIGINT)
    assert compiling.wait(LONG_S) == 130
    assert "Traceback" not in compiling.stderr.read()
    compiling.stderr.close()
    assert not any(one.is_running() for one in builders)
    kept = [file.name for file in (house.models / ".engines" / "digits").iterdir() if not file.name.endswith(".lock")]
    assert kept == []
    assert "engine" not in (house.models / "digits" / "model.toml").read_text()


def test_the_compile_command_makes_a_plan_that_the_appliance_then_serves(box: Box) -> None:
    house = box.house
    house.digits()
    where = ("--repository", str(house.models), "--json")
    code, document, words = _command(house, "compile", "digits", "--engine", "tensorrt", "--precision", "fp16", *where)
    assert (code, document["engine"]["label"], document["report"]["passed"]) == (0, "tensorrt fp16", True), words
    text = (house.models / "digits" / "model.toml").read_text()
    assert 'engine = "tensorrt"' in text
    assert 'device = "cuda"' in text
    house.start()
    [worker] = box.serving()
    assert (worker["engine"], worker["provider"]) == ("tensorrt fp16", "TensorRT 11.4.0")
