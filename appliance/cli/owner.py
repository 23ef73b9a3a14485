"""Root goes on as the service's own user where it makes files for the service: a key, an engine or a model.toml of root's could
neither be read nor replaced by the daemon.

Knows processes and folders only; the commands that make engines call it before they do anything else.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path


def become_owner(folder: Path) -> None:
    """As root, give up root for the owner of that folder (of the nearest one above that exists), for good; else do nothing.

    What is made afterwards has the modes of the service's own files (umask 027).
    """
    if os.geteuid() != 0:
        return
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    owner = existing.stat()
    if owner.st_uid == 0:
        return
    try:
        entry = pwd.getpwuid(owner.st_uid)
    except KeyError:
        os.setgroups([owner.st_gid])
        os.setgid(owner.st_gid)
    else:
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.environ["HOME"] = entry.pw_dir
    os.setuid(owner.st_uid)
    os.umask(0o027)
    # the session is root's: its folder would be refused
    os.environ.pop("XDG_RUNTIME_DIR", None)
