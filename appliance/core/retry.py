"""How often something may be tried again, and how long to wait before: arithmetic only, `now` is an argument."""

from __future__ import annotations

from collections import deque


def backoff(attempt: int, initial_s: float, maximum_s: float) -> float:
    """Seconds before attempt number `attempt` (from 0): doubled each time, up to a maximum."""
    return min(maximum_s, initial_s * 2.0 ** min(attempt, 62))


class RestartBudget:
    """Restarts within a sliding window: each waits longer than the last, and beyond `limit` there is none.

    The shape of systemd's StartLimitBurst and StartLimitIntervalSec, with a pause that grows.
    """

    def __init__(self, *, limit: int, window_s: float, backoff_initial_s: float, backoff_max_s: float) -> None:
        self.limit = limit
        self.window_s = window_s
        self._initial_s = backoff_initial_s
        self._maximum_s = backoff_max_s
        self._deaths: deque[float] = deque()

    @property
    def pause_s(self) -> float:
        """Seconds to wait before a restart that somebody else is to blame for, and that counts as no death here."""
        return self._initial_s

    def next_delay(self, now: float) -> float | None:
        """Count a death at `now`: seconds to wait before the restart, or None when the budget is spent."""
        while self._deaths and self._deaths[0] <= now - self.window_s:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > self.limit:
            return None
        return backoff(len(self._deaths) - 1, self._initial_s, self._maximum_s)
