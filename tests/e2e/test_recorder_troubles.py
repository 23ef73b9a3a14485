"""What becomes of a real appliance whose record is damaged under it, or whose disk is full: it serves on, and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from appliance.cli.connection import Appliance
from appliance.cli.main import app
from appliance.recording.reader import RecordReader
from tests.e2e.house import LONG_S, House
from tests.recording.test_recorder import spoil


class Client:
    """Asks all the while; what was not answered well is kept."""

    def __init__(self, house: House) -> None:
        self.answered, self.failed = 0, []  # type: int, list[str]
        self._request = urllib.request.Request(
            f"{house.http}/v2/models/echo/infer",
            json.dumps(
                {"inputs": [{"name": "data", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
            ).encode(),
            {"Content-Type": "application/json"},
        )
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(LONG_S)

    def _run(self) -> None:
        while not self._end.wait(0.01):
            try:
                with urllib.request.urlopen(self._request, timeout=LONG_S) as answer:
                    assert json.load(answer)["outputs"][0]["data"] == [1, 2, 3, 4]
                self.answered += 1
            except Exception as error:  # whatever it is, the test must fail by it
                self.failed.append(repr(error))


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def status(house: House) -> dict[str, Any]:
    found: dict[str, Any] = Appliance(house.http).get("/v2/appliance/status")
    return found


def metric(house: House, name: str) -> float:
    with urllib.request.urlopen(f"{house.http}/metrics", timeout=LONG_S) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split(" ")[1] for line in lines if line.startswith(f"{name} ")))


def doctor(house: House) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        env={**os.environ, "APPLIANCE_URL": house.http, "APPLIANCE_CONFIG": str(house.config)},
    )
    return [found for found in json.loads(done.stdout) if found["check"] == "recorder"]


def test_a_record_that_is_damaged_while_it_serves_is_put_away_and_a_new_one_begun(house: House) -> None:
    house.loopback("echo", shape="4")
    house.start()
    path = house.models / ".recorder" / "recorder.sqlite3"
    until(lambda: status(house)["recorder"]["committed"] > 0, "the first commit")
    with Client(house) as client:
        spoil(path, "samples_1", whole=True)
        fields = house.wait_for("recorder.damaged")
        until(lambda: status(house)["recorder"]["problem"] == "", "it records again")
        before = client.answered
        until(lambda: client.answered > before + 5, "it serves on")
    assert not client.failed
    assert "kept as recorder.sqlite3.damaged-" in fields["reason"]
    assert status(house)["recorder"]["set_aside"] == 1
    assert metric(house, "appliance_recorder_set_aside_total") == 1
    assert metric(house, "appliance_recorder_ok") == 1
    [told] = doctor(house)
    assert (told["grade"], "was put away as recorder.sqlite3.damaged-" in told["text"]) == ("warning", True)
    assert [event["severity"] for event in RecordReader(path).events(kind="recorder.damaged")] == ["error"]
    assert house.stop() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    at = tmp_path / "small"
    at.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(at)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield at
    subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_full_disk_costs_records_and_no_request_and_heals_by_itself(house: House, small_disk: Path) -> None:
    house.loopback("echo", shape="4")
    house.settings["recorder"] = {"path": str(small_disk / "r.sqlite3"), "max_size_mb": 16}
    house.start()
    until(lambda: status(house)["recorder"]["committed"] > 0, "the first commit")
    with Client(house) as client:
        # somebody else takes every byte, also what the recorder gives up to make room
        taken = small_disk / "others"
        with taken.open("ab") as file:
            for _ in range(20):
                try:
                    while True:
                        os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), 4096)
                except OSError:
                    pass
                if status(house)["recorder"]["problem"]:
                    break
                time.sleep(0.3)
        until(lambda: status(house)["recorder"]["problem"] != "", "it says that there is no room")
        assert metric(house, "appliance_recorder_ok") == 0
        assert [told["grade"] for told in doctor(house)] == ["error"]
        taken.unlink()
        house.wait_for("recorder.recovered")
        until(lambda: status(house)["recorder"]["problem"] == "", "it records again")
    assert not client.failed
    assert client.answered > 10
    assert house.stop() == 0
    assert RecordReader(small_disk / "r.sqlite3").events(kind="recorder.recovered")


def test_the_second_appliance_on_one_record_says_everywhere_that_it_records_nothing(
    house: House, tmp_path: Path
) -> None:
    house.loopback("echo", shape="4")
    house.start()
    second = House(tmp_path / "second")
    second.loopback("echo", shape="4")
    second.settings["recorder"] = {"path": str(house.models / ".recorder" / "recorder.sqlite3")}
    try:
        second.start()
        until(lambda: "another appliance" in status(second)["recorder"]["problem"], "it does not notice")
        run = CliRunner()
        told = run.invoke(app, ["check", "--url", second.http])
        assert (told.exit_code, told.stdout.partition(";")[0]) == (
            1,
            "APPLIANCE WARNING: the flight recorder does not record: another appliance records into this file",
        )
        told = run.invoke(app, ["status", "--url", second.http])
        assert told.exit_code == 0
        assert "the flight recorder does not record: another appliance" in told.stdout
        for command in (["events"], ["history"], ["energy"], ["audit", "verify"]):
            told = run.invoke(app, [*command, "--url", second.http])
            assert (told.exit_code, told.stdout) == (4, ""), "it is the other one's record"
            assert "another appliance records into this file" in told.stderr
        [found] = doctor(second)
        assert "stop the other one" in found["fix"]
        assert house.stop() == 0
        until(lambda: status(second)["recorder"]["problem"] == "", "it does not go on")
        assert "daemon.start" in run.invoke(app, ["events", "--url", second.http]).stdout
        told = run.invoke(app, ["check", "--url", second.http])
        assert told.exit_code == 0
        assert "flight recorder" not in run.invoke(app, ["status", "--url", second.http]).stdout
    finally:
        second.finish()
