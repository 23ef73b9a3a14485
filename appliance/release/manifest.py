"""What a bundle says about itself: for which box it is, and every file with its size and digest. Pure.

The bytes of this document are what is signed, so nothing here may be looked at before the signature was found good. Names are
held to a form in which no path can leave the folder it is unpacked into.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from appliance.release import versions
from appliance.release.errors import BundleError

MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 20_000
MAX_FILE_BYTES = (8 << 30) - 1
"""What eleven octal digits of a tar header hold."""
MAX_TOTAL_BYTES = 256 << 30
MAX_NAME_PARTS = 8

ROOMS = ("configuration", "engines", "models", "release")
"""The folders of a bundle: the package or wheels, and what goes to the box's models, engines and configuration."""

PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+~-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its name (ROOM/part/…), its size in bytes and its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The boxes that it is for. `system` is ID-VERSION of os-release (debian-12) or `linux` for any; `python` is 3.11."""

    system: str
    machine: str
    python: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The signed document. `format` keeps its signature from being good for anything else."""

    format: Literal["appliance-bundle-1"]
    version: str
    created: str
    kind: Literal["deb", "wheels", "models"]
    target: Target
    files: tuple[File, ...]

    def room(self, name: str) -> tuple[File, ...]:
        """The files of one of ROOMS."""
        return tuple(file for file in self.files if file.name.startswith(f"{name}/"))


def decode(data: bytes) -> Manifest:
    """The manifest in these (already trusted) bytes; BundleError if it breaks a rule."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"the manifest cannot be read: {error}", "it may come from a newer release") from error
    check(manifest)
    return manifest


def encode(manifest: Manifest) -> bytes:
    """The bytes to sign; BundleError if the manifest breaks a rule."""
    check(manifest)
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"the manifest has {len(data)} bytes, {MAX_MANIFEST_BYTES} are allowed", "make several bundles"
        )
    return data


def check(manifest: Manifest) -> None:
    """Every rule at once: names, order, duplicates, sizes, digests."""
    versions.key(manifest.version)
    if len(manifest.files) > MAX_FILES:
        raise BundleError(f"{len(manifest.files)} files, {MAX_FILES} are allowed")
    total = 0
    last = ""
    folders = {
        "/".join(parts[:depth])
        for file in manifest.files
        for parts in [file.name.split("/")]
        for depth in range(1, len(parts))
    }
    for file in manifest.files:
        check_name(file.name)
        if file.name <= last:
            raise BundleError(f"the file {file.name!r} stands twice in the manifest, or not in order")
        if file.name in folders:
            raise BundleError(f"{file.name!r} is a file and a folder in the manifest")
        if not 0 <= file.size <= MAX_FILE_BYTES:
            raise BundleError(f"{file.name!r} has {file.size} bytes, {MAX_FILE_BYTES} are allowed")
        if DIGEST.fullmatch(file.sha256) is None:
            raise BundleError(f"{file.name!r} has no SHA-256 digest in the manifest")
        total += file.size
        last = file.name
    if total > MAX_TOTAL_BYTES:
        raise BundleError(f"{total} bytes in all, {MAX_TOTAL_BYTES} are allowed")


def check_name(name: str) -> None:
    """BundleError unless it is ROOM/part/…, each part plain: nothing hidden, no `..`, no empty part, no odd character."""
    parts = name.split("/")
    if not 2 <= len(parts) <= MAX_NAME_PARTS or parts[0] not in ROOMS or len(name) > 200:
        raise BundleError(
            f"{name[:80]!r} is no name of a file in a bundle", f"names begin with one of {', '.join(ROOMS)}"
        )
    for part in parts:
        if PART.fullmatch(part) is None:
            raise BundleError(
                f"{name[:80]!r}: {part[:40]!r} is not allowed in a name", "letters, digits and . _ + ~ - are"
            )
