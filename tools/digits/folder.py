"""Put a model folder in its place, whole or not at all.

The new folder is built beside the old one and the two are exchanged in one step, so that a server watching the repository
never sees half a model. Knows files and version numbers, not what is in them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .errors import InputError

MANIFEST = "model.toml"
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def choose_version(target: Path, *, overwrite: bool) -> int:
    """Return the version number to write: 1 in a new folder, else the next one, or with `overwrite` the newest one again.

    Raises:
        InputError: `target` exists and is not a model folder, so nothing in it should be touched.
    """
    if not target.exists():
        return 1
    if not target.is_dir():
        raise InputError(f"{target} is a file; give the path of a model folder")
    names = [entry.name for entry in target.iterdir()]
    versions = [int(name) for name in names if name.isascii() and name.isdigit() and int(name) > 0]
    if names and not versions and MANIFEST not in names:
        raise InputError(f"{target} holds other things than a model; give a new folder, or one with {MANIFEST}")
    newest = max(versions, default=0)
    return newest if overwrite and newest else newest + 1


def write(target: Path, files: Mapping[str, bytes]) -> None:
    """Write files, given by path relative to `target`, and take over whatever else the folder held.

    An existing `model.toml` is kept: it holds the owner's settings. Of any other top-level name among `files` (a version, the
    golden files, the card) the old content goes. Durable when this returns.

    Raises:
        InputError: the place cannot be written to; the old folder is untouched.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The leading dot keeps a server's repository scan away from it.
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        _write(target, staging, files)
    except OSError as error:
        raise InputError(f"cannot write {target} ({error.strerror or error}); nothing was changed") from error


def _write(target: Path, staging: Path, files: Mapping[str, bytes]) -> None:
    try:
        staging.chmod(0o755)  # mkdtemp makes it private, but the server runs as another user
        if target.exists():
            _take_over(target, staging, {Path(name).parts[0] for name in files} - {MANIFEST})
        for name, content in files.items():
            path = staging / name
            if name == MANIFEST and path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        _sync_tree(staging)
        _exchange(staging, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after the exchange this is the old folder


def _take_over(old: Path, new: Path, replaced: set[str]) -> None:
    for entry in old.iterdir():
        if entry.name in replaced:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _exchange(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    if _exchange_names(staging, target):
        return
    # There is a moment without the folder, but never half of one.
    aside = staging.with_name(f"{staging.name}.old")
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(staging)


def _exchange_names(one: Path, other: Path) -> bool:
    """Let two paths change places at once; False if this file system cannot (NFS, some overlays)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(other))
    return False


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            if not (Path(directory) / name).is_symlink():
                _sync(Path(directory) / name)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
