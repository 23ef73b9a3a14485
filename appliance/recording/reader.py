"""Questions to the recorder's file: events, history, energy, the audit chain. Each opens its own read-only connection.

For a thread beside the loop, or a command beside a stopped appliance. Answers are bounded and ready for JSON. A file that is
not there or cannot be read is UNAVAILABLE, with what to do.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from appliance.core import audit
from appliance.core.energy import EnergySum
from appliance.core.errors import unavailable
from appliance.core.history import TIERS, Bucket, choose_tier, merge_rows
from appliance.recording.file import open_for_reading
from appliance.recording.packing import unpack
from appliance.recording.writer import audit_anchor, audit_entry, names_of, object_of

MAX_EVENTS = 10_000
MAX_POINTS = 2_000
DEFAULT_POINTS = 300
FOREVER = 1e11


class RecordReader:
    """Answers from one file, whoever writes it. Holds nothing open between questions."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = open_for_reading(self._path)
        except FileNotFoundError:
            raise unavailable("nothing has been recorded yet, or the recorder is off ([recorder] enabled)") from None
        except sqlite3.Error as error:
            raise unavailable(f"the record cannot be read: {error}") from error
        try:
            yield connection
        except sqlite3.Error as error:
            raise unavailable(f"the record cannot be read: {error}") from error
        finally:
            connection.close()

    def events(
        self, *, since: float = 0.0, until: float = FOREVER, kind: str = "", limit: int = 1_000, after_id: int = 0
    ) -> list[dict[str, Any]]:
        """The newest `limit` events of that time (seconds since 1970), oldest first. `kind` "model" means model.state too."""
        query = (
            "SELECT id, wall, monotonic, boot_id, kind, severity, fields FROM events WHERE wall >= ? AND wall <= ?"
            " AND id > ? AND (? = '' OR kind = ? OR substr(kind, 1, length(?) + 1) = ? || '.') ORDER BY id DESC LIMIT ?"
        )
        values = (since, until, after_id, kind, kind, kind, kind, max(1, min(limit, MAX_EVENTS)))
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

        The finest tier that reaches back to `since`; neighbours are merged to `step_s`, or until at most `points` are left.
        """
        points = max(1, min(points, MAX_POINTS))
        with self._open() as connection:
            oldest = [
                connection.execute(f"SELECT min(wall) FROM samples_{tier.step_s}").fetchone()[0]  # noqa: S608
                for tier in TIERS
            ]
            newest = connection.execute("SELECT max(wall) FROM samples_1").fetchone()[0] or since
            begun = max(since, min((first for first in oldest if first is not None), default=since))
            span = max(1.0, min(until, newest) - begun)
            step = max(step_s, span / points)
            tier = TIERS[choose_tier(begun, until, step, oldest)]
            rows = connection.execute(
                f"SELECT segment, start, wall, names, data FROM samples_{tier.step_s} AS s"  # noqa: S608
                " JOIN layouts ON layouts.id = s.layout WHERE wall >= ? AND wall <= ? ORDER BY s.segment, s.start",
                (since, until),
            ).fetchall()
        step = max(tier.step_s, -(-step // tier.step_s) * tier.step_s)
        groups: dict[tuple[int, int], list[tuple[float, dict[str, Bucket]]]] = {}
        for segment, start, wall, text, data in rows:
            wanted = {name: bucket for name, bucket in unpack(names_of(text), data).items() if name in names}
            groups.setdefault((segment, int(start // step)), []).append((wall, wanted))
        if len(groups) > MAX_POINTS:
            groups = dict(list(groups.items())[-MAX_POINTS:])
        merged = [(members[0][0], merge_rows(row for _, row in members)) for members in groups.values()]
        return {
            "step_s": step,
            "tier_s": tier.step_s,
            "times": [wall for wall, _ in merged],
            "series": {name: _columns([row.get(name) for _, row in merged]) for name in names},
        }

    def energy(self, *, since: float = 0.0, until: float = FOREVER) -> list[EnergySum]:
        """Energy by device, source, kind and model; parts of a device sum to its total."""
        query = (
            "SELECT device, source, estimated, kind, model, sum(uj), sum(busy_s), sum(items) FROM energy"
            " WHERE wall >= ? AND wall <= ? GROUP BY device, source, estimated, kind, model ORDER BY device, kind, model"
        )
        with self._open() as connection:
            rows = connection.execute(query, (since, until)).fetchall()
        return [EnergySum(row[0], row[1], bool(row[2]), *row[3:]) for row in rows]

    def audit(self, *, limit: int = 1_000) -> dict[str, Any]:
        """{"verdict": …, "entries": […]}: the whole chain checked, its newest `limit` entries shown, oldest first."""
        with self._open() as connection:
            seq, hash_ = audit_anchor(connection)
            rows = connection.execute("SELECT * FROM audit ORDER BY seq").fetchall()
        entries = [audit_entry(row) for row in rows]
        verdict = audit.verify(entries, after_seq=seq, after_hash=hash_)
        shown = entries[-max(1, min(limit, MAX_EVENTS)) :]
        return {"verdict": msgspec.to_builtins(verdict), "entries": [msgspec.to_builtins(entry) for entry in shown]}


def _columns(buckets: Sequence[Bucket | None]) -> dict[str, list[float | None]]:
    return {
        "min": [bucket.minimum if bucket else None for bucket in buckets],
        "mean": [bucket.mean if bucket else None for bucket in buckets],
        "max": [bucket.maximum if bucket else None for bucket in buckets],
    }
