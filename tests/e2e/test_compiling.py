"""Engines in a real appliance: built beside what serves, verified, switched to without losing a request; or not switched to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from appliance.cli.connection import Appliance
from appliance.cli.output import CommandError
from appliance.client import Client
from tests.e2e.house import LONG_S, ROOT, House

GOLDEN = dict(np.load(ROOT / "models" / "digits" / "golden" / "batch_32.npz"))


class Asking:
    """Clients that ask the digits model all the time; every answer must come, and be right."""

    def __init__(self, house: House, clients: int = 3) -> None:
        self.house = house
        self.answers = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._some = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(clients)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        assert self._some.wait(LONG_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(LONG_S)

    def _ask(self, number: int) -> None:
        with Client(self.house.ipc) as client:
            while not self._stop.is_set():
                row = (number + self.answers) % 32
                try:
                    scores = client.infer("digits", {"image": GOLDEN["image"][row : row + 1]}).outputs["scores"]
                except Exception as error:
                    self.wrong.append(repr(error))
                    self._some.set()
                    return
                if scores.argmax() != GOLDEN["scores"][row].argmax():
                    self.wrong.append(f"row {row}: {scores}")
                self.answers += 1
                self._some.set()


def _int8(house: House, more: str = "") -> None:
    house.digits()
    manifest = house.models / "digits" / "model.toml"
    manifest.write_text(f'precision = "int8"\n{manifest.read_text()}\n{more}')


def _parameters(house: House) -> dict[str, str]:
    config = Appliance(house.http).get("/v2/models/digits/config")
    return {key: value["string_value"] for key, value in config["parameters"].items()}


def _reason(house: House) -> tuple[str, str]:
    entry = next(e for e in Appliance(house.http).post("/v2/repository/index") if e["name"] == "digits")
    return entry["state"], entry["reason"]


def _shown(house: House) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance", "models", "show", "digits", "--url", house.http],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "APPLIANCE_CONFIG": str(house.config)},
    )


def test_a_wanted_engine_is_built_and_switched_to_without_losing_a_request(house: House) -> None:
    _int8(house)
    house.start()
    with Asking(house) as asking:
        house.wait_for("model.state", model="digits", state="VERIFYING")
        house.wait_for("model.state", model="digits", state="READY")
        house.wait_for("model.state", model="digits", state="UNLOADED")
        before = asking.answers
        while asking.answers < before + 50 and not asking.wrong:
            asking._some.wait(0.01)
    assert asking.wrong == []
    parameters = _parameters(house)
    assert parameters["appliance.engine"] == "int8"
    assert "accuracy" in parameters["appliance.verification"]
    assert _reason(house) == ("READY", "")
    record = Appliance(house.http).get("/v2/appliance/models/digits/versions/1/verification")
    assert (record["engine"], record["report"]["passed"]) == ("int8", True)
    assert record["report"]["metric_candidate"]["accuracy"] > 0.9
    shown = _shown(house)
    assert "MAX REL" in shown.stdout
    assert "it may serve" in shown.stdout
    assert "verification.html" in shown.stderr
    assert house.stop() == 0
    # the next start finds it kept: no building
    house.log.clear()
    house.start()
    assert _parameters(house)["appliance.engine"] == "int8"
    assert "BUILDING" not in [entry.get("state") for entry in house.log]
    assert house.stop() == 0


def test_an_engine_that_fails_its_verification_never_serves(house: House) -> None:
    _int8(house, "[verify]\nmax_absolute = 1e-9\n")
    house.start()
    house.wait_for("model.state", model="digits", state="VERIFYING")
    house.wait_for("model.state", model="digits", state="FAILED")
    state, reason = _reason(house)
    assert state == "READY"
    assert "int8: FAILED it failed its verification: output 'scores': largest absolute error" in reason
    assert "appliance.engine" not in _parameters(house)
    with Asking(house, clients=1) as asking:
        pass
    assert asking.wrong == []

    def shown() -> None:
        record = Appliance(house.http).get("/v2/appliance/models/digits/verification")
        assert (record["engine"], record["serves"], record["report"]["passed"]) == ("int8", False, False)
        assert "largest absolute error" in record["report"]["failures"][0]
        words = _shown(house)
        assert "an engine was built and does not serve: int8" in words.stdout
        assert "int8 of digits failed: it does not serve" in words.stdout
        assert "verification.html" in words.stderr

    shown()
    # the verdict is kept: a load does not build or verify again
    Appliance(house.http).post("/v2/repository/models/digits/load")
    house.wait_for("model.state", model="digits", state="FAILED")
    assert "failed its verification" in _reason(house)[1]
    shown()


def test_an_altered_engine_is_never_loaded_and_is_built_anew(house: House) -> None:
    _int8(house)
    house.start()
    house.wait_for("model.state", model="digits", state="UNLOADED")
    house.stop()
    (file,) = (house.models / ".engines" / "digits").glob("*/model.onnx")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    house.log.clear()
    house.start()
    house.wait_for("model.state", model="digits", state="UNLOADED")
    assert "BUILDING" in [entry.get("state") for entry in house.log]
    assert _parameters(house)["appliance.engine"] == "int8"
    assert file.read_bytes() != bytes(data)


def test_an_engine_that_is_altered_while_it_serves_is_not_loaded_when_its_worker_dies(house: House) -> None:
    _int8(house)
    house.start()
    house.wait_for("model.state", model="digits", state="UNLOADED")
    (file,) = (house.models / ".engines" / "digits").glob("*/model.onnx")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    (pid,) = house.worker_pids("digits")
    psutil.Process(pid).kill()
    house.wait_for("engine.discarded", model="digits")
    assert "worker.replaced" not in [entry["event"] for entry in house.log]
    # as it is first, and then with an engine that was made anew
    house.wait_for("model.state", model="digits", state="VERIFYING")
    house.wait_for("model.state", model="digits", state="UNLOADED")
    assert _parameters(house)["appliance.engine"] == "int8"
    assert file.read_bytes() != bytes(data)


def test_what_cannot_be_built_leaves_the_model_serving_and_says_why(house: House) -> None:
    _int8(house, '[build]\ncalibration = "nowhere"\n')
    house.start()
    house.wait_for("model.state", model="digits", state="FAILED")
    assert _reason(house) == ("READY", "int8: FAILED [build] calibration names 'nowhere', which is not there")


def test_an_unload_ends_a_build_that_is_under_way(house: House) -> None:
    _int8(house)
    house.start()
    Appliance(house.http).post("/v2/repository/models/digits/unload")
    # one that was ended and waits to be collected has no command line any more
    alive = [child for child in house.children() if child.status() != psutil.STATUS_ZOMBIE]
    names = [" ".join(child.cmdline()) for child in alive]
    assert not [name for name in names if "appliance.building.job" in name]
    assert _reason(house)[0] == "UNAVAILABLE"


def _command(house: House, *arguments: str) -> tuple[int, Any, str]:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", *arguments],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        cwd=house.folder,
        env={
            **os.environ,
            "HOME": str(house.home),
            "APPLIANCE_URL": house.http if house.addresses else "http://127.0.0.1:9",
        },
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout, done.stderr


def test_compile_builds_checks_writes_the_choice_and_has_the_appliance_switch(house: House) -> None:
    house.digits()
    house.start()
    where = ("--repository", str(house.models), "--json")
    code, document, words = _command(house, "compile", "digits", "--precision", "int8", *where)
    assert (code, document["loaded"], document["report"]["passed"]) == (0, True, True), words
    assert document["engine"]["label"] == "int8"
    text = (house.models / "digits" / "model.toml").read_text()
    assert 'precision = "int8"' in text
    assert "# Every key is optional" in text
    assert _parameters(house)["appliance.engine"] == "int8"
    code, document, _ = _command(house, "verify", "digits", *where)
    assert (code, document["engine"]["verified"]) == (0, "passed")
    code, document, _ = _command(house, "engines", "list", *where)
    assert [entry["label"] for entry in document] == ["int8"]
    assert "verified: largest relative error" in str(_command(house, "models", "show", "digits")[1])


def test_an_appliance_that_serves_another_repository_is_not_told_and_the_result_is_said(
    house: House, tmp_path: Path
) -> None:
    house.digits()
    house.start()
    before = house.worker_pids("digits")
    for name in ("digits", "only_here"):
        shutil.copytree(ROOT / "models" / "digits", tmp_path / "other" / name)
        where = ("--repository", str(tmp_path / "other"), "--precision", "fp16")
        code, document, words = _command(house, "compile", name, *where, "--json")
        assert (code, document["loaded"], document["report"]["passed"]) == (0, False, True), words
        assert "it serves another repository" in document["not_loaded"]
        code, said, words = _command(house, "compile", name, *where)
        assert (code, "passed: it may serve" in said, "serves another repository" in words) == (0, True, True)
        assert "has loaded it" not in words
    assert house.worker_pids("digits") == before


def test_a_load_that_fails_after_a_compile_is_a_note_beside_the_result(house: House) -> None:
    house.digits()
    house.start()
    (house.models / "digits" / "2").mkdir()
    (house.models / "digits" / "2" / "model.onnx").write_bytes(b"no model")
    where = ("--repository", str(house.models), "--precision", "fp16", "--model-version", "1")
    code, said, words = _command(house, "compile", "digits", *where)
    assert code == 0
    assert "passed: it may serve" in said
    assert "the running appliance has not loaded it: failed to load 'digits'" in words


def test_what_verify_found_of_a_model_that_serves_as_it_is_is_kept_and_shown(house: House) -> None:
    house.digits()
    house.start()
    with pytest.raises(CommandError, match="serves as it is, unverified; `appliance verify digits` makes one"):
        Appliance(house.http).get("/v2/appliance/models/digits/verification")
    assert "PROVIDER" not in _shown(house).stdout
    where = ("--repository", str(house.models), "--json")
    code, document, words = _command(house, "verify", "digits", *where)
    assert (code, document["engine"]) == (0, None), words
    assert Path(document["kept"], "verification.html").is_file()
    record = Appliance(house.http).get("/v2/appliance/models/digits/verification")
    assert (record["engine"], record["serves"], record["report"]["passed"]) == ("", True, True)
    shown = _shown(house)
    assert "onnxruntime of digits passed: it may serve" in shown.stdout
    assert document["kept"] in shown.stderr
    # pruning is for engines; other settings of the gate ask for another verdict
    assert _command(house, "engines", "prune", *where)[1] == []
    assert Appliance(house.http).get("/v2/appliance/models/digits/verification") == record
    manifest = house.models / "digits" / "model.toml"
    manifest.write_text(manifest.read_text() + "[verify]\nmax_relative = 0.5\n")
    Appliance(house.http).post("/v2/repository/models/digits/load")
    with pytest.raises(CommandError, match="unverified"):
        Appliance(house.http).get("/v2/appliance/models/digits/verification")
    _command(house, "verify", "digits", *where)
    assert len(list((house.models / ".engines" / "digits").glob(".as-is-*"))) == 1


def test_compile_that_fails_its_verification_exits_1_and_changes_nothing(house: House) -> None:
    house.digits()
    manifest = house.models / "digits" / "model.toml"
    manifest.write_text(manifest.read_text() + "[verify]\nmax_absolute = 1e-9\n")
    before = manifest.read_text()
    where = ("--repository", str(house.models), "--json")
    code, document, _ = _command(house, "compile", "digits", "--precision", "int8", *where)
    assert (code, document["report"]["passed"]) == (1, False)
    assert manifest.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compile", "nobody"), "no model folder 'nobody'"),
        (("compile", "digits", "--precision", "fp8"), "'fp8' is no precision"),
        (("compile", "digits", "--model-version", "7"), "no version 7; it has 1"),
        (("compile", "digits", "--engine", "tensorrt"), "NVIDIA"),
        (("compile", "digits", "--precision", "bf16"), "bf16 is for TensorRT"),
    ],
)
def test_commands_say_what_is_wrong(house: House, arguments: tuple[str, ...], said: str) -> None:
    house.digits()
    code, document, _ = _command(house, *arguments, "--repository", str(house.models), "--json")
    assert code != 0
    assert said in document["error"]["message"]


def test_pruning_removes_what_is_not_wanted(house: House) -> None:
    house.digits()
    where = ("--repository", str(house.models), "--json")
    _command(house, "compile", "digits", "--precision", "fp16", "--no-write", *where)
    assert len(_command(house, "engines", "list", *where)[1]) == 1
    code, removed, _ = _command(house, "engines", "prune", *where)
    assert (code, len(removed)) == (0, 1)
    assert not list(Path(house.models, ".engines", "digits").glob("[0-9a-f]*"))


def test_a_wish_for_tensorrt_on_a_box_without_a_gpu_serves_on_the_cpu_and_says_why(house: House) -> None:
    house.digits()
    manifest = house.models / "digits" / "model.toml"
    wish = 'engine = "tensorrt"\ndevice = "cuda"\nfallback = "cpu"\n'
    kept = [line for line in manifest.read_text().splitlines() if not line.startswith(("engine", "device", "fallback"))]
    manifest.write_text(wish + "\n".join(kept))
    house.start()
    house.wait_for("model.state", model="digits", state="FAILED")
    with Asking(house, clients=1) as asking:
        pass
    assert asking.wrong == []
    state, reason = _reason(house)
    assert state == "READY"
    assert "tensorrt: FAILED no NVIDIA" in reason
    where = ("--repository", str(house.models), "--json")
    code, document, _ = _command(house, "compile", "digits", "--engine", "tensorrt_rtx", *where)
    assert code == 1
    assert "digits: no NVIDIA" in document["error"]["message"]
    assert _reason(house)[0] == "READY"
    assert house.stop() == 0
