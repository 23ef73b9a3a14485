"""How a build process is asked to stop: SIGTERM, once. Work that can end itself may; all else is left at once.

`jobs` sends the signal and, after a grace, SIGKILL. An orderly stop lets the store remove what was half made.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOPPED = 128 + signal.SIGTERM
"""The exit status of a process that was asked to stop and did."""


class Stop:
    """Whether this process was asked to stop. Never asked until `listen` was called."""

    def __init__(self) -> None:
        self.asked = False
        self._polled = False

    def listen(self) -> None:
        """From now on SIGTERM asks: SystemExit at once, or `asked` while somebody looks at it."""
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.check()

    def check(self) -> None:
        """SystemExit if it was asked: again, since a library's callback may have swallowed the first one. Not while polled."""
        if self.asked and not self._polled:
            raise SystemExit(STOPPED)

    @contextlib.contextmanager
    def polled(self) -> Iterator[None]:
        """The caller looks at `asked` by itself and ends soon; SystemExit afterwards if it was asked."""
        self._polled = True
        try:
            yield
        finally:
            self._polled = False
            if self.asked:
                raise SystemExit(STOPPED)
