"""`credential:NAME` in the configuration: looked up where systemd lays it, by who starts, and shown to nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config import MAX_CREDENTIAL_BYTES, ConfigError, credentials_dir, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the credentials of the service lie."""
    made = tmp_path / "credentials"
    made.mkdir()
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "appliance.toml"
    made.write_text('[http]\nport = 1\nhost = "credential:http-host"\n')
    return made


def refused(file: Path, folder: Path | None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, credentials=folder)
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (3, "http.host")
    assert "LoadCredential=http-host:" in problem.hint or "http-host" not in problem.message
    return problem.message


def test_what_it_holds_takes_the_place_of_its_name(file: Path, folder: Path) -> None:
    (folder / "http-host").write_text("10.0.0.1\n")
    assert load(file, credentials=folder).http.host == "10.0.0.1"


def test_one_newline_at_the_end_is_no_part_of_it_and_a_second_is(file: Path, folder: Path) -> None:
    (folder / "http-host").write_text("a\n\n")
    assert load(file, credentials=folder).http.host == "a\n"


def test_who_only_looks_at_the_configuration_sees_the_name(file: Path, folder: Path) -> None:
    (folder / "http-host").write_text("secret")
    assert load(file).http.host == "credential:http-host"


def test_one_that_was_not_given_is_said_with_its_line_and_what_to_do(file: Path, folder: Path) -> None:
    assert "No such file" in refused(file, folder)
    assert "CREDENTIALS_DIRECTORY is not set" in refused(file, None)


def test_one_that_is_too_long_or_no_text_is_refused(file: Path, folder: Path) -> None:
    (folder / "http-host").write_bytes(b"x" * (MAX_CREDENTIAL_BYTES + 1))
    assert "longer than" in refused(file, folder)
    (folder / "http-host").write_bytes(b"x" * MAX_CREDENTIAL_BYTES)
    assert len(load(file, credentials=folder).http.host) == MAX_CREDENTIAL_BYTES
    (folder / "http-host").write_bytes(b"secret\xff")
    said = refused(file, folder)
    assert "secret" not in said


def test_a_complaint_about_another_key_does_not_show_it(file: Path, folder: Path) -> None:
    (folder / "http-host").write_text("secret")
    file.write_text(file.read_text() + "unknown = 1\n")
    with pytest.raises(ConfigError) as caught:
        load(file, credentials=folder)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc/passwd", "a/b", "a b", "a\\u0000b", "ä"])
def test_a_name_that_could_leave_the_folder_is_refused(file: Path, folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    file.write_text(f'[http]\nport = 1\nhost = "credential:{name}"\n')
    with pytest.raises(ConfigError, match="cannot be had"):
        load(file, credentials=folder)


@given(st.text())
def test_no_name_reaches_a_file_outside_of_the_folder(name: str) -> None:
    from appliance.config import _credential

    with pytest.raises((OSError, ValueError)):
        _credential(Path("/nonexistent/credentials"), name)


def test_the_folder_is_what_systemd_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/appliance.service")
    assert credentials_dir() == Path("/run/credentials/appliance.service")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert credentials_dir() is None
