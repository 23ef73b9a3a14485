"""What the doctor makes of what systemd says, when no appliance answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import book, doctor_unit
from appliance.cli.doctor_unit import State
from appliance.cli.findings import Finding, Patient
from appliance.cli.main import app
from appliance.config import Config, HttpConfig

REFUSED = "appliance.toml:2: unknown key 'http.prot'"


def told(state: State | None, config: Config | None = None) -> list[Finding]:
    return list(doctor_unit.service(Patient(config or Config(), None, None), lambda: state))


def loaded(active: str, sub: str = "", **more: str) -> State:
    return State(load_state="loaded", active_state=active, sub_state=sub, **more)


def test_a_service_that_failed_is_to_be_mended_with_its_own_words() -> None:
    (found,) = told(loaded("failed", "failed", result="exit-code", exec_main_status="78", status_text=REFUSED))
    assert (found.grade, book.pointer(found.check)) == ("error", "operations.md#not-starting")
    assert found.text == f"has failed and is not started again (exit status 78): {REFUSED}"
    assert "systemctl status appliance" in found.fix
    assert "journalctl -u appliance" in found.fix
    (found,) = told(loaded("failed", "failed", result="signal"))
    assert found.text.endswith("again (signal)")
    (found,) = told(loaded("failed", "failed", result="success", status_text="no port"))
    assert found.text.endswith("again: no port")


def test_a_service_that_starts_again_and_again_is_too_also_between_two_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = loaded("activating", "auto-restart", result="exit-code", exec_main_status="75", status_text="no port")
    pause = State(**{name: getattr(pause, name) for name in State.__struct_fields__} | {"n_restarts": "7"})
    starting = loaded("activating", "start", result="success", n_restarts="7")
    states: Iterator[State] = iter([starting, starting, pause])
    monkeypatch.setattr(doctor_unit, "LOOK_S", 0.0)
    (found,) = doctor_unit.service(Patient(Config(), None, None), lambda: next(states))
    assert (found.grade, found.text) == (
        "error",
        "ends and is started again; 7 times by now (exit status 75): no port",
    )


@pytest.mark.parametrize(
    ("state", "grade", "words"),
    [
        (loaded("inactive", unit_file_state="enabled"), "note", "starts at the next boot"),
        (loaded("inactive", unit_file_state="disabled"), "note", "no boot starts it"),
        (loaded("activating", "start", status_text="loading 2 models"), "note", "is activating: loading 2 models"),
        (loaded("deactivating", status_text="draining"), "note", "is deactivating: draining"),
        (loaded("active"), "error", "runs, and does not answer"),
        (State(load_state="masked", active_state="inactive"), "warning", "masked"),
    ],
)
def test_other_states_are_said_as_they_are(state: State, grade: str, words: str) -> None:
    (found,) = told(state)
    assert (found.grade, words in found.text) == (grade, True), found


def test_one_that_runs_and_cannot_be_asked_is_not_ill() -> None:
    for http in (HttpConfig(enabled=False), HttpConfig(host="credential:h")):
        assert [found.grade for found in told(loaded("active"), Config(http=http))] == ["note"]


def test_nothing_is_said_without_a_systemd_or_without_the_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert told(None) == []
    assert told(State(load_state="not-found", active_state="inactive")) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_unit.ask() is None
    systemctl = tmp_path / "systemctl"
    systemctl.write_text("#!/bin/sh\necho 'System has not been booted with systemd' >&2; exit 1\n")
    systemctl.chmod(0o755)
    assert doctor_unit.ask() is None


@pytest.mark.parametrize(("active", "code"), [("failed", 1), ("inactive", 0)])
def test_doctor_asks_systemd_when_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, active: str, code: int
) -> None:
    systemctl = tmp_path / "systemctl"
    told = f"LoadState=loaded\nUnitFileState=enabled\nActiveState={active}\nResult=exit-code\nExecMainStatus=78\nStatusText=a=b"
    systemctl.write_text(f"#!/bin/sh\nprintf '{told.replace(chr(10), chr(92) + 'n')}\\n'\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("APPLIANCE_CONFIG", str(tmp_path / "a.toml"))
    (tmp_path / "a.toml").write_text("")
    done = CliRunner().invoke(
        app, ["doctor", "--only", "running", "--url", "http://127.0.0.1:9"], env={"COLUMNS": "200"}
    )
    assert done.exit_code == code, done.output
    assert ("(exit status 78): a=b" in done.stdout) == (active == "failed")
