"""Whether the NVIDIA driver was replaced on disk while the old one runs: what works now fails at the next start.

An unattended upgrade swaps the libraries; processes that have them open keep working, and the next one says "Driver/library
version mismatch". Compares the loaded module's version with the file names of the libraries. Reads only; driven by `nvml.py`.
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
            elif name in ("libnvidia-ml.so.1", "libcuda.so.1"):
                target = os.path.realpath(root / folder / name).rpartition("/")[2]
                if match := _LIBRARY.match(target):
                    linked.add(match[1])
    return frozenset(linked or lying)


def drift(root: Path) -> Finding | None:
    """The finding, if none of the libraries on disk fits the module that runs."""
    module = loaded_version(root)
    libraries = library_versions(root)
    if not module or not libraries or libraries == {module}:
        return None
    found = ", ".join(sorted(libraries))
    return Finding(
        "driver-drift",
        Severity.WARNING,
        "driver",
        f"reboot pending: the NVIDIA driver {module} runs, but its libraries on disk are {found}",
        "Reboot at the next chance. Until then what runs goes on, and workers or services started anew may fail.",
    )
