"""What the control groups of a process leave it: `MemoryMax=` and `MemoryHigh=` of a unit or a container, and what is used of it.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst (`memory.max`, `memory.high`, `memory.current`, `memory.stat`) and
cgroup-v1/memory.rst. A limit binds all groups below it, so every ancestor counts. A file that cannot be read is no limit.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

NO_LIMIT_BYTES = 1 << 60
"""cgroup v1 says "none" by a number near 2**63."""


class MemoryLimits(msgspec.Struct, frozen=True):
    """In bytes; None: no limit. `room_bytes`: what may still be taken before the first of the limits is met.

    Caches of files that the kernel would give up at once (`inactive_file`) are not counted as used.
    """

    max_bytes: int | None = None
    high_bytes: int | None = None
    room_bytes: int | None = None

    @property
    def tightest_bytes(self) -> int | None:
        """Where it is slowed down or ended, whichever comes first."""
        return min((limit for limit in (self.max_bytes, self.high_bytes) if limit is not None), default=None)


def memory_limits(pid: int | None = None, *, root: Path = Path("/")) -> MemoryLimits:
    """The limits on a process (ourselves without a pid), of all the groups that it is in."""
    most = high = room = None
    for folder, names in _groups(pid, root):
        limits = [_number(folder / name) for name in names[:2]]
        most, high = _least(most, limits[0]), _least(high, limits[1])
        limit = _least(*limits)
        used = _number(folder / names[2])
        if limit is not None and used is not None:
            room = _least(room, max(0, limit - used + _inactive(folder / "memory.stat")))
    return MemoryLimits(most, high, room)


V2 = ("memory.max", "memory.high", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes.none", "memory.usage_in_bytes")
"""The soft limit of v1 slows nobody down, so it is left out."""


def _groups(pid: int | None, root: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """The group's folder and all above it, with the names of limit, throttle and use in them."""
    try:
        lines = (root / "proc" / ("self" if pid is None else str(pid)) / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[Path, tuple[str, str, str]]] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, names = root / "sys/fs/cgroup", V2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        folder = top / path.strip("/")
        found += [(place, names) for place in (folder, *folder.parents) if place == top or top in place.parents]
    return found


def _number(path: Path) -> int | None:
    try:
        value = int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
    return value if value < NO_LIMIT_BYTES else None


def _inactive(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
