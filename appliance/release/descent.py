"""Folders that others may write to, entered level by level: each is opened from the one above, and no link in them is followed.

Between a look at a path and its use somebody may put a link there; what was opened stays what it is. So everything here goes
by descriptors, and the caller's changes do, too (`dir_fd=`).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence

from appliance.release.errors import BundleError

ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextlib.contextmanager
def enter(base: str | os.PathLike[str], names: Sequence[str], *, make: bool = False) -> Iterator[list[int]]:
    """Descriptors of `base` and of each of the names below it, one below the other.

    With `make`, what is missing is made, with the owner of the folder of the first name where that is there, else of `base`. Only
    the first name may be a link, if it is root's (or our own): a site's, to a larger disk. BundleError for every other link,
    OSError for what is missing or no folder.
    """
    with contextlib.ExitStack() as stack:
        opened = [os.open(base, os.O_RDONLY | os.O_DIRECTORY)]
        stack.callback(os.close, opened[0])
        for depth, name in enumerate(names):
            made = make and _make(opened[-1], name)
            opened.append(_open(opened[-1], name, may_be_link=depth == 0))
            stack.callback(os.close, opened[-1])
            if made:
                own(opened[-1], like=opened[min(depth, 1)])
        yield opened


def own(descriptor: int, *, like: int) -> None:
    """Give what we made and have open to the owner and group of another; what is not ours is left as it is."""
    owner = os.fstat(like)
    if os.fstat(descriptor).st_uid == os.geteuid():
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _make(folder: int, name: str) -> bool:
    try:
        os.mkdir(name, 0o770, dir_fd=folder)
    except FileExistsError:
        return False
    return True


def _open(folder: int, name: str, *, may_be_link: bool) -> int:
    link = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
    try:
        found = os.fstat(link)
        if not stat.S_ISLNK(found.st_mode):
            return os.open(name, ENTER, dir_fd=folder)
        if may_be_link and found.st_uid in (0, os.geteuid()):
            # what this very link says, not what may lie under its name by now
            return os.open(os.readlink("", dir_fd=link), os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    finally:
        os.close(link)
    raise BundleError(f"{name} is a link, and nothing is installed through one", "put a folder there")
