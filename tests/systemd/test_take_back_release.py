"""What the program of the boot does with each record of installations; dpkg and our own command are played."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from appliance.release.box import Added, Box, Installed, State, hold_releases, write_state

PROGRAM = Path(__file__).parents[2] / "systemd" / "take-back-release"


def taken_back(folder: Path, state: State, dpkg: str = "") -> tuple[str, list[str]]:
    """What the program of the boot says with that state, and the commands that it gave: to a dpkg, and to our own command."""
    box = Box(folder)
    write_state(box, state)
    programs = folder / "bin"
    programs.mkdir()
    calls = folder / "calls"
    for name, said in (("dpkg", ""), ("dpkg-query", dpkg), ("appliance", "")):
        tell = "" if name == "dpkg-query" else f'echo "{name} $*" >> {calls}\n'
        (programs / name).write_text(f"#!/bin/sh\n{tell}printf '%s' '{said}'\n")
        (programs / name).chmod(0o755)
    text = PROGRAM.read_text().replace("/var/lib/appliance-releases", str(box.releases))
    text = text.replace("/usr/lib/appliance/bin", str(programs))
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", text], env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr + (f"exit {done.returncode}" if done.returncode else "")
    return said, calls.read_text().splitlines() if calls.exists() else []


TRIED = Installed("1.1.0", "1.0.0", (Added("var/lib/m", "0" * 64),))
ROLLBACK = "appliance bundle rollback"
REINSTALL = "dpkg --force-confold --force-confdef --force-downgrade --install 1.0.0.deb"


def test_at_boot_nothing_is_done_where_no_installation_was_cut_off(tmp_path: Path) -> None:
    assert taken_back(tmp_path, State("1.1.0", TRIED, kept={"1.0.0": "0" * 64})) == ("", [])


def test_at_boot_an_installation_that_was_cut_off_is_taken_back(tmp_path: Path) -> None:
    said, calls = taken_back(tmp_path, State("", Installed("1.0.0"), TRIED), "installed")
    assert (said, calls) == ("the installation of 1.1.0 was cut off: going back to 1.0.0\n", [ROLLBACK])


def test_at_boot_a_package_that_was_half_unpacked_is_replaced_before_its_own_command_is_run(tmp_path: Path) -> None:
    package = Box(tmp_path).releases / "1.0.0.deb"
    package.parent.mkdir(parents=True)
    package.write_bytes(b"whole")
    digest = hashlib.sha256(b"whole").hexdigest()
    _, calls = taken_back(tmp_path, State("", Installed("1.0.0"), TRIED, kept={"1.0.0": digest}), "half-installed")
    assert calls == [REINSTALL, ROLLBACK]


def test_at_boot_a_kept_package_that_was_damaged_is_not_installed(tmp_path: Path) -> None:
    package = Box(tmp_path).releases / "1.0.0.deb"
    package.parent.mkdir(parents=True)
    package.write_bytes(b"damaged")
    state = State("", Installed("1.0.0"), TRIED, kept={"0.9.0": "0" * 64, "1.0.0": "1" * 64})
    said, calls = taken_back(tmp_path, state, "unpacked")
    assert (calls, "exit 1" in said) == ([], True)
    assert "1.0.0.deb is not the package that was kept" in said


def test_at_boot_a_first_installation_that_was_cut_off_is_only_said(tmp_path: Path) -> None:
    said, calls = taken_back(tmp_path, State(pending=Installed("1.0.0")), "unpacked")
    assert ("install the bundle once more" in said, calls) == (True, [])


def test_at_boot_an_installation_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    with hold_releases(Box(tmp_path)):
        assert taken_back(tmp_path, State("", Installed("1.0.0"), TRIED), "unpacked") == ("", [])
