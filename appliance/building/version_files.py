"""Which files make up a model version: all below its folder. An engine's key and a version's fingerprint are made of them.

A model may keep its weights in any plain path below its folder, also in hidden ones, so nothing is left out by its name. Links to
folders are not followed: where one points counts, not what is there. Reads names and metadata only; knows no format.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

MAX_ENTRIES = 10_000
"""Files and folders. Exporters that write a file for every weight write a few thousand; more is a folder that is no version's."""


def version_files(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The regular files, and the links to folders with where they point, by their names relative to the folder, ordered.

    A file may be reached by a link. OSError: a folder cannot be read, or there are more files than a model has.
    """
    files: dict[str, Path] = {}
    links: dict[str, str] = {}
    seen = 0
    for place, inner, names in os.walk(folder, onerror=_raise):
        here = Path(place)
        seen += len(names) + len(inner)
        if seen > MAX_ENTRIES:
            raise OSError(errno.E2BIG, f"more than {MAX_ENTRIES} files: a version's folder holds its model and no more")
        for name in names:
            if (here / name).is_file():
                files[(here / name).relative_to(folder).as_posix()] = here / name
        for name in inner:
            if (here / name).is_symlink():
                links[(here / name).relative_to(folder).as_posix()] = str((here / name).readlink())
    return dict(sorted(files.items())), dict(sorted(links.items()))


def weights_bytes(model_file: str) -> int:
    """What lies beside a model's file and below, with it: weights may be in files of their own.

    0 for an engine without a file, and for a folder that cannot be read or is gone (then the load says so).
    """
    if not model_file:
        return 0
    try:
        files, _ = version_files(Path(model_file).parent)
        return sum(file.stat().st_size for file in files.values())
    except OSError:
        return 0


def _raise(error: OSError) -> None:
    # a folder that may not be read holds no weights that could be loaded
    if not isinstance(error, PermissionError):
        raise error
