"""What must be seen to work: deaths, drains, broken models, bad configurations. Real processes, real signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from appliance.cli.connection import Appliance
from appliance.cli.main import app
from appliance.cli.output import CommandError
from appliance.client import Client
from appliance.core.errors import ApplianceError, ErrorCode
from tests.e2e.house import LONG_S, ROOT, House

ZERO = np.zeros((1, 4), np.float32)


def row(number: int) -> np.ndarray[Any, Any]:
    return np.full((1, 4), number, np.float32)


def command(text: str) -> dict[str, np.ndarray[Any, Any]]:
    return {"data": np.zeros((1, 1), np.float32), "command": np.array([[text.encode()]], dtype=object)}


class Load:
    """Clients that ask until told to stop, and keep what they were told: each answer must be their own number."""

    def __init__(self, house: House, model: str, transport: str) -> None:
        self.house = house
        self.model = model
        self.transport = transport
        self.answers: Counter[str] = Counter()
        self.wrong = 0
        self.some = threading.Event()
        self._more = threading.Condition()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        assert self.some.wait(LONG_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(LONG_S)
            assert not thread.is_alive(), "a request was never answered"

    def wait_for_more(self, count: int) -> None:
        """Until so many more answers have come."""
        wanted = self.answers.total() + count
        with self._more:
            assert self._more.wait_for(lambda: self.answers.total() >= wanted, LONG_S)

    def _run(self, worker: int) -> None:
        ask = self._zmq if self.transport == "zmq" else self._http
        ask(worker)

    def _note(self, code: str, number: int, found: float | None) -> None:
        with self._more:
            self.answers[code] += 1
            if found is not None and found != number:
                self.wrong += 1
            self._more.notify_all()
        self.some.set()

    def _zmq(self, worker: int) -> None:
        with Client(self.house.ipc, timeout_s=LONG_S) as client:
            number = worker * 100_000
            while not self._stop.is_set():
                number += 1
                try:
                    found = client.infer(self.model, {"data": row(number)}).outputs["data"][0, 0]
                    self._note("OK", number, found)
                except ApplianceError as error:
                    self._note(str(error.code), number, None)
                    if error.code is ErrorCode.UNAVAILABLE:
                        return

    def _http(self, worker: int) -> None:
        connection = http.client.HTTPConnection(self.house.http.removeprefix("http://"), timeout=LONG_S)
        with contextlib.closing(connection):
            self._ask_http(connection, worker * 100_000)

    def _ask_http(self, connection: http.client.HTTPConnection, number: int) -> None:
        while not self._stop.is_set():
            number += 1
            document = {"inputs": [{"name": "data", "shape": [1, 4], "datatype": "FP32", "data": [number] * 4}]}
            try:
                connection.request("POST", f"/v2/models/{self.model}/infer", json.dumps(document))
                response = connection.getresponse()
                data = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                # before a request is read the connection may be gone; an accepted one would have been answered
                self.answers[f"gone:{type(error).__name__}"] += 1
                return
            self._note(str(response.status), number, data["outputs"][0]["data"][0] if response.status == 200 else None)
            if response.status == 503:
                return


@pytest.mark.parametrize("transport", ["zmq", "http"])
def test_a_killed_worker_costs_nobody_an_answer(house: House, transport: str) -> None:
    house.loopback("echo", shape="4")
    house.loopback("other", shape="4")
    house.settings["workers"] = {"crash_limit": 50}
    house.start()
    with Load(house, "echo", transport) as load, Load(house, "other", transport) as others:
        for _ in range(5):
            [pid] = house.worker_pids("echo")
            os.kill(pid, signal.SIGKILL)
            house.wait_for("worker.replaced", model="echo")
            # a request may lose two workers to us otherwise, and then it fails by rule
            load.wait_for_more(20)
    good = {"zmq": "OK", "http": "200"}[transport]
    assert set(load.answers) == {good}, load.answers
    assert set(others.answers) == {good}, others.answers
    assert load.wrong == others.wrong == 0
    assert house.stop() == 0


@pytest.mark.parametrize("transport", ["zmq", "http"])
def test_terminating_under_load_answers_everything_accepted_and_leaves_nothing(house: House, transport: str) -> None:
    house.loopback("echo", shape="4", delay_ms="5")
    house.start()
    processes = house.children()
    with Load(house, "echo", transport) as load:
        assert house.stop() == 0
    allowed = {"zmq": {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED"}, "http": {"200", "503"}}[transport]
    answered = {code for code in load.answers if not code.startswith("gone:")}
    assert answered <= allowed, load.answers
    assert load.wrong == 0
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert list(house.runtime.iterdir()) == []
    assert [path for path in house.home.rglob("*") if path.is_file()] == [], "a library wrote into the home directory"


def hang(endpoint: str) -> None:
    with Client(endpoint, timeout_s=2) as client, contextlib.suppress(ApplianceError):
        client.infer("whip", command("hang"))


def test_a_killed_front_takes_its_workers_with_it(house: House) -> None:
    house.loopback("echo", shape="4")
    house.loopback("whip", shape="1", commands="true")
    house.start()
    processes = house.children()
    assert len(processes) == 3
    # one of them is deep in native code, so to speak, and hears nothing
    thread = threading.Thread(target=hang, args=(house.ipc,), daemon=True)
    thread.start()
    while "BUSY" not in [worker["state"] for worker in Appliance(house.http).get("/v2/appliance/workers")]:
        continue
    os.kill(house.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=LONG_S)
    assert alive == []
    thread.join(LONG_S)


def test_a_hanging_batch_ends_its_worker_and_fails_alone(house: House) -> None:
    house.loopback("whip", "[worker]\nrun_budget_ms = 150\n", shape="1", commands="true")
    house.start()
    with Client(house.ipc, timeout_s=LONG_S) as client:
        with pytest.raises(ApplianceError) as caught:
            client.infer("whip", command("hang"))
        assert caught.value.code is ErrorCode.ENGINE_FAULT
        assert client.infer("whip", command("")).outputs["data"].shape == (1, 1)


def test_a_poisonous_request_fails_and_its_neighbours_do_not(house: House) -> None:
    house.loopback("whip", shape="1", commands="true")
    house.start()
    outcomes: dict[int, str] = {}

    def ask(number: int, text: str) -> None:
        with Client(house.ipc, timeout_s=LONG_S) as client:
            try:
                client.infer("whip", command(text))
                outcomes[number] = "OK"
            except ApplianceError as error:
                outcomes[number] = str(error.code)

    # the first keeps the worker busy, so that the others share a batch with the poison
    threads = [threading.Thread(target=ask, args=(0, "delay 200"))]
    threads += [threading.Thread(target=ask, args=(number, "crash" if number == 3 else "")) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert outcomes.pop(3) == "ENGINE_FAULT"
    assert set(outcomes.values()) == {"OK"}, outcomes


def test_a_model_whose_workers_die_again_and_again_is_quarantined_with_its_reason(house: House) -> None:
    house.loopback("whip", shape="1", commands="true")
    house.loopback("echo", shape="4")
    house.settings["workers"] = {"crash_limit": 3, "backoff_initial_s": 0.01}
    house.start()
    appliance = Appliance(house.http)
    with Client(house.ipc, timeout_s=LONG_S) as client:
        codes = []
        for _ in range(4):
            with pytest.raises(ApplianceError) as caught:
                client.infer("whip", command("crash"))
            codes.append(caught.value.code)
        assert codes[-1] is ErrorCode.UNAVAILABLE
        index = {entry["name"]: entry for entry in appliance.post("/v2/repository/index")}
        assert index["whip"]["state"] == "UNAVAILABLE"
        assert "SIGSEGV" in index["whip"]["reason"]
        np.testing.assert_array_equal(client.infer("echo", {"data": ZERO}).outputs["data"], ZERO)
        appliance.post("/v2/repository/models/whip/load")
        assert client.infer("whip", command("")).outputs["data"].shape == (1, 1)


def test_broken_models_are_unavailable_with_their_reason_and_the_rest_serves(house: House) -> None:
    good = (ROOT / "models" / "digits" / "1" / "model.onnx").read_bytes()
    for name, data in {"truncated": good[: len(good) // 2], "text": b"this is no model", "empty": b""}.items():
        (house.models / name / "1").mkdir(parents=True)
        (house.models / name / "1" / "model.onnx").write_bytes(data)
    house.loopback("crashing", load="crash")
    house.loopback("hanging", "[worker]\nload_budget_ms = 300\n", load="hang")
    house.loopback("odd", "typo = 1\n")
    (house.models / "bare").mkdir()
    house.digits()
    house.start()
    appliance = Appliance(house.http)
    index = {entry["name"]: entry for entry in appliance.post("/v2/repository/index")}
    assert index["digits"]["state"] == "READY"
    for name, words in {
        "truncated": "",
        "text": "",
        "empty": "",
        "crashing": "SIGSEGV",
        "hanging": "longer than 0.3 s",
        "odd": "unknown key 'typo'",
        "bare": "no version folder",
    }.items():
        assert index[name]["state"] == "UNAVAILABLE", index[name]
        assert index[name]["reason"], name
        assert words in index[name]["reason"]
        assert str(house.folder) not in index[name]["reason"], "a path was shown to clients"
    assert not house.stop()


def test_an_unload_does_not_wait_for_a_load_that_hangs(house: House) -> None:
    house.digits()
    house.settings["repository"] |= {"load": "listed", "models": ["digits"]}
    house.start()
    house.loopback("hanging", "[worker]\nload_budget_ms = 600000\n", load="hang")
    appliance, before = Appliance(house.http), house.children()
    refused: list[str] = []

    def load() -> None:
        try:
            Appliance(house.http).post("/v2/repository/models/hanging/load")
        except CommandError as error:
            refused.append(str(error))

    loading = threading.Thread(target=load)
    loading.start()
    house.wait_for("model.state", model="hanging", state="LOADING")
    appliance.post("/v2/repository/models/hanging/unload")
    loading.join(10)
    assert not loading.is_alive()
    assert refused, "the load was answered as if it had succeeded"
    assert "unloaded while it was loaded" in refused[0]
    # the template may have been at forking it when the unload came: it is ended as soon as it is there
    house.wait_for_children(before)
    assert not house.stop()


def test_a_new_version_takes_over_without_a_failed_request_and_a_broken_one_does_not(house: House) -> None:
    folder = house.loopback("echo", shape="4")
    house.start()
    appliance = Appliance(house.http)
    with Load(house, "echo", "zmq") as load:
        (folder / "2").mkdir()
        appliance.post("/v2/repository/models/echo/load")
        with Client(house.ipc) as client:
            assert client.infer("echo", {"data": ZERO}).version == "2"
        (folder / "model.toml").write_text('engine = "loopback"\n[parameters]\nload = "crash"\n')
        with pytest.raises(Exception, match="failed to load 'echo'"):
            appliance.post("/v2/repository/models/echo/load")
        with Client(house.ipc) as client:
            assert client.infer("echo", {"data": ZERO}).version == "2"
    assert set(load.answers) == {"OK"}, load.answers
    assert load.wrong == 0


def test_a_reload_loads_what_is_new_and_keeps_the_old_configuration_if_the_new_one_is_wrong(house: House) -> None:
    house.loopback("echo", shape="4")
    house.start()
    appliance = Appliance(house.http)
    house.loopback("later", shape="4")
    os.kill(house.pid, signal.SIGHUP)
    house.wait_for("model.ready", model="later")
    shutil.rmtree(house.models / "later")
    os.kill(house.pid, signal.SIGHUP)
    house.wait_for("model.state", model="later", state="UNLOADED")
    house.config.write_text("[http]\nprot = 1\n")
    os.kill(house.pid, signal.SIGHUP)
    refused = house.wait_for("config.reload_refused")
    assert "did you mean 'port'" in refused["reason"]
    assert [entry["name"] for entry in appliance.post("/v2/repository/index")] == ["echo"]
    assert appliance.get("/v2/health/ready")["ready"]


def test_models_that_are_wrong_on_disk_at_the_start_are_failed_everywhere_and_serve_when_mended(house: House) -> None:
    house.loopback("echo", shape="4")
    typo = house.loopback("typo", shape="4") / "model.toml"
    whole = typo.read_text()
    typo.write_text("foo = [")
    (house.models / "hollow" / "1").mkdir(parents=True)
    house.settings["repository"] |= {"load": "listed", "models": ["echo", "typo", "hollow", "gone"]}
    house.loopback("unlisted")
    (house.models / "unlisted" / "model.toml").write_text("foo = [")
    house.spawn()
    house.wait_for("model.missing", model="gone", version="")
    logged = house.wait_for("model.state", model="hollow", version="1", state="FAILED", level="error")
    assert "no model.onnx" in logged["reason"]
    logged = house.wait_for("model.state", model="typo", version="", state="FAILED", level="error")
    assert logged["reason"].startswith("model.toml:1: not valid TOML")
    house.addresses = house.wait_for("daemon.listening")["addresses"]
    assert house.wait_for("daemon.ready")["status"].startswith("1 model ready, 3 failed")
    appliance = Appliance(house.http)
    status = appliance.get("/v2/appliance/status")
    assert not status["status"]["ready"]
    told = {model["name"]: (model["version"], model["detail"], model["reason"]) for model in status["models"]}
    assert told["typo"] == ("", "FAILED", logged["reason"])
    assert told["hollow"][:2] == ("1", "FAILED")
    assert told["gone"] == ("", "FAILED", "there is no model folder of that name")
    assert set(told) == {"echo", "typo", "hollow", "gone"}
    assert {*status["models"][0]} == {*status["models"][-1]}, "a reader finds the same keys in every row"
    assert 'appliance_model_state{model="typo",version="",state="FAILED"} 1' in (
        appliance.request("GET", "/metrics")[1].decode()
    )
    shown = CliRunner().invoke(app, ["status", "--url", house.http])
    assert (shown.exit_code, "typo" in shown.stdout, "not valid TOML" in shown.stdout) == (4, True, True)
    events = appliance.get("/v2/appliance/events?kind=model.state")["events"]
    failed = {event["fields"]["model"]: event["severity"] for event in events if event["fields"]["state"] == "FAILED"}
    assert failed == {"typo": "error", "hollow": "error", "gone": "error"}
    typo.write_text(whole)
    appliance.post("/v2/repository/models/typo/load")
    assert appliance.get("/v2/appliance/status")["status"]["line"].startswith("2 models ready, 2 failed")
    typo.write_text("foo = [")
    os.kill(house.pid, signal.SIGHUP)
    house.wait_for("model.state", model="hollow", state="FAILED")
    assert house.wait_for("model.broken", model="typo")["reason"].endswith("what was loaded before serves on")
    assert appliance.get("/v2/models/typo/ready")["ready"]


def test_a_wrong_configuration_ends_with_78_and_names_every_problem(tmp_path: Path) -> None:
    config = tmp_path / "appliance.toml"
    config.write_text('[http]\nprot = 1\nport = 70000\n[zmq]\nenabled = "yes"\n')
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78
    for words in ("appliance.toml:2:", "did you mean 'port'", "appliance.toml:3:", "appliance.toml:5:"):
        assert words in done.stderr


def test_a_second_daemon_cannot_take_the_first_one_s_endpoints(house: House) -> None:
    house.loopback("echo", shape="4")
    house.start()
    second = subprocess.run(
        [sys.executable, "-m", "appliance", "serve", "--config", str(house.config)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode not in (0, 70)
    with Client(house.ipc) as client:
        np.testing.assert_array_equal(client.infer("echo", {"data": ZERO}).outputs["data"], ZERO)
    assert Appliance(f"unix:{house.runtime}/http.sock").get("/v2/health/ready")["ready"]


def test_models_of_one_device_can_share_a_worker(house: House) -> None:
    for name in ("one", "two"):
        house.loopback(name, '[worker]\nisolation = "device"\n', shape="4")
    house.start()
    assert house.worker_pids("one") == house.worker_pids("two")
    with Load(house, "one", "zmq") as load:
        os.kill(house.worker_pids("two")[0], signal.SIGKILL)
        house.wait_for("worker.replaced", model="one")
        with Client(house.ipc) as client:
            np.testing.assert_array_equal(client.infer("two", {"data": ZERO}).outputs["data"], ZERO)
    assert set(load.answers) == {"OK"}


def test_several_instances_share_the_work(house: House) -> None:
    house.loopback("echo", "[worker]\ninstances = 2\n", shape="4", delay_ms="2")
    house.start()
    assert len(set(house.worker_pids("echo"))) == 2
    with Load(house, "echo", "zmq") as load:
        workers = Appliance(house.http).get("/v2/appliance/workers")
        while not all(worker["batches"] for worker in workers):
            workers = Appliance(house.http).get("/v2/appliance/workers")
    assert set(load.answers) == {"OK"}


def cycles(house: House, count: int) -> None:
    house.loopback("echo", shape="4")
    house.loopback("other", shape="4")
    house.start()
    appliance = Appliance(house.http)
    front = psutil.Process(house.pid)

    def turn(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            appliance.post("/v2/repository/models/other/unload")
            appliance.post("/v2/repository/models/other/load")
        return front.memory_info().rss, front.num_fds(), len(front.children(recursive=True))

    with Load(house, "echo", "zmq") as load:
        rss, descriptors, children = turn(max(5, count // 5))
        later_rss, later_descriptors, later_children = turn(count)
    assert set(load.answers) == {"OK"}, load.answers
    assert later_children == children
    assert abs(later_descriptors - descriptors) <= 3
    assert later_rss - rss < 8 << 20, f"{(later_rss - rss) / 1e6:.1f} MB more after {count} cycles"


def test_loading_and_unloading_under_load_leaves_the_front_as_it_was(house: House) -> None:
    cycles(house, 10)


@pytest.mark.slow
def test_500_cycles_of_loading_and_unloading_leave_the_front_as_it_was(house: House) -> None:
    cycles(house, 500)
