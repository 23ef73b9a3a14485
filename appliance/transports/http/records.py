"""Questions to the recorder from a URL's query: events, history, energy, audit; checked here, answered in a thread.

Knows the `Records` of the service and no file. At most `PARALLEL` questions are read at a time; a few more wait, and
beyond that they are refused.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec

from appliance.core.errors import ApplianceError, ErrorCode, invalid, unavailable

if TYPE_CHECKING:
    from appliance.service import Records

PARALLEL = 2
WAITING = 16
MAX_NAMES = 64
RECORDED_KEYS = frozenset({"since", "until", "kind", "after"})
"""A query with one of these asks for recorded events; without, `/v2/appliance/events` is the stream of what happens."""


class RecordRoutes:
    """The routes' arguments and their bounds."""

    def __init__(self, records: Records | None) -> None:
        self._records = records
        self._slots = asyncio.Semaphore(PARALLEL)
        self._waiting = 0

    @staticmethod
    def wants_events(path: str) -> bool:
        """Whether that is a question to the record, not to the stream."""
        return not RECORDED_KEYS.isdisjoint(_query(path))

    def question(self, action: str, path: str) -> Callable[[], Any]:
        """What to call in a thread. INVALID_ARGUMENT for a query that means nothing, UNAVAILABLE without a recorder."""
        records = self._records
        if records is None:
            raise unavailable("the recorder is off; [recorder] enabled = true records", retry_after_s=60.0)
        query = _query(path)
        since, until = _number(query, "since", 0.0), _number(query, "until", 1e11)
        if action == "events":
            limit, after = int(_number(query, "limit", 1_000)), int(_number(query, "after", 0))
            kind = query.get("kind", "")
            return lambda: {"events": records.events(since=since, until=until, kind=kind, limit=limit, after_id=after)}
        if action == "energy":
            return lambda: {"energy": msgspec.to_builtins(records.energy(since=since, until=until))}
        if action == "audit":
            limit = int(_number(query, "limit", 1_000))
            return lambda: records.audit(limit=limit)
        names = [name for name in query.get("names", "").split(",") if name]
        if not names:
            return lambda: {"series": records.series()}
        if len(names) > MAX_NAMES:
            raise invalid(f"at most {MAX_NAMES} names at a time, {len(names)} came")
        step, points = _number(query, "step", 0.0), int(_number(query, "points", 300))
        return lambda: records.history(names, since=since, until=until, step_s=step, points=points)

    async def ask(self, question: Callable[[], Any]) -> Any:
        """Its answer, from a thread. RESOURCE_EXHAUSTED if too many ask at once."""
        if self._waiting >= WAITING:
            raise ApplianceError(
                ErrorCode.RESOURCE_EXHAUSTED, "too many questions to the recorder at once", retry_after_s=1.0
            )
        self._waiting += 1
        try:
            async with self._slots:
                return await asyncio.to_thread(question)
        finally:
            self._waiting -= 1


def _query(path: str) -> dict[str, str]:
    text = path.partition("?")[2].partition("#")[0]
    try:
        return {key: values[-1] for key, values in parse_qs(text, keep_blank_values=True, max_num_fields=32).items()}
    except ValueError as error:
        raise invalid("the query has too many fields") from error


def _number(query: dict[str, str], key: str, default: float) -> float:
    text = query.get(key)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e12:
        raise invalid(f"{key!r} must be a number of seconds or items, {text[:40]!r} came")
    return value
