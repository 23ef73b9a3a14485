"""Where the administrator's book, docs/operations.md, says more: from a check of the doctor, or a finding's code, to its section.

A finding's code is the name of its section itself. Knows names only; `doctor` asks, and a test holds both sides together.
"""

from __future__ import annotations

from pathlib import Path

BOOK = "operations.md"
INSTALLED = Path("/usr/share/doc/appliance") / BOOK
"""Where the package puts it."""

SECTIONS = {
    "configuration": "configuration-refused",
    "appliance": "not-ready",
    "service": "not-starting",
    "models": "model-failed",
    "hardware": "findings",
    "governor": "too-hot",
    "packages": "packages",
    "telemetry": "telemetry",
    "providers": "gpu-not-found",
    "GPU": "gpu-not-found",
    "models folder": "models-folder",
    "folders": "models-folder",
    "engines": "stale-engine",
    "disk": "disk-full",
    "memory": "memory-refused",
    "memory limits": "out-of-memory",
    "devices": "gpu-not-found",
    "recorder": "recorder",
    "ports": "port-in-use",
    "clock": "clock",
    "hardening": "hardening",
    "sandbox": "hardening",
}
"""By the name under which a check reports."""


def pointer(check: str, code: str = "") -> str:
    """`operations.md#section` for what a check reported; empty where the book has nothing on it."""
    name = "GPU" if check.startswith("GPU ") else check
    section = code or SECTIONS.get(name, "")
    return f"{BOOK}#{section}" if section else ""


def place() -> str:
    """The book's file on this box; without the package, its place in the sources."""
    return str(INSTALLED) if INSTALLED.is_file() else f"docs/{BOOK}"
