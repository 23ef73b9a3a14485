"""A program is run to its own end: what it leaves behind holds nobody, and what never ends is ended."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from appliance.release.running import run


def test_what_a_program_printed_is_there_when_it_ends_however_long_its_children_hold_its_output(tmp_path: Path) -> None:
    child = tmp_path / "child"
    done = run(["sh", "-c", f"echo out; echo err >&2; sleep 1000 & echo $! > {child}; exit 3"], timeout_s=60)
    os.kill(int(child.read_text()), signal.SIGKILL)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_the_environment_is_added_to_ours_and_the_folder_and_the_mask_are_those_that_were_asked_for(
    tmp_path: Path,
) -> None:
    line = ["sh", "-c", 'echo $WORD; pwd; umask; test -n "$PATH"']
    done = run(line, timeout_s=60, environment={"WORD": "here"}, folder=str(tmp_path), umask=0o027)
    assert (done.returncode, done.stdout.split()) == (0, ["here", str(tmp_path), "0027"])


def test_what_never_ends_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run(["sh", "-c", "exec sleep 1000"], timeout_s=0.05)
