"""What the one writer does to the file: put a batch in, make coarser tiers of finer ones, keep within the budget.

Not thread-safe, and knows no queue: `recorder` owns the thread that calls this. Coarser tiers are made from stored rows, never
from memory, so that a kill costs them nothing: `begin` makes what is missing at the next start.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from appliance.core import audit
from appliance.core.energy import EnergyWindow
from appliance.core.history import TIERS, bucket_start, merge_rows, rows_to_drop
from appliance.recording.file import PAGE_BYTES, WAL_PAGES, damaged_files, end_of_chain, open_for_writing
from appliance.recording.packing import pack_buckets, pack_readings, unpack

MAX_SERIES = 512
"""Names of readings at one time; more are not recorded, and counted as dropped."""
CLOCK_STEP_S = 1.0
"""A wall clock that moves this much more or less than the monotonic one between two samples was stepped."""
EVENT_ROWS = 200_000
EVENT_FLOOR_ROWS = 1_000
AUDIT_ROWS = 100_000
AUDIT_FLOOR_ROWS = 10_000
ENERGY_ROWS = 400_000
ENERGY_FLOOR_ROWS = 1_000
MAX_FIELDS_BYTES = 8 << 10
TABLES_OF_TIERS = tuple(f"samples_{tier.step_s}" for tier in TIERS)
SHRINK_PAGES = 64
"""Pages given back at a time."""
BUDGET_SHARE = 0.9
"""Pruning begins here; the last tenth is for what pruning itself needs."""


class Sample(msgspec.Struct, frozen=True):
    """Readings of one moment, by name."""

    wall: float
    monotonic: float
    values: Mapping[str, float]


class RecordedEvent(msgspec.Struct, frozen=True):
    """Something that happened. `wall` seconds since 1970, `monotonic` seconds since the boot."""

    wall: float
    monotonic: float
    kind: str
    severity: str
    fields: Mapping[str, Any]


class Action(msgspec.Struct, frozen=True):
    """Something that an operator had done."""

    wall: float
    monotonic: float
    actor: str
    action: str
    fields: Mapping[str, Any]


class Energy(msgspec.Struct, frozen=True):
    """A window of energy, and when it ended."""

    wall: float
    monotonic: float
    window: EnergyWindow


Item = Sample | RecordedEvent | Action | Energy


class Writer:
    """The open file. `set_aside` says what happened to the one before, `ended` where its chain of actions did, if anything."""

    def __init__(self, path: Path, max_bytes: int, *, run_id: str, boot_id: str, distrust: str = "") -> None:
        self._max_bytes = max_bytes
        self._run_id = run_id
        self._boot_id = boot_id
        # the WAL and the index over it are part of the budget too
        self._page_budget_bytes = max(64 * PAGE_BYTES, max_bytes - 2 * WAL_PAGES * PAGE_BYTES)
        self._connection, aside = open_for_writing(path, self._page_budget_bytes, distrust)
        self.set_aside = aside.reason if aside is not None else ""
        # of an earlier run, too, that did not come to say so
        damaged = [aside.path] if aside is not None else damaged_files(path) if not self._has_chain() else []
        self._broken_off = damaged[-1] if damaged else None
        self.ended = end_of_chain(self._broken_off) if self._broken_off is not None else (0, "")
        self._segment = 0
        self._anchor = (0.0, 0.0)
        self._names: tuple[str, ...] = ()
        self._layout = 0
        self._starts: dict[int, int] = {}
        self.series_refused = 0
        self.last_hash = ""

    def close(self) -> None:
        """Put the WAL into the file and let go."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. What memory knew of segments and layouts is forgotten with what was rolled back."""
        known = (self._segment, self._anchor, self._names, self._layout, dict(self._starts))
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            self._segment, self._anchor, self._names, self._layout, self._starts = known
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def _has_chain(self) -> bool:
        has_entry = self._connection.execute("SELECT EXISTS (SELECT 1 FROM audit)").fetchone()[0]
        return bool(has_entry) or self._pruned_chain() is not None

    def begin(self, wall: float, monotonic: float, known_hash: str = "") -> dict[str, Any] | None:
        """This run has begun. What the last run left if it did not say goodbye: when it was last heard of, and its boot id.

        Where a file was set aside, and its chain of actions with it, the new chain begins by saying so. `known_hash`: the last
        one of before, if this process wrote it.
        """
        with self._transaction():
            if self._broken_off is not None and not self._has_chain():
                seq, hash_ = self.ended
                name, last = self._broken_off.name, hash_ or known_hash or "none of it can be read"
                fields = {
                    "file": name,
                    "reason": self.set_aside or f"kept as {name}",
                    "last_seq": seq,
                    "last_hash": last,
                }
                self._action(Action(wall, monotonic, audit.RECORDER, audit.BEGUN_ANEW, fields))
            self._catch_up_all()
            row = self._connection.execute("SELECT value FROM meta WHERE key = 'running'").fetchone()
            crashed = None
            if row is not None:
                # of the newest rows, not the latest time: a clock that was set back once had later ones
                newest = "SELECT wall FROM {0} WHERE id = (SELECT max(id) FROM {0})"
                last = self._connection.execute(
                    f"SELECT max(wall) FROM ({newest.format('samples_1')} UNION ALL {newest.format('events')})"  # noqa: S608
                ).fetchone()[0]
                before = object_of(row[0])
                crashed = {
                    "run_id": before.get("run_id", ""),
                    "last_heard": last,
                    "same_boot": before.get("boot_id") == self._boot_id,
                }
            state = json.dumps({"run_id": self._run_id, "boot_id": self._boot_id, "wall": wall})
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('running', ?)", (state,))
            self._new_segment(wall, monotonic)
        return crashed

    def end(self) -> None:
        """This run says goodbye."""
        with self._transaction():
            self._connection.execute("DELETE FROM meta WHERE key = 'running'")

    def apply(self, items: Sequence[Item]) -> None:
        """Put a batch in, in one transaction that is on the disk when this returns."""
        with self._transaction():
            for item in items:
                match item:
                    case Sample():
                        self._sample(item)
                    case RecordedEvent():
                        self._event(item)
                    case Action():
                        self._action(item)
                    case Energy():
                        self._energy(item)
            self._retain()

    # --- what is put in ---

    def _new_segment(self, wall: float, monotonic: float) -> None:
        row = (self._run_id, self._boot_id, wall, monotonic)
        cursor = self._connection.execute(
            "INSERT INTO segments (run_id, boot_id, wall, monotonic) VALUES (?, ?, ?, ?)", row
        )
        self._segment = int(cursor.lastrowid or 0)
        self._anchor = (wall, monotonic)
        self._starts = {}

    def _sample(self, sample: Sample) -> None:
        moved = (sample.wall - self._anchor[0]) - (sample.monotonic - self._anchor[1])
        if abs(moved) >= CLOCK_STEP_S:
            self._finish_segment()
            self._new_segment(sample.wall, sample.monotonic)
            fields = {"seconds": round(moved, 3)}
            self._event(RecordedEvent(sample.wall, sample.monotonic, "clock.step", "warning", fields))
        self._anchor = (sample.wall, sample.monotonic)
        values = {name: float(value) for name, value in sample.values.items() if math.isfinite(value)}
        self._widen(values)
        start = bucket_start(sample.monotonic, 1)
        data = pack_readings(self._names, values)
        self._connection.execute(
            "INSERT OR REPLACE INTO samples_1 (segment, start, wall, layout, data) VALUES (?, ?, ?, ?, ?)",
            (self._segment, start, sample.wall, self._layout, data),
        )
        for index in range(1, len(TIERS)):
            step = TIERS[index].step_s
            now = bucket_start(sample.monotonic, step)
            if now > self._starts.setdefault(step, now):
                self._coarsen(index, self._segment, before=now)
                self._starts[step] = now

    def _widen(self, values: Mapping[str, float]) -> None:
        """A layout that has room for every name."""
        fresh = sorted(name for name in values if name not in self._names)
        if not fresh and self._layout:
            return
        kept = self._names
        if len(kept) + len(fresh) > MAX_SERIES:
            # names of workers that are gone make room: each version that is loaded brings some
            kept = tuple(name for name in kept if name in values)
        room = MAX_SERIES - len(kept)
        self.series_refused += len(fresh[room:])
        wanted = (*kept, *fresh[:room])
        if wanted != self._names or not self._layout:
            self._names, self._layout = self._interned(wanted)

    def _interned(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        text = json.dumps(names)
        self._connection.execute("INSERT OR IGNORE INTO layouts (names) VALUES (?)", (text,))
        return names, int(self._connection.execute("SELECT id FROM layouts WHERE names = ?", (text,)).fetchone()[0])

    def _event(self, event: RecordedEvent) -> None:
        fields = json.dumps(event.fields, default=str)
        if len(fields) > MAX_FIELDS_BYTES:
            fields = json.dumps({"cut": fields[:MAX_FIELDS_BYTES]})
        self._connection.execute(
            "INSERT INTO events (wall, monotonic, boot_id, kind, severity, fields) VALUES (?, ?, ?, ?, ?, ?)",
            (event.wall, event.monotonic, self._boot_id, event.kind, event.severity, fields),
        )

    def _action(self, action: Action) -> None:
        row = self._connection.execute("SELECT * FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
        last = audit_entry(row) if row is not None else self._pruned_chain()
        content = audit.AuditEntry(
            0, action.wall, action.monotonic, self._boot_id, action.actor, action.action, dict(action.fields), "", ""
        )
        entry = audit.append(last, content)
        self.last_hash = entry.hash
        values = (
            *(entry.seq, entry.time, entry.monotonic, entry.boot_id, entry.actor, entry.action),
            *(audit.canonical(entry.fields).decode(), entry.previous, entry.hash),
        )
        self._connection.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        fields = {"actor": entry.actor, "action": entry.action, "audit": entry.seq, **entry.fields}
        self._event(RecordedEvent(action.wall, action.monotonic, "operator.action", "info", fields))

    def _pruned_chain(self) -> audit.AuditEntry | None:
        """The last entry that was pruned, as far as the chain needs it."""
        seq, hash_ = audit_anchor(self._connection)
        return audit.AuditEntry(seq, 0.0, 0.0, "", "", "", {}, "", hash_) if seq else None

    def _energy(self, energy: Energy) -> None:
        window = energy.window
        parts = [
            ("total", "", window.total_uj, window.window_s, 0),
            ("idle", "", window.idle_uj, window.window_s, 0),
            ("unattributed", "", window.unattributed_uj, window.window_s, 0),
            *(("model", share.model, share.active_uj, share.busy_s, share.items) for share in window.models),
        ]
        start = bucket_start(energy.monotonic, TIERS[-1].step_s)
        place = (self._segment, start, energy.wall, window.device, window.source, int(window.estimated))
        self._connection.executemany(
            "INSERT INTO energy (segment, start, wall, device, source, estimated, kind, model, uj, busy_s, items)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " uj = uj + excluded.uj, busy_s = busy_s + excluded.busy_s, items = items + excluded.items, wall = excluded.wall",
            [(*place, *part) for part in parts],
        )

    # --- coarser tiers ---

    def _finish_segment(self) -> None:
        for index in range(1, len(TIERS)):
            self._coarsen(index, self._segment, before=None)

    def _catch_up_all(self) -> None:
        """Make the coarse rows that the last run did not come to: its last minute and its last quarter of an hour."""
        row = self._connection.execute("SELECT max(id) FROM segments").fetchone()
        if row[0] is not None:
            for index in range(1, len(TIERS)):
                self._coarsen(index, int(row[0]), before=None)

    def _coarsen(self, index: int, segment: int, before: int | None) -> None:
        """Make the rows of a tier from the one below it, from its last row on. Doing it twice changes nothing."""
        finer, tier = TIERS[index - 1].step_s, TIERS[index].step_s
        done = self._connection.execute(
            f"SELECT max(start) FROM samples_{tier} WHERE segment = ?",  # noqa: S608  a number of ours
            (segment,),
        ).fetchone()[0]
        rows = self._connection.execute(
            f"SELECT start, wall, names, data FROM samples_{finer} AS s JOIN layouts ON layouts.id = s.layout"  # noqa: S608
            " WHERE segment = ? AND start >= ? AND start < ? ORDER BY start",
            (segment, 0 if done is None else done, before if before is not None else 2**62),
        ).fetchall()
        groups: dict[int, list[tuple[float, str, bytes]]] = {}
        for start, wall, names, data in rows:
            groups.setdefault(bucket_start(start, tier), []).append((wall, names, data))
        for start, members in groups.items():
            merged = merge_rows(unpack(names_of(names), data) for _, names, data in members)
            names, layout = self._interned(tuple(merged))
            self._connection.execute(
                f"INSERT OR REPLACE INTO samples_{tier} (segment, start, wall, layout, data)"  # noqa: S608
                " VALUES (?, ?, ?, ?, ?)",
                (segment, start, members[0][0], layout, pack_buckets(names, merged)),
            )

    # --- the budget ---

    def _retain(self) -> None:
        """Rows beyond each table's number."""
        limits = [(f"samples_{tier.step_s}", "id", tier.rows) for tier in TIERS]
        limits += [("events", "id", EVENT_ROWS), ("energy", "id", ENERGY_ROWS)]
        for table, key, rows in limits:
            self._connection.execute(
                f"DELETE FROM {table} WHERE {key} <= (SELECT max({key}) FROM {table}) - ?",  # noqa: S608
                (rows,),
            )
        newest = self._connection.execute("SELECT max(seq) FROM audit").fetchone()[0]
        if newest is not None and newest % 1_000 == 0:
            self._prune_audit(newest - AUDIT_ROWS)

    def _prune_audit(self, up_to: int) -> None:
        """Give up the entries up to that one; its hash is kept, so that the rest still is a chain."""
        row = self._connection.execute("SELECT seq, hash FROM audit WHERE seq = ?", (up_to,)).fetchone()
        if row is not None:
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('audit_anchor', ?)", (json.dumps(row),))
            self._connection.execute("DELETE FROM audit WHERE seq <= ?", (up_to,))

    @property
    def used_bytes(self) -> int:
        """Pages in use."""
        pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
        free = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
        return int(pages - free) * PAGE_BYTES

    def keep_within_budget(self) -> int:
        """Drop the oldest until there is room again; how many rows."""
        dropped = 0
        while self.used_bytes > BUDGET_SHARE * self._page_budget_bytes and (rows := self.drop_oldest()):
            dropped += rows
        return dropped

    def drop_oldest(self) -> int:
        """Give up a tenth of the oldest rows of the finest tier that has some to give; how many rows. Gives pages back.

        Where even the floors take more than the budget, they give way in proportion; never to a disk that others fill.
        """
        floors = {table: tier.floor_rows for table, tier in zip(TABLES_OF_TIERS, TIERS, strict=True)}
        floors |= {"energy": ENERGY_FLOOR_ROWS, "events": EVENT_FLOOR_ROWS}
        counts = {table: self._count(table) for table in (*floors, "audit")}
        for table, floor in floors.items():
            if rows := rows_to_drop(counts[table], floor):
                return self._drop(table, rows)
        if self.used_bytes <= BUDGET_SHARE * self._page_budget_bytes:
            return 0
        fullest = max(counts, key=lambda table: counts[table] / floors.get(table, AUDIT_FLOOR_ROWS))
        rows = rows_to_drop(counts[fullest], 0)
        return self._drop(fullest, rows) if rows else 0

    def _count(self, table: str) -> int:
        return int(self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608  a name of ours

    def _drop(self, table: str, rows: int) -> int:
        with self._transaction():
            if table == "audit":
                first = self._connection.execute("SELECT min(seq) FROM audit").fetchone()[0]
                self._prune_audit(int(first) + rows - 1)
            else:
                self._connection.execute(
                    f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} ORDER BY id LIMIT ?)",  # noqa: S608
                    (rows,),
                )
            self._forget_unused()
        self.shrink()
        return rows

    def _forget_unused(self) -> None:
        """Delete the layouts and segments that no row has any more; those that the next row will have stay."""
        used = " UNION ".join(f"SELECT layout FROM samples_{tier.step_s}" for tier in TIERS)  # noqa: S608  numbers of ours
        self._connection.execute(f"DELETE FROM layouts WHERE id <> ? AND id NOT IN ({used})", (self._layout,))  # noqa: S608
        used = " UNION ".join(f"SELECT segment FROM {table}" for table in (*TABLES_OF_TIERS, "energy"))  # noqa: S608
        self._connection.execute(f"DELETE FROM segments WHERE id <> ? AND id NOT IN ({used})", (self._segment,))  # noqa: S608

    def shrink(self) -> None:
        """Give free pages and the WAL back to the disk."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        free = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
        # in steps: moving pages goes through the WAL, which needs room that there may not be
        for _ in range(0, free, SHRINK_PAGES):
            self._connection.execute(f"PRAGMA incremental_vacuum({SHRINK_PAGES})").fetchall()
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def audit_entry(row: Sequence[Any]) -> audit.AuditEntry:
    """A row of the table as an entry. What cannot be read becomes an entry that does not verify."""
    seq, time, monotonic, boot_id, actor, action, fields, previous, hash_ = row
    return audit.AuditEntry(seq, time, monotonic, boot_id, actor, action, object_of(fields), previous, hash_)


def audit_anchor(connection: sqlite3.Connection) -> tuple[int, str]:
    """Number and hash of the last pruned entry of the chain; (0, GENESIS) if none was pruned."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'audit_anchor'").fetchone()
    if row is None:
        return 0, audit.GENESIS
    seq, hash_ = json.loads(row[0])
    return int(seq), str(hash_)


def object_of(text: str) -> dict[str, Any]:
    """A JSON object; for text that is damaged, an object that holds it."""
    try:
        found = json.loads(text)
    except ValueError:
        return {"unreadable": text}
    return found if isinstance(found, dict) else {"unreadable": text}


def names_of(text: str) -> tuple[str, ...]:
    """A layout's names; none for text that is damaged."""
    try:
        return tuple(str(name) for name in json.loads(text))
    except (ValueError, TypeError):
        return ()
