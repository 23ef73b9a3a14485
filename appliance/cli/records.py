"""The command line's way to what was recorded: a running appliance over HTTP, or its file when none runs."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from appliance.cli.connection import Appliance
from appliance.cli.output import CommandError, Exit, note
from appliance.config import find, load, recorder_path

if TYPE_CHECKING:
    from appliance.core.errors import ApplianceError
    from appliance.recording.reader import RecordReader

SINCE = Annotated[
    str, typer.Option("--since", help="30s, 15min, 24h, 7d ago, or a time like 2027-01-31T06:00.", show_default=True)
]
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def span_s(text: str) -> float:
    """Seconds of "10m"."""
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|m|min|h|d|w)", text.strip()):
        return float(match[1]) * UNITS[match[2]]
    raise CommandError(Exit.USAGE, "USAGE", f"{text!r} is no span of time", "30s, 10m, 2h")


def moment(text: str) -> float:
    """Seconds since 1970 of "24h" (ago) or an ISO time (local unless it says otherwise)."""
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|m|min|h|d|w)", text.strip()):
        return time.time() - float(match[1]) * UNITS[match[2]]
    from datetime import datetime

    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise CommandError(Exit.USAGE, "USAGE", f"{text!r} is no time", "24h, 7d, 15min, or 2027-01-31T06:00") from None


def clock(wall: float, separator: str = " ") -> str:
    """A moment as a person on site reads it, by ISO 8601. With its offset: one night a year has an hour twice."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(wall, UTC).astimezone().isoformat(separator, "seconds")


def ask(url: str | None, path: str, query: dict[str, Any], from_file: Callable[[RecordReader], Any]) -> Any:
    """The appliance's answer, or the file's if no appliance answers and none was named."""
    asked = urlencode({key: value for key, value in query.items() if value not in ("", None)})
    try:
        return Appliance(url).get(f"{path}?{asked}")
    except CommandError as error:
        if error.code is not Exit.UNREACHABLE or url is not None:
            raise
    return from_disk(from_file)


@functools.cache
def _tell_once(message: str) -> None:
    """A command that asks twice says it once."""
    note(message)


def from_disk(question: Callable[[RecordReader], Any]) -> Any:
    """Ask the configured file itself."""
    from appliance.core.errors import ApplianceError
    from appliance.recording.reader import RecordReader

    file = recorder_path(load(find()))
    _tell_once(f"no appliance answers: reading {file}")
    try:
        return question(RecordReader(file))
    except ApplianceError as error:
        hint = f"`appliance serve` {SETS_ASIDE}" if is_damaged(error) else "start one with `appliance serve`"
        raise CommandError(Exit.FAILED, "NO_RECORD", error.message, hint) from error


SETS_ASIDE = "puts the file aside, as .damaged-… beside it, and begins a new record"
"""What the next start does with a damaged one."""


def is_damaged(error: ApplianceError) -> bool:
    """Whether that is why the record cannot be read. One without tables, which has only just been made, is not damaged."""
    import sqlite3

    from appliance.recording.file import is_damage

    cause = error.__cause__
    return isinstance(cause, sqlite3.Error) and is_damage(cause) and cause.sqlite_errorcode != sqlite3.SQLITE_ERROR
