"""Logs: one event name and its fields a line, on stderr; JSON for machines, one readable line for people, fields for the journal.

The house logs as `log.info("model.ready", extra={"fields": {…}})`. Whatever a peer can put into a field is escaped and cut: a log
line is one line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

from appliance.observability.journal import JournalHandler, stderr_is_journal

LONGEST_VALUE = 2000
"""Characters of a field's value; the rest is cut. A traceback is kept whole."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line; JSON escapes control characters by itself."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": _cut(record.getMessage()),
        }
        for key, value in getattr(record, "fields", {}).items():
            entry[key] = _cut(value) if isinstance(value, str) else value
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """One readable line; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record for a person."""
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        line = f"{clock} {record.levelname.lower():7} {_event(record)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class EventFormatter(logging.Formatter):
    """What a person reads where time and level are kept beside it."""

    def format(self, record: logging.LogRecord) -> str:
        """The event and its fields; a traceback follows on lines of its own."""
        line = _event(record)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _event(record: logging.LogRecord) -> str:
    fields = " ".join(f"{key}={_readable(value)}" for key, value in getattr(record, "fields", {}).items())
    return f"{_escape(_cut(record.getMessage()))} {fields}".rstrip()


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + f"… ({len(text)} characters)"


def _escape(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _readable(value: Any) -> str:
    """A value as it is if that is one word, else quoted with its control characters escaped."""
    text = _cut(str(value))
    return text if text and text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=False)


def configure(form: str, level: str) -> None:
    """Set up the root logger: `form` auto, json or human; `level` a logging level's name. May be called again.

    With `auto`, where systemd connected stderr to the journal, entries go there with their fields.
    """
    handler: logging.Handler
    if form == "auto" and stderr_is_journal():
        handler = JournalHandler()
        handler.setFormatter(EventFormatter())
    else:
        handler = logging.StreamHandler(sys.stderr)
        human = form == "human" or (form == "auto" and sys.stderr.isatty())
        handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class RateLimit:
    """At most one line per key and interval; says how many were kept back. Keys are bounded: a flood of new ones starts over."""

    def __init__(self, interval_s: float = 1.0, max_keys: int = 1024) -> None:
        self._interval_s = interval_s
        self._max_keys = max_keys
        self._last: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def allow(self, key: str, now: float | None = None) -> int | None:
        """None: keep it back. Otherwise log it, with the number of lines of this key kept back before."""
        now = time.monotonic() if now is None else now
        if now - self._last.get(key, -self._interval_s) < self._interval_s:
            self._suppressed[key] = self._suppressed.get(key, 0) + 1
            return None
        if len(self._last) >= self._max_keys:
            self._last.clear()
            self._suppressed.clear()
        self._last[key] = now
        return self._suppressed.pop(key, 0)

    def kept_back(self, key: str) -> int:
        """How many lines of this key were kept back since the last one; they are not told again."""
        return self._suppressed.pop(key, 0)
