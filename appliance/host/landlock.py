"""Landlock (landlock(7)): a process that gives up, for good and for its children, what it may do to files and to other processes.

Needs no privilege and no namespace. The kernel offers more from release to release; what it does not know is left out. Numbers
are those of <linux/landlock.h>, the same on every architecture. What is given up is `sandbox`'s to choose.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
PATH_BENEATH = 1
VERSION_ONLY = 1

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE = sum(1 << bit for bit in range(6, 13))
"""Character devices, directories, regular files, sockets, fifos, block devices, symbolic links."""

REFER, TRUNCATE = 1 << 13, 1 << 14
READ = READ_FILE | READ_DIR
CHANGE = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE | REFER | TRUNCATE
OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE
"""Rights that a rule for something else than a folder may name."""

NET_BIND_TCP, NET_CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1, 2

OLDEST = 2
"""The first release, of Linux 5.13, forbids every rename from folder to folder, which a build needs."""

WITH_TRUNCATE, WITH_NET, WITH_SCOPES = 3, 4, 6
"""Releases of Linux 6.2, 6.7 and 6.12."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_LIBC.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def release() -> int:
    """The kernel's Landlock; 0 if it has none, has it switched off, or is not to be asked."""
    try:
        return _call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION_ONLY))
    except OSError:
        return 0


def restrict(rules: Mapping[Path, int], *, handled: int, known: int) -> None:
    """Give up the rights in `handled` but for what `rules` allow beneath a path; TCP, and reaching out of here by a signal.

    `known`: the kernel's release. A path that is not there needs no rule. The process must have no new privileges (prctl(2)), and
    one thread: others keep their rights. OSError: nothing was given up.
    """
    if known < WITH_TRUNCATE:
        handled &= ~TRUNCATE
    scoped = SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS if known >= WITH_SCOPES else 0
    net = NET_BIND_TCP | NET_CONNECT_TCP if known >= WITH_NET else 0
    attributes = _Ruleset(handled, net, scoped)
    size = 24 if known >= WITH_SCOPES else 16 if known >= WITH_NET else 8
    ruleset = _call(CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for path, allowed in rules.items():
            _allow(ruleset, path, allowed & handled)
        _call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, allowed: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            allowed &= OF_FILES
        if allowed:
            rule = _PathBeneath(allowed, beneath)
            number, kind = ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH)
            _call(ADD_RULE, number, kind, ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(beneath)


def all_but(hidden: Iterable[Path]) -> list[Path]:
    """What to allow so that everything can be reached but what is hidden: Landlock only ever allows.

    What is made later beside a hidden folder or beside one above it is hidden, too.
    """
    kept = {path.resolve() for path in hidden if path.exists()}
    if not kept:
        return [Path("/")]
    above = {parent for path in kept for parent in path.parents}
    spared = {str(path) for path in kept | above}
    found = []
    for folder in sorted(above - kept):
        if kept.isdisjoint(folder.parents):
            with os.scandir(folder) as children:
                found += [Path(one.path) for one in children if one.path not in spared and not one.is_symlink()]
    return found
