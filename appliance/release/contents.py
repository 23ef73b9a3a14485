"""Models, engines and configuration of a bundle: put where they belong, and taken away again.

What is on the box wins: a version of a model that is there stays as it is, a changed file is kept, and only what a release
added is removed with it. The models folder may be written by others, so no link in it is followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from appliance.release.box import Added, Box, Installed, write_durably
from appliance.release.errors import BundleError
from appliance.release.manifest import File, Manifest


def check(box: Box, manifest: Manifest) -> None:
    """BundleError, before anything is changed, if a model's version is on the box with other files."""
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
        with contextlib.suppress(OSError):
            if not place.is_symlink() and digest(place) == entry.sha256:
                place.unlink()
                for folder in place.parents[:2]:
                    if folder in (box.models, box.engines, box.config.parent):
                        break
                    folder.rmdir()


def digest(path: Path) -> str:
    """The SHA-256 of a plain file in hex; empty for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _whole_versions(manifest: Manifest) -> list[File]:
    """A model's own files first, its versions' last: a version that appears finds its manifest and labels there."""
    return sorted(manifest.room("models"), key=lambda file: (_is_version(file), file.name))


def _is_version(file: File) -> bool:
    parts = file.name.split("/")
    return len(parts) > 3 and parts[2].isdecimal()


def _place(box: Box, file: File) -> Path:
    return box.state / file.name  # rooms have the names of the folders


def _copy(source: Path, place: Path, box: Box) -> None:
    """Whole or not there, with the owner of the folder that it goes to."""
    owner = (box.state if not box.models.exists() else box.models).stat()
    missing = [folder for folder in place.parents if not folder.exists() and box.state in folder.parents]
    for folder in place.parents:
        if folder == box.state:
            break
        if folder.is_symlink():
            raise BundleError(f"{folder} is a link, and nothing is installed through one", "put a folder there")
    for folder in reversed(missing):
        folder.mkdir(mode=0o770)
        os.chown(folder, owner.st_uid, owner.st_gid)
    beside = place.with_name(f".{place.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o660)
    with os.fdopen(descriptor, "wb") as target, source.open("rb") as opened:
        shutil.copyfileobj(opened, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
        os.fchown(target.fileno(), owner.st_uid, owner.st_gid)
    beside.replace(place)
