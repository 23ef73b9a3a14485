"""What all samplers have in common: the shape of one, reading numbers from small kernel files, and how often to look.

A sampler runs on a thread of its own (`lane.py`) because what it reads may hang in the kernel; it knows no loop. It answers with
a `Part` and never raises for what a sensor does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from appliance.core.quantities import Quantity
from appliance.core.readings import Part, Reading, measured, missing


class Sampler(Protocol):
    """`name` names its thread, the only one that calls it. It has nothing new within `period_s` (0: it always has)."""

    name: str
    period_s: float

    def sample(self, now_s: float) -> Part:
        """Everything this sampler reads, at monotonic `now_s`. May hang; must not raise."""

    def close(self) -> None:
        """Give back what it holds."""


class UnreadableError(Exception):
    """A sensor's file could not be read; the text is the reason for people."""


_REASONS = {
    errno.ENOENT: "this kernel does not have it",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
    errno.EAGAIN: "the sensor is switched off now",
    errno.EIO: "the sensor does not answer",
    errno.ENXIO: "the sensor does not answer",
    errno.ENODATA: "the sensor has no value",
    errno.ETIMEDOUT: "the sensor does not answer",
    errno.EOPNOTSUPP: "the kernel does not support it",
}


def why(error: OSError) -> str:
    """The reason of a failed read, for people."""
    return _REASONS.get(error.errno or 0, os.strerror(error.errno or errno.EIO))


def read_text(path: Path | str) -> str:
    """A small kernel file, without surrounding blanks. UnreadableError with the reason."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.read(descriptor, 65536).decode(errors="replace").strip(" \t\r\n\0")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableError(why(error)) from error


def read_number(path: Path | str) -> int:
    """The integer in a small kernel file. UnreadableError with the reason, also for what is no integer."""
    text = read_text(path)
    try:
        return int(text, 0)
    except ValueError as error:
        raise UnreadableError(f"expected a number, found {text[:40]!r}") from error


def names_in(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing if it cannot be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def read_reading(quantity: Quantity, path: Path | str, now_s: float, *, scale: float = 1.0) -> Reading:
    """The number in a kernel file as a reading of that quantity."""
    return attempt(quantity, lambda: read_number(path), now_s, scale=scale)


def attempt(quantity: Quantity, read: Callable[[], object], now_s: float, *, scale: float = 1.0) -> Reading:
    """What `read` returns, as a reading; UnreadableError becomes the reason."""
    try:
        return measured(quantity, read(), now_s, scale=scale)
    except UnreadableError as error:
        return missing(quantity, str(error), now_s)


class Every:
    """Whether it is time again: at once, then every `period_s`. A late look does not lead to two."""

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self._next_s = float("-inf")

    def waiting(self, now_s: float) -> bool:
        """Whether it is too early; asking changes nothing."""
        # half a percent early is on time: timers have a grain
        return now_s < self._next_s - self.period_s * 0.005

    def due(self, now_s: float) -> bool:
        """True once per period."""
        if self.waiting(now_s):
            return False
        self._next_s = now_s + self.period_s
        return True

    def reset(self) -> None:
        """It is time now."""
        self._next_s = float("-inf")
