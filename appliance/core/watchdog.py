"""When the whole appliance is to be restarted because a required model answers nobody: the decision, on values.

What one worker can cause is mended below: a batch beyond its budget ends that worker, a dead worker is replaced, one that dies
again and again quarantines its model. A model that FAILED says so, and a restart would only take the others down with it. What is
left is a model that is said to be READY and has brought nothing about for longer than all of that can take: then our own books
are wrong, and the honest thing is to begin anew. The shell stops feeding systemd's watchdog and ends in good order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a required, READY model did until now.

    `ended`: requests answered in all, in any way. `patience_s`: the longest that its own budgets can make anybody wait.
    """

    model: str
    workers: int
    waiting: int
    ended: int
    patience_s: float


class Watchdog:
    """Looked at once a second. `limit_s`: how long a model may bring nothing about, unless its own patience is longer."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._seen: dict[str, tuple[int, float]] = {}  # model -> (ended, since when nothing more has)

    def look(self, now: float, pulses: Sequence[Pulse]) -> str:
        """Why the appliance is to begin anew, in one sentence; empty while all is well."""
        seen: dict[str, tuple[int, float]] = {}
        reason = ""
        for pulse in pulses:
            ended, since = self._seen.get(pulse.model, (pulse.ended, now))
            idle = pulse.workers > 0 and pulse.waiting == 0
            if idle or pulse.ended != ended:
                since = now
            seen[pulse.model] = (pulse.ended, since)
            if now - since > max(self._limit_s, pulse.patience_s) and not reason:
                what = f"{pulse.waiting} requests waiting" if pulse.workers else "no worker"
                reason = f"model {pulse.model} is READY and has answered nobody for {now - since:.0f} s ({what})"
        self._seen = seen
        return reason
