"""A scripted GPU watched over a while: a climb through all levels and back, what is recorded, what energy adds up to.

The single troubles, each from the sensor to everybody who must hear of it, are in `test_troubles.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.connection import Appliance
from tests.e2e.house import LONG_S, House
from tests.fakes.nvml import StubNvml

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


def test_a_gpu_that_heats_up_goes_through_the_levels_and_comes_back_by_itself(watched: House, gpu: StubNvml) -> None:
    document = until(watched, lambda found: found["readings"].get("gpu.0.temperature") == 61)
    assert document["governor"]["level"] == "NOMINAL"
    assert "61 °C" in document["status"]["line"]
    for margin, wanted in ((10, "WARM"), (5, "HOT"), (0, "CRITICAL")):
        gpu.put({"0.margin": margin, "0.temperature": 95 - margin})
        assert "GPU 0" in level(watched, wanted)["governor"]["reason"]
    gpu.put({"0.margin": 34, "0.temperature": 61})
    level(watched, "NOMINAL")
    until(watched, lambda _: recorded(watched, "governor.level")[-1]["fields"]["level"] == "NOMINAL")
    told = [(event["fields"]["level"], event["severity"]) for event in recorded(watched, "governor.level")]
    assert told[:3] == [("WARM", "warning"), ("HOT", "error"), ("CRITICAL", "error")]
    assert {severity for _, severity in told[3:]} == {"info"}


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


def test_doctor_looks_at_the_gpu_itself(watched: House, gpu: StubNvml) -> None:
    _, said = command(watched, "doctor", "--json", **gpu.environment())
    told = [entry["text"] for entry in json.loads(said) if entry["check"] == "GPU 0"]
    assert told[0] == "NVIDIA RTX 4000 SFF Ada Generation"
