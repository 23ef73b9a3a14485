"""Releases as folders side by side: usr/lib/appliance/releases/VERSION, and the link `current` that says which one runs.

For boxes without dpkg, and for wheels. A slot is built whole before anything is switched, and switching is one rename, so a power
cut leaves the old release or the new one. usr/lib/appliance/bin leads through `current`: units need not know of slots. A
release's own units and the rest of its system files (`system`) go in place when it is switched to.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from appliance.host.durable import sync_filesystem
from appliance.release import running, system
from appliance.release.box import Box
from appliance.release.errors import BundleError

COMPLETE = ".complete"
PIP_TIMEOUT_S = 900


class Slots:
    """The slots below a box's root."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._folder = box.program / "releases"
        self._current = box.program / "current"

    def current(self) -> str:
        """The release that runs; empty if none does."""
        return self._current.resolve().name if self._current.is_symlink() else ""

    def holds(self, version: str) -> bool:
        """Whether that release could be switched to at once."""
        return (self._folder / version / COMPLETE).is_file()

    def prepare(self, version: str, unpacked: Path) -> str:
        """Build the release's environment from the bundle's wheels, without a network. BundleError leaves no slot.

        The release that runs stays as it is. Empty: a slot has no digest, since only root can write below usr/lib.
        """
        slot = self._folder / version
        if version == self.current() and self.holds(version):
            return ""
        shutil.rmtree(slot, ignore_errors=True)
        wheels = sorted((unpacked / "release").glob("*.whl"))
        pip = next((wheel for wheel in wheels if wheel.name.startswith("pip-")), None)
        if pip is None or len(wheels) < 2:
            raise BundleError(
                "the bundle has no wheels, or pip is not among them", "make it with tools/offline_bundle.py"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            base = getattr(sys, "_base_executable", sys.executable)
            _run([base, "-I", "-m", "venv", "--without-pip", str(slot)])
            install = ["install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
            others = [str(wheel) for wheel in wheels if wheel != pip]
            _run([str(slot / "bin" / "python"), f"{pip}/pip", *install, *others])
            (slot / COMPLETE).touch()
            if not self.current():
                # models that come with the first release belong to its user, and so may its configuration
                system.install(self._box, slot / "share/appliance", configuration=False)
            # what is switched to has to be on the disk
            sync_filesystem(slot)
        except BaseException:
            shutil.rmtree(slot, ignore_errors=True)
            raise
        return ""

    def switch(self, version: str, sha256: str = "") -> None:
        """Let `current` point to that release."""
        if not self.holds(version):
            raise BundleError(f"release {version} is not on this box", "`appliance bundle status` lists what is")
        beside = self._current.with_name(".current.new")
        beside.unlink(missing_ok=True)
        beside.symlink_to(f"releases/{version}")
        beside.replace(self._current)
        programs = self._box.program / "bin"
        if not programs.exists():
            programs.symlink_to("current/bin")
        system.install(self._box, self._folder / version / "share/appliance")

    def forget(self, keep: Collection[str]) -> None:
        """Remove all releases but these."""
        for slot in self._folder.glob("*"):
            if slot.name not in keep:
                shutil.rmtree(slot, ignore_errors=True)


def _run(command: list[str]) -> None:
    try:
        ended = running.run(command, timeout_s=PIP_TIMEOUT_S, folder="/", umask=0o022)
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"the release was not put together within {PIP_TIMEOUT_S} s", "is the disk slow?") from error
    if ended.returncode != 0:
        raise BundleError(f"the release cannot be put together: {ended.stderr.strip()[-500:]}")
