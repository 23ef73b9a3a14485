"""Where things are on a box, what kind of box it is, and what was installed on it.

Every path is below `root`, so that a release can be tried in a folder. The state is one file, written whole or not at all. It
lies with the kept packages in a folder of root's own, below no folder of the service's user: nobody else can have put there what
root installs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from appliance.host.durable import write_durably
from appliance.release import versions
from appliance.release.errors import BundleError
from appliance.release.manifest import Manifest, Target


class Box:
    """The places on a box whose filesystem begins at `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.program = root / "usr/lib/appliance"
        self.state = root / "var/lib/appliance"
        self.models = self.state / "models"
        self.engines = self.state / "engines"
        self.releases = root / "var/lib/appliance-releases"
        self.incoming = self.releases / "incoming"
        self.config = root / "etc/appliance/appliance.toml"
        self.keys = root / "etc/appliance/keys"


class Added(msgspec.Struct, frozen=True):
    """A file that a release brought, below the root, with its digest: taken away again with the release."""

    path: str
    sha256: str


class Installed(msgspec.Struct, frozen=True):
    """One installation: the release, what ran before it, and what it added. `config_before`: the file that it replaced.

    With `models_only`, `version` is the bundle's number, and `previous` the release that it was put beside.
    """

    version: str
    previous: str = ""
    added: tuple[Added, ...] = ()
    config_before: str | None = None
    models_only: bool = False

    @property
    def release(self) -> str:
        """The release that runs with this."""
        return self.previous if self.models_only else self.version


class State(msgspec.Struct, frozen=True):
    """What is known of releases. `pending` is being tried, or, where it is `current`, being taken back: after a power cut it
    is what has to be taken back. At boot, `systemd/take-back-release` reads it and `kept` from the file.

    `floor`: nothing older is installed without being told to. `before`: what `current` replaced, oldest first, back to the last
    release before. `kept`: the SHA-256 of each package that was kept, by release; one that an administrator put there has none.
    `failed`: a first release that never became ready. It is in place, there being no other, and no way back leads to it.
    """

    floor: str = ""
    current: Installed | None = None
    pending: Installed | None = None
    before: tuple[Installed, ...] = ()
    kept: dict[str, str] = {}
    failed: str = ""


def read_state(box: Box) -> State:
    """The state, empty on a box without; BundleError if the file is broken, PermissionError for who is not root."""
    path = box.releases / "state.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State()
    except PermissionError:
        raise
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}", "mend or remove it; models are not touched") from error


def write_state(box: Box, state: State) -> None:
    """Durably: the old state or the new one is there, also after a power cut."""
    os.close(_open_releases(box))
    write_durably(box.releases / "state.json", msgspec.json.format(msgspec.json.encode(state), indent=1))


@contextlib.contextmanager
def hold_releases(box: Box) -> Iterator[None]:
    """Keep the folder of releases, made if it is missing, for ourselves. BundleError if another installation has it, or if it
    is not root's own."""
    descriptor = _open_releases(box)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError("another installation is going on on this box", "wait until it has ended") from error
        yield
    finally:
        os.close(descriptor)


def _open_releases(box: Box) -> int:
    box.releases.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        box.releases.mkdir(mode=0o700)
    hint = "look at who put it there, remove it, and install a bundle with the release that runs"
    try:
        descriptor = os.open(box.releases, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError as error:
        raise BundleError(f"{box.releases} is no folder, and releases are kept in one of root's", hint) from error
    found = os.fstat(descriptor)
    # our own where a release is tried below a root of one's own
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(descriptor)
        raise BundleError(f"{box.releases} is not root's alone: others may have put packages there", hint)
    return descriptor


def this_box(root: Path = Path("/")) -> Target:
    """What this box is: by its os-release, the kernel's word for the machine, and the Python that runs us."""
    fields = {}
    for name in ("etc/os-release", "usr/lib/os-release"):
        try:
            lines = (root / name).read_text().splitlines()
        except OSError:
            continue
        fields = dict(line.replace('"', "").split("=", 1) for line in lines if "=" in line)
        break
    system = f"{fields.get('ID', 'linux')}-{fields.get('VERSION_ID', '')}".rstrip("-")
    return Target(system, platform.machine(), f"{sys.version_info.major}.{sys.version_info.minor}")


def check_fit(manifest: Manifest, here: Target, floor: str, *, allow_older: bool) -> None:
    """BundleError if the bundle is for another box, or older than what was on this one."""
    wanted = manifest.target
    for what, needs, has in (
        ("system", wanted.system, here.system),
        ("machine", wanted.machine, here.machine),
        ("Python", wanted.python, here.python),
    ):
        if needs not in (has, "any"):
            raise BundleError(
                f"the bundle is for {what} {needs}, this box has {has}", "get the bundle made for this box"
            )
    if floor and versions.older(manifest.version, floor) and not allow_older:
        raise BundleError(
            f"the bundle has release {manifest.version}, and {floor} was on this box already",
            "--allow-older installs it all the same",
        )
