"""Where a call is tried, for how long, and what a failure means: the retry rules of both clients, as values.

It knows no socket and no clock. The rules: a call that was never sent may always go elsewhere; one that was sent is repeated only
if it is idempotent; each endpoint gets one try, a lost connection one more; all of it within the caller's one deadline.
"""

from __future__ import annotations

from appliance.core.errors import ApplianceError, ErrorCode

ELSEWHERE = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.RESOURCE_EXHAUSTED})
"""Refusals that say nothing about the request: another appliance may take it."""

PREFERENCE_S = 0.05
"""How long the preferred endpoint may take to connect before another one that is connected is taken."""


class Attempts:
    """One call over `links` endpoints, `first` of them preferred. `now` and `deadline` are monotonic seconds."""

    def __init__(self, links: int, *, first: int, idempotent: bool, now: float, timeout_s: float) -> None:
        self.deadline = now + timeout_s
        self.candidates = [(first + offset) % links for offset in range(links)]
        self._timeout_s = timeout_s
        self._idempotent = idempotent
        self._losses_left = 1
        self._error: ApplianceError | None = None

    def until(self, now: float) -> float:
        """How long to wait at the endpoint tried next: a fair share of what is left while others remain."""
        if not self._idempotent:
            return self.deadline
        return now + (self.deadline - now) / len(self.candidates)

    def refused(self, index: int, error: ApplianceError) -> None:
        """The endpoint answered with `error`: raises it, unless it is worth trying another endpoint."""
        if error.code not in ELSEWHERE:
            raise error
        self._next(index, error)

    def lost(self, index: int) -> None:
        """The connection ended before the answer came: raises UNAVAILABLE unless the call may be repeated."""
        error = ApplianceError(
            ErrorCode.UNAVAILABLE, "the connection was lost before the answer came; the request may have run"
        )
        if self._idempotent and self._losses_left and len(self.candidates) == 1:
            self._losses_left -= 1
            return
        self._next(index, error)

    def timed_out(self, index: int) -> None:
        """No answer in its share of the time: raises DEADLINE_EXCEEDED unless another endpoint is left."""
        self._next(index, ApplianceError(ErrorCode.DEADLINE_EXCEEDED, f"no answer within {self._timeout_s:g} s"))

    def nobody(self) -> ApplianceError:
        """The error for a call that found no connection."""
        if self._error is not None:
            return self._error
        return ApplianceError(
            ErrorCode.UNAVAILABLE, f"no appliance could be reached within {self._timeout_s:g} s; is it running?"
        )

    def _next(self, index: int, error: ApplianceError) -> None:
        self.candidates.remove(index)
        self._error = error
        if not self._idempotent or not self.candidates:
            raise error
