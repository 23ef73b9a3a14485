"""A leak, found by its slope: does a process's memory grow steadily over hours?

Pure, and of bounded memory: readings are gathered into buckets, of which the *lowest* reading counts, so that the sawtooth of a
collector or an arena shows its floor. The slope is the median of all pairs' slopes (Theil and Sen), and it must be there in each
half of the window, too, so that one step after a load is no leak.
"""

from __future__ import annotations

from collections import deque

import msgspec

from appliance.core.robust import theil_sen

HALF_SHARE = 0.5
"""Each half of the window must climb at least this share of the alarm's slope."""


class SlopePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """`limit_bytes_per_h` is the slope that alarms; the first `warm_up_s` after the start are not looked at."""

    limit_bytes_per_h: float = 8 * 2**20
    warm_up_s: float = 1800.0
    window_s: float = 4 * 3600.0
    buckets: int = 48


class SlopeAlarm:
    """One process. `observe` its resident bytes now and then; `alarm` says whether it leaks."""

    def __init__(self, policy: SlopePolicy) -> None:
        self._policy = policy
        self._bucket_s = policy.window_s / policy.buckets
        self._started: float | None = None
        self._floors: deque[tuple[float, float]] = deque(maxlen=policy.buckets)
        self._until = 0.0
        self._floor: tuple[float, float] | None = None
        self.bytes_per_h = 0.0
        self.alarm = False

    def observe(self, now: float, nbytes: float) -> bool:
        """Take a reading; True when the alarm goes off with it (once: while it lasts, False)."""
        if self._started is None:
            self._started = now
        if now - self._started < self._policy.warm_up_s:
            return False
        if self._floor is None:
            self._floor, self._until = (now, nbytes), now + self._bucket_s
            return False
        if now < self._until:
            if nbytes < self._floor[1]:
                self._floor = (now, nbytes)
            return False
        self._floors.append(self._floor)
        self._floor, self._until = (now, nbytes), now + self._bucket_s
        before, self.alarm = self.alarm, self._leaks()
        return self.alarm and not before

    def _leaks(self) -> bool:
        """Over a whole window, and in both of its halves."""
        points = list(self._floors)
        self.bytes_per_h = theil_sen(points) * 3600 if len(points) > 1 else 0.0
        if len(points) < self._policy.buckets:
            return False
        middle = len(points) // 2
        limit = self._policy.limit_bytes_per_h
        halves = (points[:middle], points[middle:])
        return self.bytes_per_h >= limit and all(theil_sen(half) * 3600 >= HALF_SHARE * limit for half in halves)
