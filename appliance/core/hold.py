"""An operator's hold on the governor: at least this level, for a while, for a reason; and what it makes of what was judged.

Pure: time is an argument. A hold can only be stricter than what the sensors say, never milder, ends by itself, and is kept
nowhere: a restart releases it. `scheduling.governor` carries it out.
"""

from __future__ import annotations

import math

import msgspec

from appliance.core.errors import invalid
from appliance.core.thermal import Gates, Level, ThermalPolicy, gates_for

MOST_S = 86_400.0
"""A day: what is to last longer belongs into the configuration."""

MOST_WORDS = 200


class Hold(msgspec.Struct, frozen=True):
    """At least `level` until `until_s` (monotonic seconds). Who asked is in the chain of actions."""

    level: Level
    until_s: float
    reason: str

    def left_s(self, now: float) -> float:
        """Seconds until it ends; 0 if it has."""
        return max(0.0, self.until_s - now)


def make_hold(level: str, seconds: float, reason: str, now: float) -> Hold:
    """A hold from what an operator said. INVALID_ARGUMENT with what was expected."""
    names = [one.name for one in Level if one is not Level.NOMINAL]
    if level.upper() not in names:
        raise invalid(f"level must be one of {', '.join(names)}, {level[:20]!r} came: a hold can only be stricter")
    if not (math.isfinite(seconds) and 0 < seconds <= MOST_S):
        raise invalid(f"a hold lasts more than 0 and at most {MOST_S:.0f} seconds (a day), {seconds:g} came")
    words = " ".join(reason.split())
    if not words or len(words) > MOST_WORDS:
        raise invalid(f"a hold needs a reason of 1 to {MOST_WORDS} characters: whoever finds it wants to know why")
    return Hold(Level[level.upper()], now + seconds, words)


def held(policy: ThermalPolicy, judged: Gates, hold: Hold | None, now: float) -> Gates:
    """What may be done under a hold: of everything the stricter. The judged gates themselves if there is none, or it is over."""
    if hold is None or now >= hold.until_s:
        return judged
    note = f"an operator holds it at {hold.level.name} ({hold.reason})"
    return strictest(judged, gates_for(policy, hold.level, squeezed=False, note=note, dwell_s=hold.left_s(now)))


def strictest(one: Gates, other: Gates) -> Gates:
    """Nothing that either of them forbids; the words of the higher level, of `one` if they are equal."""
    worse = other if other.level > one.level else one
    return Gates(
        level=worse.level,
        max_priority=min(one.max_priority, other.max_priority),
        builds=one.builds and other.builds,
        explanations=one.explanations and other.explanations,
        concurrency=min(one.concurrency, other.concurrency),
        batch_growth=min(one.batch_growth, other.batch_growth),
        retry_after_s=max(one.retry_after_s, other.retry_after_s),
        reason=worse.reason,
    )
