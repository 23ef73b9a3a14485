"""A booted machine with the real package on it: by `dpkg -i`, with its scripts, users, folders and units, without a network.

Nothing of the checkout is inside but the packages under test and the clients of `tests/systemd/load.py`. `conftest` has the
fixture `installed`; a test that needs another life (two releases, a power cut, an empty disk) makes its own `InstalledBox`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.systemd.box import HERE, Box

PACKAGES = "/mnt/packages"
DPKG_LIMIT_S = 180.0


class InstalledBox(Box):
    """A machine on which nothing is installed until `install`. `packages` (and folders) are readable below /mnt/packages."""

    def __init__(self, *packages: Path, state: Path | None = None) -> None:
        super().__init__(state=state)
        self._packages = packages

    def install(self, package: Path, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`dpkg -i`, as an administrator types it: also an upgrade or a downgrade."""
        return self.dpkg(*options, "--install", f"{PACKAGES}/{package.name}", check=check)

    def dpkg(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Any other command of dpkg; it asks no questions."""
        environment = ("env", "DEBIAN_FRONTEND=noninteractive", "TERM=dumb")
        return self.run(*environment, "dpkg", *arguments, check=check, timeout=DPKG_LIMIT_S)

    def version(self) -> str:
        """The release that answers."""
        return str(json.loads(self.run("appliance", "status", "--json").stdout)["status"]["version"])

    def exists(self, path: str) -> bool:
        """Whether there is something at that path."""
        return self.run("test", "-e", path, check=False).returncode == 0

    def text(self, path: str) -> str:
        """A file's text."""
        return self.run("cat", path).stdout

    def _install(self) -> None:
        """Nothing: the package does."""

    def _binds(self) -> list[tuple[str, str, bool]]:
        packages = [(str(package), f"{PACKAGES}/{package.name}", True) for package in self._packages]
        return [*packages, (str(HERE), "/mnt/tests", True)]
