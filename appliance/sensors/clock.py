"""The wall clock: whether it jumped, and whether the kernel's clock is disciplined (adjtimex). Part of the host's sampler.

A jump is a change of CLOCK_REALTIME against CLOCK_BOOTTIME, which counts sleep, too: a box that was suspended did not jump.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from appliance.core import quantities as q
from appliance.core.readings import Finding, Part, Reading, Severity, measured, missing

STEP_S = 0.5
"""Smaller changes are slewing, or a thread that was not run between two reads."""

_UNSYNCHRONIZED = 0x40
_FINDING_S = 600.0


class _Timex(ctypes.Structure):
    """The head of `struct timex` (adjtimex(2)); the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def offset() -> float:
    """Seconds of the wall clock at the moment of boot: constant unless somebody sets the clock."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def discipline() -> tuple[int, float]:
    """Whether the kernel's clock is synchronized (1 or 0), and its largest error in seconds. OSError if that is forbidden."""
    timex = _Timex()
    library = ctypes.CDLL(None, use_errno=True)
    if library.adjtimex(ctypes.byref(timex)) < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return int(not timex.status & _UNSYNCHRONIZED), timex.maxerror / 1e6


class ClockWatch:
    """Looks at each sample; both readers can be replaced."""

    def __init__(
        self,
        *,
        read_offset: Callable[[], float] = offset,
        read_discipline: Callable[[], tuple[int, float]] = discipline,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._read_offset, self._read_discipline, self._wall = read_offset, read_discipline, wall
        self._offset: float | None = None
        self._steps = 0
        self._step_s: float | None = None
        self._at_s = float("-inf")

    def sample(self, now_s: float) -> Part:
        """Jumps so far, the last one, and the discipline."""
        current = self._read_offset()
        if self._offset is not None and abs(current - self._offset) > STEP_S:
            self._steps, self._step_s, self._at_s = self._steps + 1, current - self._offset, now_s
        self._offset = current
        step = q.CLOCK_STEP
        readings = {
            q.CLOCK_STEPS.name(): measured(q.CLOCK_STEPS, self._steps, now_s),
            step.name(): missing(step, "it has not jumped", now_s)
            if self._step_s is None
            else measured(step, self._step_s, now_s),
            **self._discipline(now_s),
        }
        return Part(readings, findings=tuple(self._findings(now_s)))

    def _discipline(self, now_s: float) -> dict[str, Reading]:
        try:
            synchronized, error_s = self._read_discipline()
        except (OSError, AttributeError):
            reason = "the kernel does not tell us (adjtimex)"
            return {one.name(): missing(one, reason, now_s) for one in (q.CLOCK_SYNCHRONIZED, q.CLOCK_ERROR)}
        return {
            q.CLOCK_SYNCHRONIZED.name(): measured(q.CLOCK_SYNCHRONIZED, synchronized, now_s),
            q.CLOCK_ERROR.name(): measured(q.CLOCK_ERROR, error_s, now_s),
        }

    def _findings(self, now_s: float) -> list[Finding]:
        found = []
        if self._step_s is not None and now_s - self._at_s < _FINDING_S:
            message = f"the wall clock jumped by {self._step_s:+.1f} s"
            action = "Nothing, if somebody set it; else look at NTP. Deadlines are not affected, times in logs are."
            found.append(Finding("clock-step", Severity.WARNING, "host", message, action))
        if self._wall() < 1_735_689_600:  # 2025 is before this program: a box without a battery starts in 1970
            message, action = "the wall clock was never set", "Set the time, or enable NTP."
            found.append(Finding("clock-unset", Severity.WARNING, "host", message, action))
        return found
