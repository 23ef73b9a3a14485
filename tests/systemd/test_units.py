"""The unit files as text: what systemd's own checkers say of them, and that every directive has its reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.systemd.box import Box

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
SHIPPED = sorted([*UNITS.glob("*.service"), *UNITS.glob("*.socket"), *UNITS.glob("dropins/*.conf")])
WANTED_EXPOSURE = 14
"""Ten times the score."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def directives(path: Path) -> list[str]:
    """Their names, and of a drop-in those of its examples in comments, too."""
    return re.findall(r"^#?([A-Z][A-Za-z]+)=", path.read_text(), re.MULTILINE)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units with commands that exist here."""
    for path in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        text = re.sub(r"/usr/lib/appliance/(bin|libexec)/[a-z-]+", "/bin/true", path.read_text())
        (tmp_path / path.name).write_text(text)
    return tmp_path


@needs_systemd
def test_systemd_finds_nothing_to_complain_of(installed: Path) -> None:
    units = [str(path) for path in sorted(installed.glob("appliance*"))]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize(
    "dropin", ["", "limits.conf", "strict-cpu-only.conf", "credentials.conf", "tensorrt-builder.conf"]
)
def test_the_exposure_stays_as_low_as_it_is(installed: Path, dropin: str) -> None:
    unit = installed / "appliance.service"
    if dropin:
        unit.write_text(unit.read_text() + "\n" + (UNITS / "dropins" / dropin).read_text())
    line = ["systemd-analyze", "security", "--offline=yes", f"--threshold={WANTED_EXPOSURE}", str(unit)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "SYSTEMD_PAGER": ""})
    assert done.returncode == 0, done.stdout[-500:]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_directive_has_its_reason(path: Path) -> None:
    text = (UNITS / "README.md").read_text()
    assert directives(path)
    unexplained = {name for name in directives(path) if f"`{name}=" not in text}
    assert not unexplained


def test_nothing_of_the_wheel_leaves_the_units_out() -> None:
    text = (ROOT / "MANIFEST.in").read_text()
    assert "recursive-include systemd *" in text


EXAMPLE = re.compile(r"^#([A-Z][A-Za-z]+=)", re.MULTILINE)
SINCE = {"backoff.conf": 254}
"""Drop-ins of newer releases: an older one warns of keys that it does not know."""


@pytest.mark.slow
@pytest.mark.parametrize("dropin", ["", *sorted(path.name for path in (UNITS / "dropins").glob("*.conf"))])
def test_the_systemd_of_the_box_has_no_complaint_either_and_rates_it_as_well(box: Box, dropin: str) -> None:
    """The installed files, with each drop-in and all that it has in comments, by the systemd that would run them."""
    if dropin:
        release = int(re.findall(r"\d+", box.run("systemctl", "--version").stdout)[0])
        if release < SINCE.get(dropin, 0):
            pytest.skip(f"systemd {release} does not know its keys")
        box.dropin(EXAMPLE.sub(r"\1", (UNITS / "dropins" / dropin).read_text()))
    units = ("appliance.service", "appliance-gpu.service", "appliance-recovery.service", "appliance.socket")
    done = box.run("systemd-analyze", "verify", "--man=no", *units, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    line = ("systemd-analyze", "security", f"--threshold={WANTED_EXPOSURE}", "--no-pager", "appliance.service")
    done = box.run(*line, check=False)
    assert done.returncode == 0, done.stdout[-500:]
