"""Logs: one event name and its fields a line, on stderr; JSON for machines, one readable line for people."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from appliance.config import LogConfig


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """One readable line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record for a person."""
        fields = " ".join(f"{key}={value!r}" for key, value in getattr(record, "fields", {}).items())
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        line = f"{clock} {record.levelname.lower():7} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(config: LogConfig) -> None:
    """Set up the root logger. May be called again after a reload."""
    handler = logging.StreamHandler(sys.stderr)
    human = config.format == "human" or (config.format == "auto" and sys.stderr.isatty())
    handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
