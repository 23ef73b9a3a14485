"""Whether the NVIDIA driver was replaced on disk while the old one runs: what works now fails at the next start.

An unattended upgrade swaps the libraries; processes that have them open keep working, and the next one says "Driver/library
version mismatch". Compares the loaded module's version with the file names of the libraries. Reads only; driven by `nvml.py`,
every second: folders with thousands of files are listed again only if something in them has changed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from appliance.core.readings import Finding, Severity
from appliance.sensors.base import UnreadableError, names_in, read_text

FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu/nvidia",
    "usr/lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
)
SONAMES = ("libnvidia-ml.so.1", "libcuda.so.1")
_LIBRARY = re.compile(r"^lib(?:nvidia-ml|cuda)\.so\.(\d+\.\d+(?:\.\d+)?)$")
_VERSION = re.compile(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b")


def loaded_version(root: Path) -> str:
    """The version of the kernel module that runs; empty if there is none."""
    for file in ("sys/module/nvidia/version", "proc/driver/nvidia/version"):
        try:
            if match := _VERSION.search(read_text(root / file)):
                return match[1]
        except UnreadableError:
            continue
    return ""


def library_versions(root: Path) -> frozenset[str]:
    """The versions of the driver's libraries on disk: of what the sonames point to, or of all files where none does."""
    linked, lying = set(), set()
    for folder in FOLDERS:
        for name in names_in(root / folder):
            if match := _LIBRARY.match(name):
                lying.add(match[1])
            elif name in SONAMES:
                target = os.path.realpath(root / folder / name).rpartition("/")[2]
                if match := _LIBRARY.match(target):
                    linked.add(match[1])
    return frozenset(linked or lying)


def drift(module: str, libraries: frozenset[str]) -> Finding | None:
    """The finding, if none of the libraries on disk fits the module that runs."""
    if not module or not libraries or libraries == {module}:
        return None
    found = ", ".join(sorted(libraries))
    return Finding(
        "driver-drift",
        Severity.WARNING,
        "driver",
        f"reboot pending: version {module} runs, but its libraries on disk are {found}",
        "Reboot at the next chance. Until then what runs goes on, and workers or services started anew may fail.",
    )


class DriftWatch:
    """`look` as often as one likes: a few stat(2) calls while nothing changes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: object = None
        self._libraries: frozenset[str] = frozenset()

    def look(self) -> Finding | None:
        """The finding as of now."""
        seen = self._traces()
        if seen != self._seen:
            self._seen, self._libraries = seen, library_versions(self._root)
        return drift(loaded_version(self._root), self._libraries)

    def _traces(self) -> object:
        """What changes when a library is put in place or a soname is pointed elsewhere, also by way of an alternative."""
        found: list[object] = []
        for folder in (self._root / name for name in FOLDERS):
            try:
                found.append(folder.stat().st_mtime_ns)
            except OSError:
                found.append(None)
                continue
            found += [os.path.realpath(folder / name) for name in SONAMES]
        return found
