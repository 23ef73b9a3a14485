"""An operator holds a real appliance back for a while: by command, with its answers to clients, metrics and chain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest

from appliance.cli.connection import Appliance
from tests.e2e.house import LONG_S, House


def command(house: House, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", *arguments],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        env={**os.environ, "APPLIANCE_URL": house.http, "APPLIANCE_CONFIG": str(house.config)},
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def ask(house: House, priority: int) -> dict[str, Any]:
    tensor = {"name": "data", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    document = {"parameters": {"priority": priority}, "inputs": [tensor]}
    request = urllib.request.Request(
        f"{house.http}/v2/models/echo/infer", json.dumps(document).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=LONG_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_hold_holds_back_is_kept_in_the_chain_and_ends_with_the_process(house: House) -> None:
    house.loopback("echo", shape="4")
    house.start()
    command(house, "governor", "hold", "HOT", "--for", "10m", "--reason", "the fan is being changed")
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(house, 9)
    with refused.value as answer:
        assert (answer.code, answer.headers["Retry-After"]) == (503, "60")
        assert "an operator holds it at HOT (the fan is being changed)" in json.load(answer)["error"]
    assert ask(house, 1)["outputs"]
    shown = command(house, "governor", "show")
    assert shown.startswith("HOT: an operator holds it")
    status = Appliance(house.http).get("/v2/appliance/status")["governor"]
    assert (status["level"], status["hold"]["level"]) == ("HOT", "HOT")
    with urllib.request.urlopen(f"{house.http}/metrics", timeout=LONG_S) as answer:
        lines = answer.read().decode().splitlines()
    assert "appliance_governor_level 2" in lines
    left = next(float(line.split()[1]) for line in lines if line.startswith("appliance_governor_hold_seconds "))
    assert 500 < left <= 600
    command(house, "governor", "hold", "NOMINAL", "--for", "1m", "--reason", "quiet", code=1)
    command(house, "governor", "release")
    assert ask(house, 9)["outputs"]
    command(house, "governor", "hold", "CRITICAL", "--for", "1h", "--reason", "until the restart")
    assert house.stop() == 0
    house.start()
    assert ask(house, 9)["outputs"], "a restart releases it"
    chain = json.loads(command(house, "audit", "list", "--json"))
    assert sorted(entry["action"] for entry in chain["entries"]) == [
        "governor.hold",
        "governor.hold",
        "governor.release",
    ]
    assert json.loads(command(house, "audit", "verify", "--json"))["ok"]
