"""The recorder's file: how it is opened, checked, set aside when it is damaged, and read by others.

WAL, so that readers never stop the writer. synchronous=FULL: a commit is on the disk when it returns, and there is one a second;
NORMAL would lose what came after the last checkpoint (measured with the shutdown ioctl: up to 499 commits).
auto_vacuum=INCREMENTAL, so that a pruned file shrinks. It knows nothing of threads or queues; `writer` and `reader` use it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
APPLICATION_ID = 0x41495052  # "AIPR"
PAGE_BYTES = 4096
WAL_PAGES = 256
"""A checkpoint after so many pages: the WAL stays near one MiB."""
DAMAGED_KEPT = 2
"""Damaged files that are kept for a look; they count for nobody's budget, so there are few."""
BUSY_TIMEOUT_S = 2.0
ANOTHERS = "another appliance records into this file; give this one its own with recorder.path"
"""What is wrong for the second appliance on one file."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE segments (id INTEGER PRIMARY KEY, run_id TEXT NOT NULL,
  boot_id TEXT NOT NULL, wall REAL NOT NULL, monotonic REAL NOT NULL);
CREATE TABLE layouts (id INTEGER PRIMARY KEY, names TEXT NOT NULL UNIQUE);
CREATE TABLE samples_1 (id INTEGER PRIMARY KEY, segment INTEGER NOT NULL, start INTEGER NOT NULL, wall REAL NOT NULL,
  layout INTEGER NOT NULL, data BLOB NOT NULL, UNIQUE (segment, start));
CREATE INDEX samples_1_wall ON samples_1 (wall);
CREATE TABLE samples_60 (id INTEGER PRIMARY KEY, segment INTEGER NOT NULL, start INTEGER NOT NULL, wall REAL NOT NULL,
  layout INTEGER NOT NULL, data BLOB NOT NULL, UNIQUE (segment, start));
CREATE INDEX samples_60_wall ON samples_60 (wall);
CREATE TABLE samples_900 (id INTEGER PRIMARY KEY, segment INTEGER NOT NULL, start INTEGER NOT NULL, wall REAL NOT NULL,
  layout INTEGER NOT NULL, data BLOB NOT NULL, UNIQUE (segment, start));
CREATE INDEX samples_900_wall ON samples_900 (wall);
CREATE TABLE events (id INTEGER PRIMARY KEY, wall REAL NOT NULL, monotonic REAL NOT NULL, boot_id TEXT NOT NULL,
  kind TEXT NOT NULL, severity TEXT NOT NULL, fields TEXT NOT NULL);
CREATE INDEX events_wall ON events (wall);
CREATE TABLE energy (id INTEGER PRIMARY KEY, segment INTEGER NOT NULL, start INTEGER NOT NULL, wall REAL NOT NULL,
  device TEXT NOT NULL, source TEXT NOT NULL, estimated INTEGER NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,
  uj INTEGER NOT NULL, busy_s REAL NOT NULL,
  items INTEGER NOT NULL, UNIQUE (segment, start, device, source, estimated, kind, model));
CREATE INDEX energy_wall ON energy (wall);
CREATE TABLE audit (seq INTEGER PRIMARY KEY, time REAL NOT NULL, monotonic REAL NOT NULL, boot_id TEXT NOT NULL,
  actor TEXT NOT NULL, action TEXT NOT NULL, fields TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL);
"""

MIGRATIONS: dict[int, str] = {}
"""From version N to N + 1: the statements, carried out in one transaction."""


class UnusableFileError(Exception):
    """The file is there and cannot be used: what is wrong with it."""


UNREADABLE = frozenset(
    {
        sqlite3.SQLITE_IOERR_READ,
        sqlite3.SQLITE_IOERR_SHORT_READ,
        sqlite3.SQLITE_IOERR_CORRUPTFS,
        sqlite3.SQLITE_IOERR_DATA,
    }
)
"""Extended result codes: the disk does not give back what was written. Other I/O errors are failed writes."""


def is_full(error: sqlite3.Error) -> bool:
    """No room: the disk is full, or the budget is. A write that failed in another way counts, too: what helps is the same."""
    return _code(error) == sqlite3.SQLITE_FULL or (
        isinstance(error, sqlite3.OperationalError)
        and _code(error) == sqlite3.SQLITE_IOERR
        and error.sqlite_errorcode not in UNREADABLE
    )


def is_damage(error: sqlite3.Error) -> bool:
    """What is in the file is not what we wrote, or cannot be read any more."""
    if getattr(error, "sqlite_errorcode", None) in UNREADABLE:
        return True
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_ERROR)


def _code(error: sqlite3.Error) -> int:
    """The primary result code; an error of the binding itself has none and counts as SQLITE_ERROR."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


class Aside(NamedTuple):
    """A file that was put away, and why."""

    path: Path
    reason: str


def open_for_writing(path: Path, max_bytes: int, distrust: str = "") -> tuple[sqlite3.Connection, Aside | None]:
    """The connection that writes, and what was set aside, if anything. OSError or sqlite3.Error if there is no way.

    `distrust`: what was wrong with the file although it passed the check; then it is set aside unseen.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if distrust and path.exists():
            raise UnusableFileError(distrust)
        return _open(path, max_bytes), None
    except UnusableFileError as error:
        reason = str(error)
    except sqlite3.DatabaseError as error:
        if not path.exists() or not (is_damage(error) or _code(error) == sqlite3.SQLITE_READONLY):
            raise
        reason = str(error)
    aside = set_aside(path)
    return _open(path, max_bytes), Aside(aside, f"{reason}; kept as {aside.name}")


def _open(path: Path, max_bytes: int) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        # what is damaged inside a text must not keep the rest from being read
        connection.text_factory = _text
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA temp_store=MEMORY")
        connection.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit={WAL_PAGES * PAGE_BYTES}")
        _check(connection)
        _bring_up_to_date(connection)
        connection.execute(f"PRAGMA max_page_count={max(64, max_bytes // PAGE_BYTES)}")
        # a header that says "read only" passes every check but this one
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('probe', '')")
    except BaseException:
        connection.close()
        raise
    return connection


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _check(connection: sqlite3.Connection) -> None:
    """PRAGMA quick_check: every page and record, without comparing indexes; a 256 MB file takes less than a second."""
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise UnusableFileError(str(found).replace("\n", " ")[:200])


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if version > SCHEMA_VERSION or version < 0:
        raise UnusableFileError(f"written by a newer release (schema {version}, known here: {SCHEMA_VERSION})")
    if version == 0 and not empty:
        raise UnusableFileError("not a recorder's file")
    statements = SCHEMA if version == 0 else "".join(MIGRATIONS[number] for number in range(version, SCHEMA_VERSION))
    if statements:
        connection.executescript(
            f"BEGIN IMMEDIATE; {statements} PRAGMA application_id={APPLICATION_ID}; "
            f"PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
        )


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be used, with its WAL, and keep only the last few such. Returns its new path."""
    moment = path.stat().st_mtime_ns
    aside = path.with_name(f"{path.name}.damaged-{moment // 1_000_000_000}-{os.getpid()}")
    while aside.exists():
        moment += 1_000_000_000
        aside = path.with_name(f"{path.name}.damaged-{moment // 1_000_000_000}-{os.getpid()}")
    path.rename(aside)
    with contextlib.suppress(FileNotFoundError):
        Path(f"{path}-wal").rename(f"{aside}-wal")
    with contextlib.suppress(FileNotFoundError):
        Path(f"{path}-shm").unlink()
    for file in damaged_files(path)[:-DAMAGED_KEPT]:
        for gone in (file, Path(f"{file}-wal")):
            with contextlib.suppress(FileNotFoundError):
                gone.unlink()
    return aside


def damaged_files(path: Path) -> list[Path]:
    """What was set aside beside the file and is still there, oldest first."""
    found = path.parent.glob(f"{path.name}.damaged-*")
    return sorted(
        (file for file in found if not file.name.endswith(("-wal", "-shm"))), key=lambda file: file.stat().st_mtime_ns
    )


def end_of_chain(path: Path) -> tuple[int, str]:
    """Number and hash of the last action that can be read in a file that may be damaged; (0, "") if none can be."""
    last = (0, "")
    try:
        connection = open_for_reading(path)
    except (OSError, sqlite3.Error):
        return last
    try:
        # from the end if that can be read, else as far as it goes from the beginning
        for query in (
            "SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1",
            "SELECT seq, hash FROM audit ORDER BY seq",
        ):
            with contextlib.suppress(sqlite3.Error):
                for seq, hash_ in connection.execute(query):
                    last = (int(seq), str(hash_)[:64])
            if last[0]:
                break
    except (ValueError, TypeError):
        pass  # what stands there is no number: nothing of it can be believed
    finally:
        connection.close()
        Path(f"{path}-shm").unlink(missing_ok=True)
    return last


def open_for_reading(path: Path) -> sqlite3.Connection:
    """A connection that cannot write. FileNotFoundError without a file; sqlite3.Error if it cannot be read.

    A WAL that a killed appliance left in a folder that we may not write cannot be opened; then the file is read without it, and
    the last seconds are missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no recorder file {path}")
    uri = path.resolve().as_uri()
    connection = None
    try:
        connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError:
        if connection is not None:
            connection.close()
        connection = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
    except sqlite3.DatabaseError:
        if connection is not None:
            connection.close()
        raise
    connection.text_factory = _text
    return connection
