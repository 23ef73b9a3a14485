"""Bundles on a booted machine without any network: the first installation, releases that break, ways back, and what is refused.

Once with the Debian package and once with wheels; both times under load from the first release on, and no request is lost.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import __version__
from tests.packaging.conftest import BREAKS, HANGS, breaks_on_start, changed_deb, hangs_on_start, project_wheel, target
from tests.packaging.installed import InstalledBox
from tests.systemd.box import ENVIRONMENT, LONG_S, why_not
from tools.distribution.build_wheel import ROOT

pytestmark = pytest.mark.slow

STICK = "/mnt/packages/stick"
CONFIG = "/etc/appliance/appliance.toml"
BUNDLE_LIMIT_S = 240.0
ROOM_BYTES = 5 << 30


class Desk:
    """Where bundles are made; the folder `stick` is what is carried to the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stick = folder / "stick"
        self.stick.mkdir()
        self.key = folder / "maker.key"
        self.run("bundle", "keygen", str(self.key), str(self.stick / "maker.pub"))

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "appliance", *arguments]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    def create(self, name: str, version: str, *more: str, key: Path | None = None) -> str:
        """A bundle on the stick; its path on the machine."""
        line = ["--key", str(key or self.key), "--version", version, "--python", target().python, *more]
        self.run("bundle", "create", str(self.stick / name), *line)
        return f"{STICK}/{name}"

    def offline_bundle(self, name: str, *more: str) -> str:
        """The same by tools/offline_bundle.py, with the example model and a configuration."""
        configuration = self.folder / "appliance.toml"
        configuration.write_text('# by bundle\n[repository]\npath = "/var/lib/appliance/models"\n')
        line = [sys.executable, "tools/offline_bundle.py", "--key", str(self.key), "--debian", target().debian]
        line += [str(self.stick / name), "--models", str(ROOT / "models"), "--configuration", str(configuration), *more]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return f"{STICK}/{name}"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def box(desk: Desk) -> Iterator[InstalledBox]:
    """A machine with a stick in it and no appliance."""
    if reason := why_not():
        pytest.skip(reason)
    # its disk in memory where that has room: what is synced here is hundreds of megabytes, again and again
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as disk:
        box = InstalledBox(desk.stick, state=Path(disk))
        try:
            box.start()
            yield box
        finally:
            box.remove()


def bundle(box: InstalledBox, *arguments: str, expect: int = 0) -> Any:
    """`appliance bundle … --json` on the machine."""
    line = ("appliance", "bundle", *arguments, "--json")
    done = box.run(*line, check=False, timeout=BUNDLE_LIMIT_S)
    assert done.returncode == expect, (done.stdout, done.stderr, box.log())
    return json.loads(done.stdout)


def first_install(box: InstalledBox, path: str) -> None:
    box.run("python3", f"{STICK}/install_appliance.py", path, "--key", f"{STICK}/maker.pub", timeout=BUNDLE_LIMIT_S)
    assert (box.version(), box.show("UnitFileState")) == (__version__, "enabled")
    assert "1 model ready" in box.show("StatusText")
    assert box.text(CONFIG).startswith("# by bundle")
    assert box.run("stat", "-c", "%a %U:%G", CONFIG).stdout.strip() == "640 root:appliance"


def a_year(box: InstalledBox, desk: Desk, *, broken: str, hung: str, good: str, first: str) -> None:
    """What happens after the first installation, with clients that never stop asking."""
    box.loopback("plain", shape="2")
    box.run("systemctl", "reload", "appliance")
    load = box.start_load("http", clients=2, model="plain")

    refused = bundle(box, "install", broken, "--ready-timeout", "3", expect=4)
    assert f"release {__version__} answers again" in refused["error"]["message"]
    assert "this release breaks on start" in box.run("journalctl", "-u", "appliance", "--no-pager").stdout
    assert box.version() == __version__
    refused = bundle(box, "install", hung, "--ready-timeout", "3", expect=4)
    assert f"not ready within 3 s; release {__version__} answers again" in refused["error"]["message"]
    assert box.version() == __version__

    assert bundle(box, "install", good)["previous"] == __version__
    assert box.version() == "9.9.9"
    assert bundle(box, "rollback")["version"] == box.version() == __version__
    result = box.end_load(load)
    assert result["failed"] == 0, result
    assert box.exists("/var/lib/appliance/models/digits/1/model.onnx")

    plant(box)
    before = bundle(box, "status")
    assert before["floor"] == "9.9.9"
    assert "9.9.9 was on this box" in bundle(box, "install", first, expect=1)["error"]["message"]
    other = desk.create("other.bundle", "9.9.11", "--models", str(ROOT / "models"), "--system", "debian-99")
    assert "for system debian-99" in bundle(box, "install", other, expect=1)["error"]["message"]
    stranger = desk.folder / "stranger.key"
    desk.run("bundle", "keygen", str(stranger))
    unsigned = desk.create("unsigned.bundle", "9.9.10", "--models", str(ROOT / "models"), key=stranger)
    assert "no trusted key signed this" in bundle(box, "install", unsigned, expect=1)["error"]["message"]
    with (desk.stick / Path(good).name).open("r+b") as opened:
        middle = opened.seek(0, 2) // 2
        opened.seek(middle)
        (byte,) = opened.read(1)
        opened.seek(middle)
        opened.write(bytes([byte ^ 1]))
    assert "not what was signed" in bundle(box, "install", good, expect=1)["error"]["message"]
    assert bundle(box, "status") == before
    assert box.version() == __version__


def plant(box: InstalledBox) -> None:
    """The service's user cannot put another folder of releases in place, and one that it had got there is not believed."""
    releases = "/var/lib/appliance-releases"
    as_user = ("runuser", "-u", "appliance", "--")
    for line in (("mv", releases, "/var/lib/appliance/away"), ("touch", f"{releases}/{__version__}.deb")):
        assert box.run(*as_user, *line, check=False).returncode != 0, line
    box.run("sh", "-c", f"mv {releases} /root/away && install -d -o appliance -m 755 {releases}")
    box.run(*as_user, "sh", "-c", f"echo mine > {releases}/{__version__}.deb")
    assert "is not root's alone" in bundle(box, "rollback", expect=1)["error"]["message"]
    box.run("sh", "-c", f"rm -r {releases} && mv /root/away {releases}")


TRIED = "grep -q '\"pending\": {' /var/lib/appliance-releases/state.json"
HALF_UNPACKED = "ls /usr/lib/appliance/lib/python3*/site-packages/*.dpkg-new"


def power_cut(box: InstalledBox, path: str, moment: str) -> None:
    """In the middle of an installation, as soon as that command succeeds. Then the box boots, and takes back what was cut off."""
    installing = subprocess.Popen(
        box.command("appliance", "bundle", "install", path), env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    box.run("sh", "-c", f"until {moment} 2> /dev/null; do :; done", timeout=BUNDLE_LIMIT_S)
    assert installing.poll() is None
    box.stop()
    installing.wait()
    box.start()
    box.wait_until("ActiveState", "active", "appliance-recovery.service", limit_s=BUNDLE_LIMIT_S)
    assert box.show("Result", "appliance-recovery.service") == "success"
    said = box.run("journalctl", "-u", "appliance-recovery", "--no-pager", "-o", "cat").stdout
    assert f"was cut off: going back to {__version__}" in said, said
    assert bundle(box, "status")["pending"] is None
    assert box.version() == __version__
    assert box.dpkg("--verify", "appliance", check=False).stdout.split()[1:] == ["c", CONFIG], (
        "whole, and the site's own kept"
    )


def test_a_box_that_lives_by_debian_packages(box: InstalledBox, desk: Desk, deb: Path, tmp_path: Path) -> None:
    system = f"debian-{target().debian}"
    made = desk.offline_bundle("first.bundle", "--part-size", "64M", "--deb", str(deb))
    _carry(desk, f"{made}.parts")
    first_install(box, f"{STICK}/carried/first.bundle.parts")
    bundles = {}
    for name, version, change in (
        ("hung", "9.9.7", hangs_on_start),
        ("broken", "9.9.8", breaks_on_start),
        ("good", "9.9.9", lambda _: None),
    ):
        package = changed_deb(deb, tmp_path, version, change)
        bundles[name] = desk.create(f"{name}.bundle", version, "--release", str(package), "--system", system)
        package.unlink()
    power_cut(box, bundles["good"], TRIED)
    power_cut(box, bundles["good"], HALF_UNPACKED)
    a_year(box, desk, **bundles, first=f"{STICK}/carried/first.bundle.parts")
    assert box.dpkg("--verify", "appliance", check=False).stdout.split()[1:] == ["c", CONFIG], "the site's, kept"


def test_a_box_that_lives_by_wheels(box: InstalledBox, desk: Desk, wheelhouse: Path, tmp_path: Path) -> None:
    first_install(box, desk.offline_bundle("first.bundle", "--wheels", "--wheelhouse", str(wheelhouse)))
    for place in ("/usr/lib/systemd/system/appliance-gpu.service", "/usr/lib/appliance/libexec/wait-for-gpu"):
        assert box.run("test", "-s", place, check=False).returncode == 0
    assert box.run("stat", "-c", "%a %U:%G", "/var/lib/appliance/models").stdout.strip() == "2770 appliance:appliance"
    bundles = {}
    for name, version, daemon in (("hung", "9.9.7", HANGS), ("broken", "9.9.8", BREAKS), ("good", "9.9.9", "")):
        release = tmp_path / name
        shutil.copytree(wheelhouse, release, ignore=shutil.ignore_patterns("setuptools-*"))
        shutil.copy2(project_wheel(tmp_path / f"wheel-{name}", version, daemon=daemon), release)
        bundles[name] = desk.create(f"{name}.bundle", version, "--release", str(release))
    a_year(box, desk, **bundles, first=f"{STICK}/first.bundle")


def _carry(desk: Desk, index: str) -> None:
    """Copy the parts, cut off in the middle and begun again; what was copied is not copied twice."""
    carried = desk.stick / "carried"
    line = ["bundle", "copy", str(desk.stick / Path(index).name), str(carried), "--keys", str(desk.stick)]
    cut = subprocess.Popen([sys.executable, "-m", "appliance", *line], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LONG_S
    while not (carried / "first.bundle.001").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    begun = {path.name: path.stat().st_mtime_ns for path in carried.glob("first.bundle.*")}
    assert not (carried / "first.bundle.parts").exists(), "it was cut off"
    again = desk.run(*line)
    assert "first.bundle.001: there already" in again.stderr
    assert {name: (carried / name).stat().st_mtime_ns for name in begun} == begun
    shutil.copy2(desk.stick / "install_appliance.py", carried)
