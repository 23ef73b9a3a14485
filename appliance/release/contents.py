"""Models, engines and configuration of a bundle: put where they belong, and taken away again.

What is on the box wins: a version of a model that is there stays as it is, a changed file is kept, and only what a release
added is removed with it. The models folder may be written by others, so no link in it is followed: see `descent`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path

from appliance.host.durable import write_durably
from appliance.release import descent
from appliance.release.box import Added, Box, Installed
from appliance.release.errors import BundleError
from appliance.release.manifest import File, Manifest


def check(box: Box, manifest: Manifest) -> None:
    """BundleError, before anything is changed, if a model's version is on the box with other files."""
    elsewhere = _other_models(box)
    if elsewhere and manifest.room("models"):
        raise BundleError(
            f"the models of this box are in {elsewhere} ([repository] path), and a bundle puts its models into {box.models}",
            f"let {box.models} be a link of root's to that folder, and [repository] path name {box.models}",
        )
    for file in manifest.room("models"):
        place = _place(box, file)
        if _is_version(file) and place.exists() and digest(place) != file.sha256:
            version = "/".join(file.name.split("/")[1:3])
            raise BundleError(
                f"the model {version} is on this box, with another {place.name}",
                "a version never changes: give the new one another number",
            )


def put(
    box: Box, manifest: Manifest, unpacked: Path, note: Callable[[str], None], remember: Callable[[Installed], None]
) -> Installed:
    """Put in what is not there yet. `remember` is told before each change, so that a power cut leaves nothing unaccounted for."""
    done = Installed(manifest.version)
    for file in (*manifest.room("engines"), *_whole_versions(manifest)):
        place = _place(box, file)
        if place.is_symlink() or place.exists():
            if digest(place) != file.sha256:
                note(f"{place}: kept, the bundle has another")
            continue
        done = Installed(done.version, added=(*done.added, Added(str(place.relative_to(box.root)), file.sha256)))
        remember(done)
        _copy(unpacked / file.name, place, box)
    for file in manifest.room("configuration"):
        if file.name != "configuration/appliance.toml":
            raise BundleError(f"{file.name} is no configuration", "configuration/appliance.toml is the one there is")
        new = (unpacked / file.name).read_bytes()
        if not box.config.exists():
            done = Installed(
                done.version, added=(*done.added, Added(str(box.config.relative_to(box.root)), file.sha256))
            )
            remember(done)
            box.config.parent.mkdir(parents=True, exist_ok=True)
            write_durably(box.config, new)
        elif box.config.read_bytes() != new:
            offered = box.config.with_name("appliance.toml.bundle")
            write_durably(offered, new)
            note(f"{box.config}: kept; the bundle's is beside it, as {offered.name}")
    return done


def take_away(box: Box, added: tuple[Added, ...]) -> None:
    """Remove what was added, where nobody changed it since, and folders that are empty then."""
    for entry in reversed(added):
        place = box.root / entry.path
        base = box.state if box.state in place.parents else place.parent
        *folders, name = place.relative_to(base).parts
        with contextlib.suppress(OSError, BundleError), descent.enter(base, folders) as opened:
            if digest(name, opened[-1]) == entry.sha256:
                os.unlink(name, dir_fd=opened[-1])
                # a version's folder and its model's; never the room's
                for depth in range(len(folders) - 1, max(0, len(folders) - 3), -1):
                    os.rmdir(folders[depth], dir_fd=opened[depth])


def digest(path: str | Path, folder: int | None = None) -> str:
    """The SHA-256 in hex of a plain file, below that open folder if there is one; empty for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _other_models(box: Box) -> str:
    """Where the configuration says that models are, if that is another folder than the one of bundles."""
    try:
        said = tomllib.loads(box.config.read_text()).get("repository", {}).get("path", "")
    except (OSError, ValueError, AttributeError):
        return ""  # there is none yet, or the appliance will say what is wrong with it
    if not isinstance(said, str) or not Path(said).is_absolute():
        return ""
    # a release that is tried below another root may run there, or outside
    here = {(box.root / said.lstrip("/")).resolve(), Path(said).resolve()}
    return "" if box.models.resolve() in here else said


def _whole_versions(manifest: Manifest) -> list[File]:
    """A model's own files first, its versions' last: a version that appears finds its manifest and labels there."""
    return sorted(manifest.room("models"), key=lambda file: (_is_version(file), file.name))


def _is_version(file: File) -> bool:
    parts = file.name.split("/")
    return len(parts) > 3 and parts[2].isdecimal()


def _place(box: Box, file: File) -> Path:
    return box.state / file.name  # rooms have the names of the folders


def _copy(source: Path, place: Path, box: Box) -> None:
    """Whole or not there, with the owner of the room that it goes to."""
    *folders, name = place.relative_to(box.state).parts
    beside = f".{name}.new"
    with descent.enter(box.state, folders, make=True) as opened:
        at = opened[-1]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=at)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o660, dir_fd=at)
        with os.fdopen(descriptor, "wb") as target, source.open("rb") as read:
            shutil.copyfileobj(read, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
            descent.own(target.fileno(), like=opened[1])
        os.replace(beside, name, src_dir_fd=at, dst_dir_fd=at)
