"""Which of the units of systemd/ can be enabled, told by their text. Pure; `build_deb.py` drives it."""

from __future__ import annotations


def enablable(units: dict[str, str]) -> list[str]:
    """The units with an [Install] section, from name to text."""
    return sorted(name for name, text in units.items() if "\n[Install]" in f"\n{text}")
