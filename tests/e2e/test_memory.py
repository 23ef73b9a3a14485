"""Two models that do not fit at once: the second one waits, says so, and is loaded when the first one goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import psutil

from appliance.cli.connection import Appliance
from tests.e2e.house import LONG_S, House

ROOM_MIB = 1000
"""Eight workers are booked with 768 MiB before they are measured: it is enough for eight and not for sixteen."""


def models(house: House) -> dict[str, dict[str, Any]]:
    status = Appliance(house.http).get("/v2/appliance/status")
    return {model["name"]: model for model in status["models"]}


def command(house: House, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        env={**os.environ, "APPLIANCE_URL": house.http, "APPLIANCE_CONFIG": str(house.config)},
    )
    return json.loads(done.stdout)


def test_a_model_that_waits_for_memory_says_so_and_is_loaded_when_another_is_unloaded(house: House) -> None:
    for name in ("a", "b"):
        house.loopback(name, "[worker]\ninstances = 8", shape="4")
    house.settings["memory"] = {"host_reserve_mb": (psutil.virtual_memory().available >> 20) - ROOM_MIB}
    house.start()
    waiting = models(house)["b"]
    assert (models(house)["a"]["detail"], waiting["detail"]) == ("READY", "FAILED")
    assert waiting["reason"].startswith("waits for memory: needs 0.8 GB on host, ")
    findings = command(house, "doctor")
    fixes = [
        found["fix"] for found in findings if found["text"].startswith("b version 1 does not serve: waits for memory")
    ]
    assert "it is loaded by itself when there is room" in fixes[0]
    memory = [found for found in findings if found["text"].startswith("host: 2 model versions take")]
    assert (memory[0]["grade"], "too much" in memory[0]["text"]) == ("error", True)
    Appliance(house.http).post("/v2/repository/models/a/unload")
    end = time.monotonic() + LONG_S
    while models(house)["b"]["detail"] != "READY":
        assert time.monotonic() < end, models(house)
        time.sleep(0.05)
    assert [found["grade"] for found in command(house, "doctor") if found["check"] == "devices"] == ["good"]
    assert house.stop() == 0
    kinds = [event["kind"] for event in command(house, "events", "--limit", "1000")["events"]]
    assert kinds.count("memory.refused") == 1
    assert kinds.count("memory.retried") == 1
