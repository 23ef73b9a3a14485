"""`bundle status`: the release that is there, whichever way it came, and the last bundle, which may be another."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import bundle
from appliance.cli.main import app
from appliance.cli.output import CommandError, Exit
from appliance.release import signing
from appliance.release.box import Box, Installed, State, write_state


def status(root: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["bundle", "status", "--root", str(root), *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def runs(root: Path, version: str, *kept: str) -> None:
    """That release's slot is in place, and those others are kept."""
    for name in (version, *kept):
        slot = root / "usr/lib/appliance/releases" / name
        slot.mkdir(parents=True, exist_ok=True)
        (slot / ".complete").touch()
    current = root / "usr/lib/appliance/current"
    current.unlink(missing_ok=True)
    current.symlink_to(Path("releases") / version)


def test_a_bare_root_has_neither(tmp_path: Path) -> None:
    assert status(tmp_path).splitlines() == ["no release is installed below this root", "no bundle was installed"]
    assert json.loads(status(tmp_path, "--json")) == {
        "release": "", "floor": "", "current": None, "pending": None, "before": [], "kept": {}, "failed": "",
    }  # fmt: skip


def test_the_release_that_runs_is_named_with_the_one_that_is_kept(tmp_path: Path) -> None:
    write_state(Box(tmp_path), State("2.0.0", Installed("2.0.0", "1.0.0")))
    runs(tmp_path, "2.0.0")
    assert "kept" not in status(tmp_path), "its slot is gone"
    runs(tmp_path, "2.0.0", "1.0.0")
    assert status(tmp_path).splitlines() == [
        "release 2.0.0",
        "kept: 1.0.0",
        "nothing older than 2.0.0 is installed unasked",
    ]


def test_a_bundle_of_models_is_not_taken_for_the_release(tmp_path: Path) -> None:
    runs(tmp_path, "2.0.0")
    write_state(Box(tmp_path), State("2.0.0", Installed("2026.11.25", "2.0.0")))
    assert status(tmp_path).splitlines()[:2] == ["release 2.0.0", "last bundle: 2026.11.25"]


def test_the_kept_release_is_named_after_a_bundle_of_models_too(tmp_path: Path) -> None:
    runs(tmp_path, "2.0.0", "1.0.0")
    models = Installed("2026.11.25", "2.0.0", models_only=True)
    write_state(Box(tmp_path), State("2.0.0", models, before=(Installed("2.0.0", "1.0.0"),)))
    assert status(tmp_path).splitlines()[:3] == ["release 2.0.0", "last bundle: 2026.11.25", "kept: 1.0.0"]


def test_an_installation_that_was_cut_off_says_how_to_take_it_back(tmp_path: Path) -> None:
    runs(tmp_path, "2.0.0")
    write_state(Box(tmp_path), State("", Installed("2.0.0"), Installed("3.0.0", "2.0.0")))
    assert "cut off: the installation of 3.0.0; `appliance bundle rollback` takes it back" in status(tmp_path)


def test_a_restart_that_hangs_is_waited_for_only_as_long_as_for_the_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "restart"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    bundle.CommandService(Box(tmp_path), str(program), 0).restart()
    assert "restart restart did not end within 1 s" in capsys.readouterr().err


def test_a_restart_program_that_is_missing_and_a_full_disk_are_told_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.CommandService(Box(tmp_path), str(tmp_path / "nothing"), 1).restart()
    assert "nothing restart failed: No such file or directory" in capsys.readouterr().err
    with pytest.raises(CommandError, match="No space left on device") as told, bundle._words():
        raise OSError(errno.ENOSPC, "No space left on device", "/var/lib/appliance-releases")
    assert told.value.code is Exit.FAILED


def create(folder: Path, *arguments: str) -> tuple[int, str]:
    """What `bundle create` says, with a new key."""
    if not (folder / "maker.key").exists():
        signing.generate(folder / "maker.key", folder / "maker.pub")
    line = ["bundle", "create", str(folder / "x.bundle"), "--key", str(folder / "maker.key"), *arguments]
    done = CliRunner().invoke(app, line)
    return done.exit_code, str(done.exception) + done.output


def test_an_empty_bundle_and_a_release_of_another_version_are_refused_where_they_are_made(tmp_path: Path) -> None:
    code, said = create(tmp_path, "--version", "1")
    assert (code != 0, "would be empty" in said) == (True, True)
    (tmp_path / "appliance-0.1.0-py3-none-any.whl").touch()
    wheel = str(tmp_path / "appliance-0.1.0-py3-none-any.whl")
    code, said = create(tmp_path, "--version", "5", "--release", wheel)
    assert (code != 0, "--version says 5, and appliance-0.1.0-py3-none-any.whl is release 0.1.0" in said) == (
        True,
        True,
    )
    assert not (tmp_path / "x.bundle").exists()
    assert create(tmp_path, "--version", "0.1.0", "--release", wheel)[0] == 0


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [("verify", "x.bundle.001", "is one part of a bundle"), ("copy", "x.bundle", "is no index of parts")],
)
def test_the_wrong_one_of_a_bundle_s_files_is_told_from_a_forgery(
    tmp_path: Path, command: str, name: str, words: str
) -> None:
    signing.generate(tmp_path / "maker.key", tmp_path / "keys" / "maker.pub")
    (tmp_path / name).write_bytes(b"x" * 100)
    target = [str(tmp_path / "to")] if command == "copy" else []
    line = ["bundle", command, str(tmp_path / name), *target, "--keys", str(tmp_path / "keys")]
    done = CliRunner().invoke(app, line)
    assert words in str(done.exception) + done.output


def test_models_that_failed_are_named_with_their_reasons(tmp_path: Path) -> None:
    program = Box(tmp_path).program / "bin" / "appliance"
    program.parent.mkdir(parents=True)
    models = [
        {"name": "m", "state": "FAILED", "reason": "no such operator"},
        {"name": "n", "state": "READY", "reason": ""},
    ]
    document = {"status": {"ready": False, "version": "1"}, "models": models}
    program.write_text(f"#!/bin/sh\necho '{json.dumps(document)}'\n")
    program.chmod(0o755)
    service = bundle.CommandService(Box(tmp_path), "true", 1)
    assert (service.trouble(), service.ready("1"), service.trouble()) == ("", False, " (m: no such operator)")
