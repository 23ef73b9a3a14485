"""Bundles as files: made from folders, opened with their signature checked, unpacked into a folder of their own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal, cast

from appliance.release import archive, parts
from appliance.release.archive import Reader, Verify
from appliance.release.errors import BundleError
from appliance.release.manifest import File, Manifest, Target

Kind = Literal["deb", "wheels", "models"]


def collect(rooms: Mapping[str, list[Path]]) -> dict[str, Path]:
    """The files to bundle by the names they get: each path of a room, and what is below it if it is a folder.

    Hidden files are left out. BundleError for a link, which would take in something from elsewhere.
    """
    found: dict[str, Path] = {}
    for room, sources in rooms.items():
        for source in sources:
            if not source.exists():
                raise BundleError(f"{source} does not exist")
            inside = sorted(source.rglob("*")) if source.is_dir() else [source]
            for path in inside:
                relative = path.relative_to(source.parent if source.is_file() else source)
                if any(part.startswith(".") for part in relative.parts) or path.is_dir():
                    continue
                if path.is_symlink() or not path.is_file():
                    raise BundleError(f"{path} is no plain file", "put the file itself there")
                found[f"{room}/{relative.as_posix()}"] = path
    return found


def create(
    target: Path,
    files: Mapping[str, Path],
    *,
    version: str,
    created: str,
    kind: Kind,
    boxes: Target,
    sign: Callable[[bytes], bytes],
) -> Manifest:
    """Write a bundle of these files; what it says. Nothing is left at `target` if that fails."""
    listed = []
    for name, path in sorted(files.items()):
        with path.open("rb") as opened:
            listed.append(File(name, path.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()))
    manifest = Manifest("appliance-bundle-1", version, created, kind, boxes, tuple(listed))
    beside = target.with_name(f".{target.name}.new")
    try:
        with beside.open("wb") as opened:
            archive.write(opened, manifest, sign, lambda file: files[file.name].open("rb"))
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return manifest


@contextlib.contextmanager
def open_bundle(path: Path, verify: Verify) -> Iterator[Reader]:
    """A reader of the bundle in that file, or in the parts of that index. BundleError if it is not signed by a trusted key."""
    try:
        if path.name.endswith(parts.SUFFIX):
            index = parts.read_index(path, verify)
            source: BinaryIO = cast(BinaryIO, io.BufferedReader(parts.PartsStream(index, path.parent), 1 << 20))
        elif parts.NUMBERED.search(path.name):
            raise BundleError(f"{path.name} is one part of a bundle", f"name the file that ends in {parts.SUFFIX}")
        else:
            source = path.open("rb")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    with source:
        yield Reader(source, verify)


def verify_all(path: Path, verify: Verify) -> tuple[Manifest, str]:
    """Read the whole bundle; what it says and the id of the key that signed it. BundleError names what is wrong."""
    if path.name.endswith(parts.SUFFIX):
        bad = [f"{part.name} {reason}" for part, reason in parts.wrong(parts.read_index(path, verify), path.parent)]
        if bad:
            raise BundleError(f"parts are missing or wrong: {'; '.join(bad)}", "get these anew; the others are right")
    with open_bundle(path, verify) as reader:
        for _, chunks in reader.files():
            for _ in chunks:
                pass
        return reader.manifest, reader.key_id


def unpack(reader: Reader, folder: Path) -> None:
    """Write every file below a new folder (BundleError if it exists), each synced. The caller removes it after an error."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError as error:
        raise BundleError(f"{folder} is in the way", "another installation may be going on") from error
    for file, chunks in reader.files():
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as target:
            for chunk in chunks:
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
