"""Requests that were not answered as their client wished, in the log: who, which, why. A flood of them cannot fill it.

One entry for each model and code every so many seconds; how many more there were follows when that time is over. All are counted
in the metrics. Whoever refuses a request, or ends one with an error, owns a `RequestLog`; it needs the running loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from appliance.core.errors import ApplianceError, ErrorCode
from appliance.observability.logs import RateLimit

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
LONGEST_ID = 128
"""Characters of what a client calls its request, or the model that it wants."""

ORDINARY = frozenset({ErrorCode.SUPERSEDED, ErrorCode.CANCELLED})
"""What clients ask for by themselves: the newest frame wins, a caller hangs up."""


class RequestLog:
    """One kind of end, by its event: "request.refused" or "request.failed"."""

    def __init__(self, event: str, interval_s: float = INTERVAL_S) -> None:
        self._event = event
        self._interval_s = interval_s
        self._limit = RateLimit(interval_s)
        self._waiting: set[str] = set()

    def add(self, error: ApplianceError, *, model: str = "", request_id: str = "", key: str = "") -> None:
        """This request ended so. `key`: what is counted together beside the code; never a client's invention."""
        if error.code in ORDINARY:
            return
        key = f"{key} {error.code}"
        before = self._limit.allow(key)
        fields = {"model": model[:LONGEST_ID], "code": str(error.code)}
        if before is not None:
            fields |= {"request_id": request_id[:LONGEST_ID], "reason": error.message}
            self._say(fields | ({"more": before} if before else {}))
        elif key not in self._waiting:
            self._waiting.add(key)
            asyncio.get_running_loop().call_later(self._interval_s, self._sum_up, key, fields)

    def _sum_up(self, key: str, fields: dict[str, str]) -> None:
        self._waiting.discard(key)
        if more := self._limit.kept_back(key):
            reason = f"{more} more within {self._interval_s:g} s"
            self._say(fields | {"reason": reason, "more": more})

    def _say(self, fields: dict[str, Any]) -> None:
        log.warning(self._event, extra={"fields": {name: value for name, value in fields.items() if value != ""}})
