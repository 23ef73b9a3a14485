"""Files that are whole or not there, also after a power cut: written beside, synced, renamed, and the folder synced."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """What was created, renamed or removed in it is on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Its bytes are on the disk when this returns."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_filesystem(folder: Path) -> None:
    """All that was written to the file system of that folder is on the disk when this returns; OSError if it is not.

    For a tree of thousands of files, where a sync of each would commit the journal as often. Unlike `os.sync` it waits for no
    other disk, such as a slow stick that happens to be plugged in (syncfs(2)).
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


def write_durably(file: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file at once: whoever reads it finds the old bytes or the new ones. OSError leaves the old ones."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        # what lies there is of a write that was cut off, or a link of somebody else's: never written through
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync_folder(file.parent)
