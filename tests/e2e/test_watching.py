"""A GPU's troubles, scripted over a stub NVML, from the sensor to everybody who must hear of it: level, event, status, metric,
doctor, monitor, record, and the answer to clients; and back again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.connection import Appliance
from tests.e2e.house import LONG_S, House
from tests.fakes.nvml import LOST, MISMATCH, StubNvml

pytestmark = pytest.mark.skipif(bool(StubNvml.missing()), reason=StubNvml.missing())


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[StubNvml]:
    folder = tmp_path / "nvml"
    folder.mkdir()
    stub = StubNvml(folder).start()
    yield stub
    stub.close()


@pytest.fixture
def watched(house: House, gpu: StubNvml) -> House:
    """A running appliance that looks ten times a second, and forgives within half a second."""
    house.loopback("echo", shape="4")
    house.environment = gpu.environment()
    house.settings["sensors"] = {"interval_s": 0.1, "deadline_s": 0.5}
    house.settings["governor"] = {"dwell_s": 0.2, "max_dwell_s": 0.4, "lookahead_s": 0.0, "blind_s": 0.5}
    return house.start()


def status(house: House) -> dict[str, Any]:
    found: dict[str, Any] = Appliance(house.http).get("/v2/appliance/status")
    return found


def until(house: House, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status document that fulfils the condition. What is waited for happens in another process."""
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        document = status(house)
        if condition(document):
            return document
        time.sleep(0.02)
    raise AssertionError(f"not within {LONG_S} s: {json.dumps(status(house))[:3000]}")


def level(house: House, wanted: str) -> dict[str, Any]:
    return until(house, lambda document: document["governor"]["level"] == wanted)


def finding(code: str) -> Callable[[dict[str, Any]], bool]:
    return lambda document: any(found["code"] == code for found in document["findings"])


def command(house: House, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", *arguments],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        cwd=house.folder,
        env={**os.environ, "APPLIANCE_URL": house.http, "APPLIANCE_CONFIG": str(house.config), **environment},
    )
    return done.returncode, done.stdout


def recorded(house: House, kind: str) -> list[dict[str, Any]]:
    """Recorded events of a kind; the recorder commits once a second."""
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        found: list[dict[str, Any]] = Appliance(house.http).get(f"/v2/appliance/events?since=0&kind={kind}")["events"]
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {kind} was recorded")


def ask(house: House, priority: int) -> tuple[int, str, str]:
    """Status, Retry-After and error of the answer to a request of that priority."""
    body = {
        "inputs": [{"name": "data", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}],
        "parameters": {"priority": priority},
    }
    request = urllib.request.Request(f"{house.http}/v2/models/echo/infer", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as answer:
            return answer.status, "", ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get("Retry-After", ""), json.loads(error.read())["error"]


def test_a_gpu_that_heats_up_sheds_the_least_important_load_first_and_comes_back(watched: House, gpu: StubNvml) -> None:
    document = until(watched, lambda found: found["readings"].get("gpu.0.temperature") == 61)
    assert document["governor"]["level"] == "NOMINAL"
    assert "61 °C" in document["status"]["line"]
    assert ask(watched, 1)[0] == ask(watched, 12)[0] == 200
    gpu.set("0.margin", 10)
    gpu.set("0.temperature", 85)
    level(watched, "WARM")
    assert ask(watched, 12)[0] == 200
    gpu.set("0.margin", 5)
    gpu.set("0.reasons", 0x20)
    hot = level(watched, "HOT")
    assert "GPU 0" in hot["governor"]["reason"]
    until(watched, lambda found: found["gpus"][0]["throttle"] == ["SwThermalSlowdown"])
    code, retry_after, message = ask(watched, 12)
    assert (code, int(retry_after) > 0) == (503, True)
    assert "priority 12 is not served now" in message
    assert ask(watched, 8)[0] == 200
    gpu.set("0.margin", 0)
    level(watched, "CRITICAL")
    assert (ask(watched, 1)[0], ask(watched, 8)[0]) == (200, 503)
    code, said = command(watched, "check")
    assert (code, "CRITICAL" in said) == (2, True)
    gpu.set("0.margin", 34)
    gpu.set("0.temperature", 61)
    gpu.set("0.reasons", 0)
    level(watched, "NOMINAL")
    assert ask(watched, 12)[0] == 200
    assert command(watched, "check")[0] == 0
    levels = [event["fields"]["level"] for event in recorded(watched, "governor.level")]
    assert levels[:1] == ["WARM"]
    assert {"HOT", "CRITICAL"} <= set(levels)
    assert recorded(watched, "gpu.throttle")[0]["fields"]["reasons"] == ["SwThermalSlowdown"]


def test_a_gpu_that_falls_off_the_bus_is_lost_until_somebody_acts(watched: House, gpu: StubNvml) -> None:
    until(watched, lambda document: document["gpus"] and document["gpus"][0]["state"] == "OK")
    gpu.event(0, 79)
    gpu.set("0.error", LOST)
    document = until(watched, finding("gpu-lost"))
    assert document["gpus"][0]["state"] == "LOST"
    assert "Reboot" in document["gpus"][0]["action"]
    xid = recorded(watched, "gpu.xid")[0]
    assert (xid["severity"], xid["fields"]["data"]) == ("error", 79)
    gpu.unset("0.error")
    assert status(watched)["gpus"][0]["state"] == "LOST", "it answers again, and is not believed before a reset"
    code, said = command(watched, "check")
    assert (code, "GPU 0" in said) == (2, True)
    code, said = command(watched, "doctor", "--json")
    told = [entry for entry in json.loads(said) if entry["check"] == "hardware"]
    assert code == 1
    assert any("Reboot" in entry["fix"] for entry in told)


def test_a_driver_that_hangs_costs_its_readings_and_nothing_else(watched: House, gpu: StubNvml) -> None:
    until(watched, lambda document: document["readings"].get("gpu.0.temperature") == 61)
    gpu.set("0.hang", 1)
    document = until(watched, finding("sensor-silent"))
    assert document["readings"]["gpu.0.temperature"] is None
    assert document["readings"]["host.memory.available"] is not None
    level(watched, "WARM")
    assert ask(watched, 8)[0] == 200
    gpu.unset("0.hang")
    until(watched, lambda document: document["readings"].get("gpu.0.temperature") == 61)
    level(watched, "NOMINAL")


def test_application_faults_and_memory_errors_are_told_apart(watched: House, gpu: StubNvml) -> None:
    until(watched, lambda document: bool(document["gpus"]))
    gpu.event(0, 31)
    fault = recorded(watched, "gpu.xid")[0]
    assert fault["fields"]["data"] == 31
    assert "worker" in fault["fields"]["action"]
    gpu.set("0.rows.pending", 1)
    document = until(watched, finding("gpu-rows-pending"))
    assert status(watched)["gpus"][0]["state"] == "OK"
    assert all(found["code"] != "gpu-lost" for found in document["findings"])
    gpu.set("0.rows.pending", 0)
    until(watched, lambda found: not finding("gpu-rows-pending")(found))
    assert recorded(watched, "finding.cleared")


def test_readings_are_recorded_and_energy_adds_up_to_the_counter(watched: House, gpu: StubNvml) -> None:
    until(watched, lambda document: document["readings"].get("gpu.0.energy") is not None)
    gpu.set("0.energy_mj", 123_456_789 + 36_000)
    end = time.monotonic() + LONG_S
    sums: list[dict[str, Any]] = []
    while time.monotonic() < end and not any(one["device"] == "gpu:0" and one["uj"] for one in sums):
        sums = Appliance(watched.http).get("/v2/appliance/energy?since=0")["energy"]
        time.sleep(0.1)
    mine = [one for one in sums if one["device"] == "gpu:0"]
    total = sum(one["uj"] for one in mine if one["kind"] == "total")
    assert total == 36_000_000, "36 J, as the counter counted them"
    assert sum(one["uj"] for one in mine if one["kind"] != "total") == total
    history = Appliance(watched.http).get("/v2/appliance/history?names=gpu.0.temperature,requests.rate&since=0")
    assert 61.0 in history["series"]["gpu.0.temperature"]["mean"]
    assert any(value is not None for value in history["series"]["requests.rate"]["mean"])


def test_a_fan_that_stands_still_on_a_hot_card_is_told_and_forgotten(watched: House, gpu: StubNvml) -> None:
    until(watched, lambda document: bool(document["gpus"]))
    gpu.set("0.fan.0", 0)
    gpu.set("0.temperature", 78)
    document = until(watched, finding("gpu-fan-stopped"))
    assert any("GPU 0: a fan stands still at 78" in found["text"] for found in document["findings"])
    code, said = command(watched, "check")
    assert (code, "fan stands still" in said) == (1, True)
    gpu.set("0.fan.0", 60)
    until(watched, lambda found: not finding("gpu-fan-stopped")(found))


def test_a_driver_that_was_upgraded_underneath_is_told_before_anything_is_served_from_it(
    house: House, gpu: StubNvml
) -> None:
    gpu.set("init", MISMATCH)
    house.loopback("echo", shape="4")
    house.environment = gpu.environment()
    house.start()
    document = until(house, finding("driver-mismatch"))
    assert document["status"]["ready"], "what needs no GPU serves"
    told = next(found for found in document["findings"] if found["code"] == "driver-mismatch")
    assert "eboot" in told["fix"]
    code, said = command(house, "doctor", "--json")
    assert code == 1
    assert any(entry["check"] == "hardware" and entry["grade"] == "error" for entry in json.loads(said))
    gpu.unset("init")
    until(house, lambda found: not finding("driver-mismatch")(found))


def test_a_chip_that_shares_the_hosts_memory_reports_the_hosts(house: House, gpu: StubNvml) -> None:
    gpu.card(0, name="NVIDIA GB10")
    gpu.unset("0.memory.total", "0.memory.used", "0.memory.reserved")
    house.loopback("echo", shape="4")
    house.environment = gpu.environment()
    house.start()
    document = until(house, lambda found: found["readings"].get("gpu.0.memory.total") is not None)
    assert document["gpus"][0]["integrated"]
    assert document["readings"]["gpu.0.memory.total"] == document["readings"]["host.memory.total"]


def test_doctor_looks_at_the_gpu_itself(watched: House, gpu: StubNvml) -> None:
    _, said = command(watched, "doctor", "--json", **gpu.environment())
    told = [entry["text"] for entry in json.loads(said) if entry["check"] == "GPU 0"]
    assert told[0] == "NVIDIA RTX 4000 SFF Ada Generation"
