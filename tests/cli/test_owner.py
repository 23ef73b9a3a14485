"""Root gives itself up for the owner of a folder; anybody else stays who he is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.cli.owner import become_owner

SOMEBODY = 65_534
BECOME = """
import os, sys
from pathlib import Path
from appliance.cli.owner import become_owner
become_owner(Path(sys.argv[1]))
print(os.getuid(), os.geteuid(), sorted(os.getgroups()))
Path(sys.argv[2], "made").touch()
"""


def became(folder: Path, room: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BECOME, str(folder), str(room)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up")
def test_root_becomes_the_owner_for_good_and_what_it_makes_is_the_owners(tmp_path: Path) -> None:
    for above in (tmp_path, *tmp_path.parents[:3]):
        above.chmod(above.stat().st_mode | 0o055)
    engines = tmp_path / "engines"
    engines.mkdir()
    os.chown(engines, SOMEBODY, SOMEBODY)
    said = became(engines / "not" / "there", engines)
    assert said == f"{SOMEBODY} {SOMEBODY} [{SOMEBODY}]"
    made = (engines / "made").stat()
    assert (made.st_uid, made.st_mode & 0o777) == (SOMEBODY, 0o640)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_in_a_folder_of_its_own_root_stays_root(tmp_path: Path) -> None:
    assert became(tmp_path, tmp_path).startswith("0 0 ")


@pytest.mark.skipif(os.geteuid() == 0, reason="needs somebody else than root")
def test_anybody_else_stays_who_he_is(tmp_path: Path) -> None:
    before = os.getuid()
    become_owner(tmp_path)
    assert os.getuid() == before
