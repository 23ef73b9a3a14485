"""Questions to the recorder's file: events, history, energy, the audit chain. Each opens its own read-only connection.

For a thread beside the loop, or a command beside a stopped appliance. Answers are bounded and ready for JSON. A file that is
not there or cannot be read is UNAVAILABLE, with what to do.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from appliance.core import audit
from appliance.core.energy import EnergySum, contained
from appliance.core.errors import ApplianceError, invalid, unavailable
from appliance.core.history import TIERS, Bucket, Held, choose_tier, merge_rows, recorded_s
from appliance.recording.file import ANOTHERS, damaged_files, open_for_reading
from appliance.recording.packing import Selection
from appliance.recording.writer import audit_anchor, audit_entry, names_of, object_of

MAX_EVENTS = 10_000
MAX_KINDS = 32
MAX_POINTS = 2_000
DEFAULT_POINTS = 300
FOREVER = 1e11
AHEAD_S = 60.0
"""What is recorded with a later time than so much from now is from a clock that was ahead."""


def _unreadable(error: sqlite3.Error) -> ApplianceError:
    if "no such table" in str(error):
        # the file is made, and then filled
        return unavailable("nothing has been recorded yet: the recorder could not begin its file. Is its disk full?")
    return unavailable(f"the record cannot be read: {error}")


class RecordReader:
    """Answers from one file. Holds nothing open between questions.

    `is_anothers`: whether it is another appliance's record just now, and so no answer; by default it does not matter whose it is.
    """

    def __init__(
        self, path: Path, *, is_anothers: Callable[[], bool] = lambda: False, wall: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._is_anothers = is_anothers
        self._wall = wall

    def _end(self, until: float) -> float:
        return until if until < FOREVER else self._wall() + AHEAD_S

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if self._is_anothers():
            raise unavailable(f"nothing is recorded: {ANOTHERS}")
        try:
            connection = open_for_reading(self._path)
        except FileNotFoundError:
            raise unavailable("nothing has been recorded yet, or the recorder is off ([recorder] enabled)") from None
        except sqlite3.Error as error:
            raise _unreadable(error) from error
        try:
            yield connection
        except sqlite3.Error as error:
            raise _unreadable(error) from error
        finally:
            connection.close()

    def events(
        self, *, since: float = 0.0, until: float = FOREVER, kind: str = "", limit: int = 1_000, after_id: int = 0
    ) -> list[dict[str, Any]]:
        """The newest `limit` events of that time (seconds since 1970), oldest first.

        `kind` "model" means model.state too; "model,gpu.xid" either. At most `MAX_KINDS`.
        """
        kinds = [one for one in kind.split(",") if one]
        if len(kinds) > MAX_KINDS:
            raise invalid(f"at most {MAX_KINDS} kinds of events at a time, {len(kinds)} came")
        either = " OR ".join(["kind = ? OR substr(kind, 1, length(?) + 1) = ? || '.'"] * len(kinds)) or "1"
        query = (
            "SELECT id, wall, monotonic, boot_id, kind, severity, fields FROM events WHERE wall >= ? AND wall <= ?"  # noqa: S608
            f" AND id > ? AND ({either}) ORDER BY id DESC LIMIT ?"
        )
        tripled = [one for one in kinds for _ in range(3)]
        values = (since, until, after_id, *tripled, max(1, min(limit, MAX_EVENTS)))
        with self._open() as connection:
            rows = connection.execute(query, values).fetchall()
        names = ("id", "time", "monotonic", "boot_id", "kind", "severity")
        return [dict(zip(names, row[:6], strict=True)) | {"fields": object_of(row[6])} for row in reversed(rows)]

    def series(self) -> list[str]:
        """The names of all readings in the record."""
        with self._open() as connection:
            rows = connection.execute("SELECT names FROM layouts").fetchall()
        return sorted({name for (text,) in rows for name in names_of(text)})

    def history(
        self,
        names: Sequence[str],
        *,
        since: float,
        until: float = FOREVER,
        step_s: float = 0.0,
        points: int = DEFAULT_POINTS,
    ) -> dict[str, Any]:
        """{"step_s", "tier_s", "times": […], "series": {name: {"min": […], "mean": […], "max": […]}}}, None for gaps.

        The finest tier that reaches back to `since`; neighbours are merged to `step_s`, or until about `points` are left. Without
        `until` it ends a minute from now: what a clock that was ahead recorded is only told to who asks for that time.
        """
        points = max(1, min(points, MAX_POINTS))
        until = self._end(until)
        with self._open() as connection:
            held = [_held(connection, f"samples_{tier.step_s}", since, until) for tier in TIERS]
            step = max(step_s, recorded_s(held) / points)
            tier = TIERS[choose_tier(step, held)]
            rows = connection.execute(
                f"SELECT segment, start, wall, layout, data FROM samples_{tier.step_s}"  # noqa: S608
                " WHERE wall >= ? AND wall <= ? ORDER BY segment, start",
                (since, until),
            ).fetchall()
            layouts = dict(connection.execute("SELECT id, names FROM layouts").fetchall())
        step = max(tier.step_s, -(-step // tier.step_s) * tier.step_s)
        groups: dict[tuple[int, int], list[tuple[float, int, bytes]]] = {}
        for segment, start, wall, layout, data in rows:
            groups.setdefault((segment, int(start // step)), []).append((wall, layout, data))
        # segments of a clock that was set back lie over each other
        ordered = sorted(groups.values(), key=lambda members: members[0][0])[-MAX_POINTS:]
        used = {layout for members in ordered for _, layout, _ in members}
        wanted = frozenset(names)
        selections = {layout: Selection(names_of(layouts.get(layout, "")), wanted) for layout in used}
        merged = [(members[0][0], _merged(members, selections)) for members in ordered]
        return {
            "step_s": step,
            "tier_s": tier.step_s,
            "times": [wall for wall, _ in merged],
            "series": {name: _columns([row.get(name) for _, row in merged]) for name in names},
        }

    def energy(self, *, since: float = 0.0, until: float = FOREVER) -> list[EnergySum]:
        """Energy by device, source, kind and model; parts of a device sum to its total. See `EnergySum.within`.

        Without `until` it ends a minute from now, as `history` does.
        """
        query = (
            "SELECT device, source, estimated, kind, model, sum(uj), sum(busy_s), sum(items) FROM energy"
            " WHERE wall >= ? AND wall <= ? GROUP BY device, source, estimated, kind, model ORDER BY device, kind, model"
        )
        with self._open() as connection:
            rows = connection.execute(query, (since, self._end(until))).fetchall()
        return contained([EnergySum(row[0], row[1], bool(row[2]), *row[3:]) for row in rows])

    def audit(self, *, limit: int = 1_000) -> dict[str, Any]:
        """{"verdict": …, "begun_anew": […], "damaged_files": […], "entries": […]}: the whole chain checked, its newest `limit`
        entries shown, oldest first.

        A chain that holds says nothing of one before it: `begun_anew` are the entries where one broke off, since its file was
        damaged, `damaged_files` what is left of such beside this one.
        """
        with self._open() as connection:
            seq, hash_ = audit_anchor(connection)
            rows = connection.execute("SELECT * FROM audit ORDER BY seq").fetchall()
        entries = [audit_entry(row) for row in rows]
        verdict = audit.verify(entries, after_seq=seq, after_hash=hash_)
        shown = entries[-max(1, min(limit, MAX_EVENTS)) :]
        return {
            "verdict": msgspec.to_builtins(verdict),
            "begun_anew": msgspec.to_builtins(audit.begun_anew(entries)),
            "damaged_files": [file.name for file in damaged_files(self._path)],
            "entries": msgspec.to_builtins(shown),
        }


def _held(connection: sqlite3.Connection, table: str, since: float, until: float) -> Held:
    """Of the index by time, not of the rows: those are large."""
    place = f"SELECT segment, start FROM {table} WHERE id = "  # noqa: S608  a name of ours
    first = connection.execute(f"{place} (SELECT min(id) FROM {table})").fetchone()  # noqa: S608
    asked, count = connection.execute(
        f"SELECT min(id), count(*) FROM {table} WHERE wall >= ? AND wall <= ?",  # noqa: S608
        (since, until),
    ).fetchone()
    return Held(first, connection.execute(f"{place} ?", (asked,)).fetchone(), count)


def _merged(members: Sequence[tuple[float, int, bytes]], selections: Mapping[int, Selection]) -> dict[str, Bucket]:
    """The rows of one moment as one; each layout at once, then what the layouts have in common."""
    by_layout: dict[int, list[bytes]] = {}
    for _, layout, data in members:
        by_layout.setdefault(layout, []).append(data)
    parts = [selections[layout].merged(rows) for layout, rows in by_layout.items()]
    return parts[0] if len(parts) == 1 else merge_rows(parts)


def _columns(buckets: Sequence[Bucket | None]) -> dict[str, list[float | None]]:
    return {
        "min": [bucket.minimum if bucket else None for bucket in buckets],
        "mean": [bucket.mean if bucket else None for bucket in buckets],
        "max": [bucket.maximum if bucket else None for bucket in buckets],
    }
