"""A bundle in pieces, for sticks and slow links: NAME.001, NAME.002, … and a signed index NAME.parts.

Each part can be checked and carried alone; what is there and right is not copied again. The whole is read straight from its
parts. That a part is right is a convenience here: what is installed is held to the bundle's own digests in any case.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from appliance.release.archive import CHUNK_BYTES, SIGNATURE_BYTES, Verify
from appliance.release.errors import BundleError
from appliance.release.manifest import DIGEST, PART

SUFFIX = ".parts"
NUMBERED = re.compile(r"\.[0-9]{3,4}$")
MAX_INDEX_BYTES = 4 << 20
MIN_PART_BYTES = 64 << 10
MAX_PARTS = 9_999


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece: its file's name beside the index, its size in bytes, its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The signed list of pieces."""

    format: Literal["appliance-parts-1"]
    parts: tuple[Part, ...]


def split(bundle: Path, part_bytes: int, sign: Callable[[bytes], bytes]) -> Path:
    """Cut a bundle into parts beside it; the index's path. The bundle itself stays."""
    size = bundle.stat().st_size
    count = -(-size // part_bytes)
    if part_bytes < MIN_PART_BYTES or count > MAX_PARTS:
        raise BundleError(
            f"{count} parts of {part_bytes} bytes",
            f"a part has at least {MIN_PART_BYTES} bytes, and there are at most {MAX_PARTS}",
        )
    found = []
    with bundle.open("rb") as source:
        for number in range(1, count + 1):
            path = bundle.with_name(f"{bundle.name}.{number:03d}")
            digest, written = _copy(source, path, part_bytes)
            found.append(Part(path.name, written, digest))
    document = msgspec.json.encode(Index("appliance-parts-1", tuple(found)))
    index = bundle.with_name(bundle.name + SUFFIX)
    # the signature first: its length is known
    index.write_bytes(sign(document) + document)
    return index


def read_index(path: Path, verify: Verify) -> Index:
    """The index in that file; BundleError if no trusted key signed it or it breaks a rule."""
    if not path.name.endswith(SUFFIX):
        raise BundleError(
            f"{path.name} is no index of parts",
            f"name the file that ends in {SUFFIX}; a bundle in one file is copied by cp",
        )
    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_INDEX_BYTES)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    verify(data[SIGNATURE_BYTES:], data[:SIGNATURE_BYTES])
    try:
        index = msgspec.json.decode(data[SIGNATURE_BYTES:], type=Index)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"the index cannot be read: {error}") from error
    names = [part.name for part in index.parts]
    for part in index.parts:
        if PART.fullmatch(part.name) is None or DIGEST.fullmatch(part.sha256) is None or part.size < 0:
            raise BundleError(f"{part.name[:60]!r} in the index is no part")
    if len(set(names)) != len(names) or len(names) > MAX_PARTS:
        raise BundleError("a part stands twice in the index, or there are too many")
    return index


def wrong(index: Index, folder: Path) -> Iterator[tuple[Part, str]]:
    """The parts that are not there or not right, each with the reason."""
    for part in index.parts:
        if reason := _reason(part, folder / part.name):
            yield part, reason


def copy(index_path: Path, target: Path, verify: Verify, note: Callable[[str], None] = lambda _: None) -> Path:
    """Copy index and parts into a folder, leaving out what is there and right; the copied index's path.

    Each part is checked after it was written and appears under its name only then, so a copy that was cut off is just begun
    again. BundleError if a part is wrong where it comes from.
    """
    index = read_index(index_path, verify)
    target.mkdir(parents=True, exist_ok=True)
    for part in index.parts:
        place = target / part.name
        if not _reason(part, place):
            note(f"{part.name}: there already")
            continue
        beside = place.with_name(f".{part.name}.new")
        try:
            with (index_path.parent / part.name).open("rb") as source:
                digest, size = _copy(source, beside, part.size + 1)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise BundleError(
                f"{part.name} cannot be copied: {error.strerror}", "what was copied stays; begin again"
            ) from error
        if digest != part.sha256 or size != part.size:
            beside.unlink()
            raise BundleError(f"{part.name} is not what was signed", "get this part anew; the others stay as they are")
        beside.replace(place)
        note(f"{part.name}: copied")
    copied = target / index_path.name
    copied.write_bytes(index_path.read_bytes())
    return copied


class PartsStream(io.RawIOBase):
    """The bundle, read from its parts one after the other."""

    def __init__(self, index: Index, folder: Path) -> None:
        super().__init__()
        self._left = [folder / part.name for part in reversed(index.parts)]
        self._open: BinaryIO | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: object) -> int:
        """Bytes of the current part, then of the next; 0 at the end. BundleError for a part that cannot be read."""
        view = memoryview(buffer)  # type: ignore[arg-type]  # what io.RawIOBase is given
        while True:
            if self._open is None:
                if not self._left:
                    return 0
                path = self._left.pop()
                try:
                    self._open = path.open("rb")
                except OSError as error:
                    raise BundleError(f"the part {path.name} cannot be read: {error.strerror}") from error
            if taken := self._open.readinto(view):  # type: ignore[attr-defined]  # a binary file has it
                return int(taken)
            self._open.close()
            self._open = None

    def close(self) -> None:
        """Close the part that is open."""
        if self._open is not None:
            self._open.close()
        super().close()


def _reason(part: Part, path: Path) -> str:
    try:
        if path.stat().st_size != part.size:
            return f"has {path.stat().st_size} bytes, {part.size} are right"
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return str(error.strerror).lower()
    return "" if digest == part.sha256 else "was altered"


def _copy(source: BinaryIO, path: Path, limit: int) -> tuple[str, int]:
    """At most `limit` bytes into that file, synced: their digest and number."""
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as target:
        while written < limit and (chunk := source.read(min(CHUNK_BYTES, limit - written))):
            target.write(chunk)
            digest.update(chunk)
            written += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest(), written
