"""Where each file of systemd/ belongs on a Debian system, told by its name.

Pure: names in, paths out. `build_deb.py` copies; what is in the files is theirs.
"""

from __future__ import annotations

from pathlib import PurePosixPath

SUFFIXES = (".service", ".socket", ".target", ".slice", ".timer", ".path")
NAMED = {
    "sysusers": "usr/lib/sysusers.d/appliance.conf",
    "tmpfiles": "usr/lib/tmpfiles.d/appliance.conf",
}
DOC = "usr/share/doc/appliance"
PROGRAMS = "usr/lib/appliance/libexec"


def destination(name: str, units: str) -> str:
    """Where the file at that path below systemd/ is installed, below the root; `units` is the folder of units there.

    Units go to the units' folder; sysusers, tmpfiles, catalog and polkit rules to theirs; a name without a suffix is a program
    that units call; everything else (drop-ins to copy) is an example.
    """
    path = PurePosixPath(name)
    if len(path.parts) == 1:
        if path.suffix in SUFFIXES:
            return f"{units}/{name}"
        for word, place in NAMED.items():
            if word in path.name and path.suffix in (".conf", f".{word}"):
                return place
        if path.suffix == ".catalog":
            return "usr/lib/systemd/catalog/appliance.catalog"
        if path.suffix == ".rules":
            return f"usr/share/polkit-1/rules.d/50-{name}"
        if name == "README.md":
            return f"{DOC}/systemd.md"
        if not path.suffix:
            return f"{PROGRAMS}/{name}"
    return f"{DOC}/examples/systemd/{name}"


def enablable(units: dict[str, str]) -> list[str]:
    """The units with an [Install] section, from name to text."""
    return sorted(name for name, text in units.items() if "\n[Install]" in f"\n{text}")
