"""Releases as Debian packages: dpkg is the one owner of the files, and the packages of old releases are kept to go back to.

Slots beside dpkg's own records would be a second truth about what is installed, so here the package is put back by dpkg itself.
The caller holds the folder of releases (`box.hold_releases`), so only root can have put a package there.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from appliance.host.durable import sync_folder
from appliance.release import running
from appliance.release.box import Box
from appliance.release.errors import BundleError

PACKAGE = "appliance"
DPKG_TIMEOUT_S = 900


class Packages:
    """The package on this box, by dpkg. Its scripts leave the restart to us, who wait no longer than we were told to."""

    def __init__(self, box: Box) -> None:
        self._folder = box.releases

    def current(self) -> str:
        """The release that is installed; empty if none is."""
        asked = _run("dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", PACKAGE)
        state, _, version = asked.stdout.partition(" ")
        return _release(version.strip()) if state == "installed" else ""

    def holds(self, version: str) -> bool:
        """Whether that release's package is kept here."""
        return self._package(version).is_file()

    def prepare(self, version: str, unpacked: Path) -> str:
        """Keep the bundle's package; its SHA-256. BundleError if it is not the one of that release."""
        packages = list((unpacked / "release").glob("*.deb"))
        if len(packages) != 1:
            raise BundleError(f"the bundle has {len(packages)} packages, one is right", "get another bundle")
        found = version_of(packages[0])
        if found != version:
            raise BundleError(
                f"the bundle says release {version}, and its package says {found!r}", "get another bundle"
            )
        before = self.current()
        if before and before != version and not self.holds(before):
            raise BundleError(
                f"the package of the release that runs, {before}, is not kept here: there would be no way back",
                f"copy it to {self._package(before)}",
            )
        # synced when it was unpacked, in the same folder of root's
        packages[0].replace(self._package(version))
        sync_folder(self._folder)
        return _digest(self._package(version))

    def switch(self, version: str, sha256: str = "") -> None:
        """Install that package, also over a newer one; local changes of the configuration stay.

        BundleError if it is not the one that was kept; without a digest it is one that an administrator put there.
        """
        if sha256 and _digest(self._package(version)) != sha256:
            raise BundleError(
                f"{self._package(version)} is not the package that was kept", f"put the one with SHA-256 {sha256} there"
            )
        ended = _run(
            "dpkg", "--force-confold", "--force-confdef", "--force-downgrade", "--install", str(self._package(version))
        )
        if ended.returncode != 0:
            raise BundleError(f"dpkg could not install release {version}: {ended.stderr.strip()[-500:]}")

    def forget(self, keep: Collection[str]) -> None:
        """Remove the kept packages of all other releases."""
        for package in self._folder.glob("*.deb"):
            if package.stem not in keep:
                package.unlink()

    def _package(self, version: str) -> Path:
        return self._folder / f"{version}.deb"


def version_of(package: Path) -> str:
    """The release that a package file says it is; what it is instead, if it is none of ours; empty where there is no dpkg."""
    if shutil.which("dpkg-deb") is None:
        return ""
    found = _run("dpkg-deb", "--show", "--showformat=${Package} ${Version}", str(package)).stdout.strip()
    return _release(found).removeprefix(f"{PACKAGE} ") or "no Debian package"


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _release(version: str) -> str:
    """The release in a package's version: 1.2.3~rc1+deb12 is 1.2.3rc1 for Debian 12."""
    return version.partition("+deb")[0].replace("~rc", "rc").replace("~dev", ".dev")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", "APPLIANCE_RESTART": "no"}
    try:
        return running.run(command, timeout_s=DPKG_TIMEOUT_S, environment=environment)
    except FileNotFoundError as error:
        raise BundleError(f"there is no {command[0]} on this box", "get the bundle with wheels") from error
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"{command[0]} did not end within {DPKG_TIMEOUT_S} s", "`dpkg --audit` says why") from error
