"""A real appliance is recorded: its start and stop, what operators did, a kill, and commands with and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from appliance.cli.connection import Appliance
from appliance.recording.reader import RecordReader
from tests.e2e.house import LONG_S, House


def command(house: House, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", *arguments, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "APPLIANCE_CONFIG": str(house.config)},
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def chained(house: House, entries: int) -> Any:
    """The chain as the running appliance sees it, once it has so many entries."""
    end = time.monotonic() + LONG_S
    while (found := Appliance(house.http).get("/v2/appliance/audit"))["verdict"]["entries"] != entries:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_what_happened_is_known_afterwards_also_after_a_kill(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.loopback("m")
    try:
        house.start()
        Appliance(house.http).post("/v2/repository/models/m/unload")
        # it goes to the disk at once, though not before the answer: up to two seconds may be lost to a kill
        live = chained(house, 1)
        assert live["verdict"]["ok"]
        assert house.process is not None
        house.process.kill()
        house.process.wait()
        house.start()
        assert house.stop() == 0
        kinds = [event["kind"] for event in command(house, "events", "--limit", "1000")["events"]]
        assert kinds.count("daemon.start") == 2
        assert kinds.count("daemon.crash") == 1
        assert kinds.count("daemon.stop") == 1
        assert "model.state" in kinds
        assert command(house, "audit", "verify")["entries"] == 1
        [stop] = RecordReader(house.models / ".recorder" / "recorder.sqlite3").events(kind="daemon.stop")
        assert stop["fields"] == {"reason": "SIGTERM"}
    finally:
        house.finish()
