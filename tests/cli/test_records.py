"""Commands about what was recorded, on the file of an appliance that is not running."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tarfile
import time
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from appliance.cli import bugreport, connection
from appliance.cli.history import matching, number, sparkline
from appliance.cli.main import app
from appliance.cli.output import CommandError
from appliance.cli.records import clock, moment
from appliance.core import quantities as q
from appliance.core.energy import EnergyWindow, ModelShare
from appliance.recording.recorder import Recorder

run = CliRunner()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record, a configuration that names it, and nobody who answers."""
    path = tmp_path / "r.sqlite3"
    config = tmp_path / "appliance.toml"
    config.write_text(f'runtime_dir = "{tmp_path}"\n[recorder]\npath = "{path}"\n[http]\nport = 1\n')
    monkeypatch.setenv("APPLIANCE_CONFIG", str(config))
    monkeypatch.delenv("APPLIANCE_URL", raising=False)
    # nor one that runs beside the tests, when the configuration cannot be read
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(path, max_bytes=64 << 20)
    recorder.start()
    now = time.time()
    for second in range(120):
        readings = {
            q.GPU_TEMPERATURE.name(0): 40.0 + second,
            q.GPU_TEMPERATURE.name(1): 20.0,
            q.GPU_FAN.name(0, 0): 50.0,
        }
        recorder.record_sample(now - 120 + second, 1000.0 + second, readings)
    recorder.record_event("model.state", "info", {"model": "digits", "api_token": "hush"})
    recorder.record_action("anna", "load", {"model": "digits"})
    recorder.record_energy(
        EnergyWindow("gpu0", "rapl", True, 10.0, 10**7, 3 * 10**6, 0, (ModelShare("m", 7 * 10**6, 1.0, 700),))
    )
    assert recorder.flush()
    recorder.close()
    return path


def output(*arguments: str, code: int = 0) -> str:
    done = run.invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout


def test_events_are_read_from_the_file_when_nobody_answers(file: Path) -> None:
    assert "model=digits" in output("events", "--since", "1h")
    found = json.loads(output("events", "--kind", "operator", "--json"))["events"]
    assert [event["fields"]["actor"] for event in found] == ["anna"]


def test_history_is_a_sparkline_csv_or_json(file: Path) -> None:
    line = output("history", "gpu.0.temperature")
    assert "159" in line
    assert "▁" in line
    assert "█" in line
    rows = output("history", "gpu.0.temperature", "--csv").splitlines()
    assert rows[0] == "time,name,min,mean,max"
    assert len(rows) == 121
    assert json.loads(output("history", "gpu.0.temperature", "--json"))["tier_s"] == 1
    assert output("history").split() == ["gpu.0.fan.0", "gpu.0.temperature", "gpu.1.temperature"]


def test_a_damaged_record_is_said_to_be_put_aside_by_the_next_start(file: Path) -> None:
    file.write_bytes(b"x" * 5000)
    Path(f"{file}-wal").unlink(missing_ok=True)
    told = run.invoke(app, ["events"]).stderr
    assert "file is not a database" in told
    assert "`appliance serve` puts the file aside" in told
    assert "begins a new record" in told


def test_an_hour_that_comes_twice_is_told_apart(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        first, second = 1_792_888_200.0, 1_792_891_800.0
        assert [clock(first), clock(second)] == ["2026-10-25 02:30:00+02:00", "2026-10-25 02:30:00+01:00"]
        assert [moment(clock(first)), moment(clock(second, "T"))] == [first, second]
        written = datetime.fromisoformat(output("history", "gpu.0.temperature", "--csv").splitlines()[1].split(",")[0])
        assert written.utcoffset() is not None
        assert abs(written.timestamp() - time.time()) < 300
        [line] = output("audit", "list").splitlines()[1:]
        assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d +anna", line)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_reading_without_its_number_is_every_such_reading(file: Path) -> None:
    lines = output("history", "gpu.temperature", "--since", "24h").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["gpu.0.temperature", "gpu.1.temperature"]
    assert all("▁" in line for line in lines[1:])
    assert list(json.loads(output("history", "gpu.0.fan", "--json"))["series"]) == ["gpu.0.fan.0"]


def test_a_reading_that_was_never_recorded_is_an_error_with_near_ones(file: Path) -> None:
    done = run.invoke(app, ["history", "gpu.0.temprature"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "there is no reading by the name of gpu.0.temprature" in done.stderr
    assert "gpu.0.temperature" in done.stderr
    failed = json.loads(output("history", "no.such", "--json", code=1))["error"]
    assert failed["code"] == "NO_SUCH_READING"


def test_a_reading_that_there_could_be_is_no_error(file: Path) -> None:
    lines = output("history", "gpu.2.temperature", "host.cpu.load", "gpu.0.temperature").splitlines()
    assert [("nothing recorded" in line) for line in lines[1:]] == [True, True, False]


RECORDED = [
    *("gpu.0.power", "gpu.10.power", "gpu.0.power.limit", "gpu.0.fan.0", "gpu.0.fan.1", "gpu.0.throttle"),
    *("host.cpu.load", "host.cpu.load_average", "host.temperature.acpitz", "host.temperature.acpitz.critical"),
    *("process.front.rss", "process.worker:m:1:0.rss", "requests.rate"),
]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        (["gpu.power"], ["gpu.0.power", "gpu.10.power"]),
        (["gpu.10.power"], ["gpu.10.power"]),
        (["gpu.fan"], ["gpu.0.fan.0", "gpu.0.fan.1"]),
        (["gpu.0.fan"], ["gpu.0.fan.0", "gpu.0.fan.1"]),
        (["gpu.throttle"], ["gpu.0.throttle"]),
        (["gpu.power.limit", "gpu.power"], ["gpu.0.power.limit", "gpu.0.power", "gpu.10.power"]),
        (["gpu.power", "gpu.0.power"], ["gpu.0.power", "gpu.10.power"]),
        (["host.cpu.load", "requests.rate"], ["host.cpu.load", "requests.rate"]),
        (["host.temperature"], ["host.temperature.acpitz"]),
        (["process.rss"], ["process.front.rss", "process.worker:m:1:0.rss"]),
        (["gpu.temperature", "gpu.7.power"], ["gpu.temperature", "gpu.7.power"]),
    ],
)
def test_labels_may_be_left_out_and_nothing_else(asked: list[str], meant: list[str]) -> None:
    assert matching(asked, RECORDED) == meant


@pytest.mark.parametrize(
    "name", ["gpu", "power", "gpu.0", "host.cpu", "0.power", "gpu.pow", "gpu.power.0", "requests", ""]
)
def test_what_is_no_reading_is_an_error(name: str) -> None:
    with pytest.raises(CommandError, match="there is no reading"):
        matching([name], RECORDED)
    assert matching([name], []) == [name], "before anything is recorded nobody knows"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (61.0, "61"), (-3.14159, "-3.142"), (99999.4, "99999"), (61_210_624.0, "61.21M"), (3.2e9, "3.2G")],
)
def test_numbers_are_read_at_a_glance(value: float, text: str) -> None:
    assert number(value) == text


def test_energy_has_its_price_and_an_estimate_is_called_one(file: Path) -> None:
    assert "rapl (estimate)" in output("energy", "--price", "0.30", "--gco2", "380")
    rows = {row["kind"]: row for row in json.loads(output("energy", "--price", "0.30", "--json"))["energy"]}
    assert rows["model"]["joules_per_1000"] == pytest.approx(10.0)
    assert rows["total"]["cost"] == pytest.approx(10 / 3.6e6 * 0.30)
    assert rows["total"]["joules"] == sum(rows[kind]["joules"] for kind in ("idle", "unattributed", "model"))


def test_the_energy_of_a_jetson_s_gpu_is_in_its_board_s_and_counts_once(file: Path) -> None:
    recorder = Recorder(file, max_bytes=64 << 20)
    recorder.start()
    shares = (ModelShare("m", 10**8, 30.0, 700),)
    recorder.record_energy(EnergyWindow("host", "ina3221", False, 60.0, 720 * 10**6, 620 * 10**6, 0, shares))
    recorder.record_energy(EnergyWindow("gpu:0", "estimate", True, 60.0, 240 * 10**6, 140 * 10**6, 0, shares))
    assert recorder.flush()
    recorder.close()
    found = json.loads(output("energy", "--json"))
    assert found["total"]["joules"] == 720
    assert {row["device"]: row["within"] for row in found["energy"]} == {"host": "", "gpu:0": "host", "gpu0": "host"}
    lines = output("energy").splitlines()
    assert any(line.startswith("gpu:0 in host") for line in lines)
    assert lines[-1].split()[:3] == ["box", "total", "0.000200"]


def test_the_chain_is_verified_and_a_broken_one_is_an_error(file: Path) -> None:
    assert "the chain holds" in output("audit", "verify")
    assert "anna" in output("audit", "list")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE audit SET action = 'unload'")
    connection.close()
    assert "changed after it was written" in run.invoke(app, ["audit", "verify"]).stderr
    assert json.loads(output("audit", "verify", "--json", code=1))["ok"] is False


def test_a_record_that_was_destroyed_is_no_chain_that_holds_until_that_is_accepted(file: Path) -> None:
    file.write_bytes(b"\xa5" * file.stat().st_size)
    recorder = Recorder(file, max_bytes=64 << 20)
    recorder.start()
    assert recorder.flush()
    recorder.close()
    done = run.invoke(app, ["audit", "verify"])
    assert done.exit_code == 1
    assert "1 actions, the chain holds" in done.stdout
    assert "begun anew at 20" in done.stdout
    assert "1 damaged file beside it" in done.stderr
    shown = json.loads(output("audit", "verify", "--json", code=1))
    [entry] = shown["begun_anew"]
    assert entry["fields"]["last_hash"] == "none of it can be read"
    assert f"--accept {entry['hash'][:12]}" in done.stderr
    output("audit", "verify", "--accept", entry["hash"][:2], code=1)
    assert "begun anew at 20" in output("audit", "verify", "--accept", entry["hash"][:12])


def test_a_bugreport_holds_what_support_needs_and_no_secret(file: Path, tmp_path: Path) -> None:
    shown = json.loads(output("bugreport", "-o", "report.tar.gz", "--json"))
    assert {part["name"] for part in shown["contents"]} >= {
        "events.json",
        "history.json",
        "configuration.json",
        "log.txt",
    }
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        texts = {entry.name: archive.extractfile(entry).read().decode() for entry in archive}  # type: ignore[union-attr]
    assert "digits" in texts["bugreport/events.json"]
    assert not any("hush" in text for text in texts.values())
    assert (tmp_path / "report.tar.gz").stat().st_mode & 0o077 == 0
    assert run.invoke(app, ["bugreport", "-o", "report.tar.gz"]).exit_code == 1, "an archive is not overwritten"


@pytest.mark.parametrize(
    "broken",
    ['[http\nport = "x"\n"hush" = 1', '[http]\nport = "x" # hush\nadmin_token = "hush"\nprot = 1\nhush = "x"\n'],
)
def test_a_bugreport_is_made_though_the_configuration_is_broken(
    file: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "appliance.toml").write_text(broken)
    output("bugreport", "-o", "report.tar.gz")
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        texts = {entry.name: archive.extractfile(entry).read().decode() for entry in archive}  # type: ignore[union-attr]
    assert json.loads(texts["bugreport/configuration.json"])["problems"]
    assert 'port = "x"' in texts["bugreport/configuration.toml"]
    assert "problems" in texts["bugreport/events.json"], "where the record lies is not known"
    assert "appliance" in json.loads(texts["bugreport/versions.json"])
    assert not any("hush" in text for text in texts.values())


JOURNAL = """#!/bin/sh
printf '%s\\n' "$@" > {asked}
cat <<'END'
2026-11-25T06:00:00+0000 box appliance[71]: daemon.ready seconds=0.5 status='1 model ready'
2026-11-25T06:00:01+0000 box appliance[71]: config.refused reason='http.token = "hush1": unknown key'
2026-11-25T06:00:02+0000 box appliance[71]: worker.lost reason=https://kim:hush2@registry.example/models
2026-11-25T06:00:03+0000 box appliance[71]: Authorization: Bearer hush3
2026-11-25T06:00:04+0000 box appliance[71]: started as appliance --zmq-secret-key hush4 --port 1
END
"""


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "bin" / "journalctl"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)


def log_of(tmp_path: Path) -> str:
    (tmp_path / "report.tar.gz").unlink(missing_ok=True)
    output("bugreport", "-o", "report.tar.gz", "--since", "2027-01-31T06:00+00:00")
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        found = archive.extractfile("bugreport/log.txt")
        assert found is not None
        return found.read().decode()


def test_a_bugreport_holds_the_journal_s_lines_of_our_unit_without_secrets(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    program(tmp_path, monkeypatch, JOURNAL.replace("{asked}", str(asked)))
    log = log_of(tmp_path)
    assert [line.partition("]: ")[2].split(" ")[0] for line in log.splitlines()][:3] == [
        "daemon.ready",
        "config.refused",
        "worker.lost",
    ]
    assert len(log.splitlines()) == 5
    assert "hush" not in log
    assert "--port 1" in log
    assert asked.read_text().split()[:4] == ["-u", "appliance", "--since", "@1801375200"]


def test_a_journal_that_is_huge_loses_its_beginning_and_one_that_hangs_or_refuses_is_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bugreport, "MAX_PART_BYTES", 4000)
    program(tmp_path, monkeypatch, "#!/bin/sh\ni=0; while [ $i -lt 999 ]; do echo line $i; i=$((i+1)); done\n")
    log = log_of(tmp_path)
    assert (len(log), log.splitlines()[-1]) == (4000, "line 998")
    program(
        tmp_path,
        monkeypatch,
        "#!/bin/sh\necho 'No journal: insufficient permissions' >&2\nexit 1\n",
    )
    assert "insufficient permissions" in log_of(tmp_path)
    monkeypatch.setattr(bugreport, "JOURNAL_S", 0.2)
    program(tmp_path, monkeypatch, "#!/bin/sh\nexec sleep 60\n")
    assert "timed out" in log_of(tmp_path)


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=80))
def test_a_sparkline_has_one_block_a_value(values: list[float | None]) -> None:
    line = sparkline(values)
    assert len(line) == (len(values) if any(value is not None for value in values) else 0)


def test_moments_are_spans_or_times() -> None:
    assert moment("24h") == pytest.approx(time.time() - 86_400, abs=5)
    assert moment("1.5h") == pytest.approx(time.time() - 5_400, abs=5)
    assert moment("2027-01-31T06:00+00:00") == 1_801_375_200.0
    assert run.invoke(app, ["events", "--since", "yesterday"]).exit_code == 2


def test_a_record_that_could_not_be_begun_is_no_matter_of_models(file: Path) -> None:
    for left in file.parent.glob("r.sqlite3*"):
        left.unlink()
    sqlite3.connect(file).close()
    file.write_bytes(b"")
    done = run.invoke(app, ["events"])
    assert done.exit_code == 1
    assert "could not begin its file. Is its disk full?" in done.stderr
    assert "no such table" not in done.output


def test_a_record_that_a_running_appliance_cannot_read_has_its_own_sections_of_the_book() -> None:
    body = json.dumps({"error": "nothing has been recorded yet"}).encode()
    error = connection._error(503, body, "/v2/appliance/events?since=1")
    assert "operations.md#recorder and operations.md#disk-full" in error.hint
    assert connection._error(503, body, "/v2/models/m/infer").hint == "see `appliance models list`"
