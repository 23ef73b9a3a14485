"""A box in a folder, where another program than systemd starts the service: `--root` and `--restart`, with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.conftest import need_its_python, project_wheel
from tools.distribution.build_wheel import ROOT

pytestmark = pytest.mark.slow

SERVICE = """#!/bin/sh
# what systemd does on a box: end the one that runs, start what is in place
[ "$1" = start ] && [ -f {root}/pid ] && kill -0 $(cat {root}/pid) 2>/dev/null && exit 0
if [ -f {root}/pid ]; then
    kill $(cat {root}/pid) 2>/dev/null
    while kill -0 $(cat {root}/pid) 2>/dev/null; do sleep 0.05; done
fi
setsid {root}/usr/lib/appliance/bin/appliance serve >> {root}/log 2>&1 < /dev/null &
echo $! > {root}/pid
"""


class Site:
    """The maker's desk and one box below a folder."""

    def __init__(self, folder: Path, wheelhouse: Path) -> None:
        self.folder = folder
        self.wheelhouse = wheelhouse
        self.root = folder / "root"
        self.service = folder / "service"
        self.service.write_text(SERVICE.format(root=self.root))
        self.service.chmod(0o755)
        config = self.root / "etc/appliance/appliance.toml"
        config.parent.mkdir(parents=True)
        (self.root / "var/lib/appliance").mkdir(parents=True)
        config.write_text(
            f'runtime_dir = "{folder}/run"\n[http]\nport = 0\n[zmq]\nenabled = false\n'
            f'[repository]\npath = "{self.root}/var/lib/appliance/models"\n'
        )
        self.environment = {**os.environ, "APPLIANCE_CONFIG": str(config), "HOME": str(folder)}
        self.run("keygen", str(folder / "maker.key"), str(self.root / "etc/appliance/keys/maker.pub"))

    def run(self, *arguments: str, expect: int = 0) -> Any:
        command = [sys.executable, "-m", "appliance", "bundle", *arguments, "--json"]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.environment, cwd=ROOT, timeout=600
        )
        assert ended.returncode == expect, (ended.stdout, ended.stderr, self.log()[-3000:])
        return json.loads(ended.stdout)

    def bundle(self, version: str, *more: str) -> Path:
        release = self.folder / f"release-{version}"
        shutil.copytree(self.wheelhouse, release, ignore=shutil.ignore_patterns("setuptools-*"))
        shutil.copy2(project_wheel(self.folder / f"wheel-{version}", version), release)
        output = self.folder / f"{version}.bundle"
        self.run(
            "create", str(output), "--key", str(self.folder / "maker.key"), "--version", version, "--release", str(release), *more
        )  # fmt: skip
        return output

    def install(self, bundle: Path, *more: str, expect: int = 0) -> Any:
        return self.run(
            "install", str(bundle), "--root", str(self.root), "--restart", str(self.service), *more, expect=expect
        )

    def running(self) -> Any:
        program = self.root / "usr/lib/appliance/bin/appliance"
        asked = subprocess.run(
            [program, "status", "--json"], capture_output=True, text=True, check=True, env=self.environment
        )
        return json.loads(asked.stdout)["status"]

    def log(self) -> str:
        return (self.root / "log").read_text() if (self.root / "log").exists() else ""

    def close(self) -> None:
        if (self.root / "pid").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((self.root / "pid").read_text()), signal.SIGKILL)


@pytest.fixture
def site(tmp_path: Path, wheelhouse: Path) -> Any:
    need_its_python()
    site = Site(tmp_path, wheelhouse)
    yield site
    site.close()


def test_a_box_below_another_root_with_a_starter_of_its_own(site: Site) -> None:
    first = site.bundle("1.0.0", "--models", str(ROOT / "models"))
    site.install(first)
    assert (site.running()["version"], site.running()["ready"]) == ("1.0.0", True)
    model = site.root / "var/lib/appliance/models/digits"
    assert (model / "1" / "model.onnx").exists()
    assert (site.root / "usr/lib/systemd/system/appliance.service").exists()

    good = site.bundle("1.2.0")
    assert site.install(good)["previous"] == "1.0.0"
    assert site.running()["version"] == "1.2.0"
    back = site.run("rollback", "--root", str(site.root), "--restart", str(site.service))
    assert back["version"] == site.running()["version"] == "1.0.0"
    assert (model / "1" / "model.onnx").exists()
