"""What a release that came as wheels puts into the system around it: units, user, folders, explanations, a first configuration.

A Debian package does that by dpkg and its scripts; here it is done from the slot's share/appliance. Where each file goes is told
by its name, for both. Whoever changed a unit did so in a drop-in, so the units of a release replace those of the one before.
"""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath

from appliance.host.durable import write_durably
from appliance.release import running
from appliance.release.box import Box
from appliance.release.errors import BundleError

UNITS = "usr/lib/systemd/system"
DOC = "usr/share/doc/appliance"
PROGRAMS = "usr/lib/appliance/libexec"
SUFFIXES = (".service", ".socket", ".target", ".slice", ".timer", ".path")
NAMED = {
    "sysusers": "usr/lib/sysusers.d/appliance.conf",
    "tmpfiles": "usr/lib/tmpfiles.d/appliance.conf",
}
SETTLE = (
    ("systemd-sysusers", "appliance.conf"),
    ("systemd-tmpfiles", "--create", "appliance.conf"),
    ("systemctl", "daemon-reload"),
    ("journalctl", "--update-catalog"),
)
SETTLE_TIMEOUT_S = 120


def destination(name: str, units: str = UNITS) -> str:
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


def install(box: Box, share: Path, *, configuration: bool = True) -> None:
    """Put the files of that share/appliance in place and let systemd know; BundleError if it will not have them.

    With `configuration`, where there is none, the release's commented one is put there, too. Below another root than / only the
    files are put there: users and services are the running system's.
    """
    for source in sorted(path for path in (share / "systemd").rglob("*") if path.is_file()):
        place = destination(source.relative_to(share / "systemd").as_posix())
        if not place.startswith(DOC):
            _put(source, box.root / place, 0o755 if place.startswith(PROGRAMS) else 0o644)
    first = share / "appliance.toml"
    if configuration and first.is_file() and not box.config.exists():
        _put(first, box.config, 0o640)
    if box.root != Path("/"):
        return
    command = Path("/usr/local/bin/appliance")
    if not command.exists() and not command.is_symlink():
        command.symlink_to("/usr/lib/appliance/bin/appliance")
    settle()


def settle() -> None:
    """Let systemd make users and folders, and read what is new; BundleError if it will not."""
    for line in SETTLE:
        try:
            ended = running.run(line, timeout_s=SETTLE_TIMEOUT_S)
        except FileNotFoundError as error:
            raise BundleError(f"there is no {line[0]} on this box", "wheels need systemd, or --root") from error
        except subprocess.TimeoutExpired as error:
            raise BundleError(f"{' '.join(line)} did not end within {SETTLE_TIMEOUT_S} s") from error
        if ended.returncode != 0:
            raise BundleError(f"{' '.join(line)} failed: {ended.stderr.strip()[-500:]}")


def _put(source: Path, place: Path, mode: int) -> None:
    data = source.read_bytes()
    if place.is_file() and place.read_bytes() == data:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    write_durably(place, data, mode=mode)
    place.chmod(mode)
