"""The flight recorder: a bounded queue, and one thread that owns the file and commits what came, at least once a second.

Whoever records never waits and never sees an error: what cannot be kept is counted, and said in an event as soon as there is room
again. Reading goes through `reader`, on connections of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.energy import EnergyWindow
from appliance.recording.file import ANOTHERS, is_damage, is_full
from appliance.recording.writer import Action, Energy, Item, RecordedEvent, Sample, Writer

log = logging.getLogger(__name__)

COMMIT_INTERVAL_S = 1.0
"""The oldest thing not yet on the disk is at most this old, plus one commit: less than 2 s are lost to a power cut."""
QUEUE_ITEMS = 20_000
BATCH_ITEMS = 500
LEAST_BATCH_ITEMS = 20
"""What a batch shrinks to on a full disk: it goes through the WAL first, and that needs room of its own."""
RETRY_S = 5.0
FREED_S = 0.05
"""After room was made on a full disk."""
BALLAST_BYTES = 4 << 20
"""Kept beside the file, given up on a full disk: what the WAL holds must fit into the file before rows can be deleted."""
URGENT = ("error", "critical")


class RecorderState(msgspec.Struct, frozen=True):
    """How the recorder is. `problem` empty: it records. Counts are since the start; `bytes` is what the file uses.

    `committed_at_s`: monotonic seconds of the last commit, None before the first. `set_aside`: damaged files put away.
    """

    problem: str
    committed: int
    dropped: int
    pruned: int
    series_refused: int
    bytes: int
    last_hash: str
    committed_at_s: float | None = None
    set_aside: int = 0


class Recorder:
    """Records from any thread. `start` returns at once; the file is opened and checked by the thread."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        boot_id: str | None = None,
    ) -> None:
        self.path = path
        self.run_id = uuid.uuid4().hex
        self._boot_id = boot_id if boot_id is not None else read_boot_id()
        self._ballast_bytes = min(BALLAST_BYTES, max_bytes // 16)
        self._max_bytes = max_bytes - self._ballast_bytes
        self._wall = wall
        self._monotonic = monotonic
        self._queue: deque[Item] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._idle = threading.Condition()
        self._thread: threading.Thread | None = None
        self._writer: Writer | None = None
        self._own_lock: int | None = None
        self._problem = "not started"
        self._committed = self._dropped = self._pruned = self._bytes = self._refused = 0
        self._untold = 0
        self._batch_items = BATCH_ITEMS
        self._last_hash = ""
        self._committed_at_s: float | None = None
        self._set_aside = 0
        self._damages = 0

    # --- recording ---

    def record_sample(self, wall: float, monotonic: float, values: Mapping[str, float]) -> None:
        """Readings of one moment, by name ("gpu0.temperature"), once a second; values that are not finite are gaps."""
        self._put(Sample(wall, monotonic, dict(values)))

    def record_event(self, kind: str, severity: str = "info", fields: Mapping[str, Any] | None = None) -> None:
        """Something happened now. `severity`: info, warning, error or critical; the last two are committed at once."""
        self._put(RecordedEvent(self._wall(), self._monotonic(), kind, severity, dict(fields or {})))
        if severity in URGENT:
            self._wake.set()

    def record_action(self, actor: str, action: str, fields: Mapping[str, Any] | None = None) -> None:
        """An operator had something done: goes into the chain, and at once to the disk."""
        self._put(Action(self._wall(), self._monotonic(), _plain(actor), _plain(action), dict(fields or {})))
        self._wake.set()

    def record_energy(self, window: EnergyWindow) -> None:
        """A window of one device's energy that ends now."""
        self._put(Energy(self._wall(), self._monotonic(), window))

    def _put(self, item: Item) -> None:
        with self._lock:
            if len(self._queue) >= QUEUE_ITEMS:
                self._queue.popleft()
                self._lost(1)
            self._queue.append(item)

    def _lost(self, count: int) -> None:
        self._dropped += count
        self._untold += count

    @property
    def state(self) -> RecorderState:
        """How it is, now."""
        return RecorderState(
            *(self._problem, self._committed, self._dropped, self._pruned, self._refused, self._bytes),
            *(self._last_hash, self._committed_at_s, self._set_aside),
        )

    @property
    def is_anothers(self) -> bool:
        """Whether the file is another appliance's record, and tells nothing about this one."""
        return self._problem == ANOTHERS

    # --- life ---

    def start(self) -> None:
        """Begin. A file that cannot be opened is a problem that is shown and retried, never an error."""
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Commit what is queued, say goodbye in the file, and end the thread. May be called without `start`, and twice."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything recorded so far is on the disk; False if it is not by then."""
        with self._lock:
            target = self._committed + self._dropped + len(self._queue)
        self._wake.set()
        with self._idle:
            return self._idle.wait_for(lambda: self._committed + self._dropped >= target, timeout_s)

    def _run(self) -> None:
        try:
            while True:
                pause_s = self._turn()
                with self._idle:
                    self._idle.notify_all()
                if self._closing.is_set():
                    break
                self._wake.wait(pause_s)
                self._wake.clear()
        except Exception as error:
            # the thread's boundary: the recorder ends, serving does not
            self._problem = f"ended by a bug: {error}"
            log.exception("recorder.bug")
        finally:
            self._leave()

    def _turn(self) -> float:
        """Open if need be, commit what is queued; how long to wait for the next turn."""
        try:
            if self._writer is None:
                self._open()
            while self._commit():
                pass
        except sqlite3.Error as error:
            return self._failed(error)
        except OSError as error:
            self._trouble(str(error))
            return RETRY_S
        self._recovered()
        return COMMIT_INTERVAL_S

    def _open(self) -> None:
        self._take_lock()
        # what was opened anew, passed the check and failed again is damaged where the check does not look
        distrust = self._problem if self._damages >= 2 else ""
        writer = Writer(self.path, self._max_bytes, run_id=self.run_id, boot_id=self._boot_id, distrust=distrust)
        if writer.set_aside:
            self._tell_damage(writer.set_aside, writer.ended[1] or self._last_hash)
        try:
            crashed = writer.begin(self._wall(), self._monotonic(), known_hash=self._last_hash)
        except sqlite3.Error:
            writer.close()
            raise
        self._writer = writer
        self._make_ballast()
        if crashed is not None and crashed["run_id"] != self.run_id:
            kind = "daemon.crash" if crashed["same_boot"] else "daemon.power_lost"
            log.warning(kind, extra={"fields": crashed})
            self.record_event(kind, "error", crashed)

    def _tell_damage(self, reason: str, last_hash: str) -> None:
        """A file was set aside; a new chain of actions has begun, whose first entry says where the old one ended."""
        self._set_aside += 1
        fields = {"reason": reason, "last_hash": last_hash} if last_hash else {"reason": reason}
        log.error("recorder.damaged", extra={"fields": fields})
        self.record_event("recorder.damaged", "error", fields)

    def _take_lock(self) -> None:
        """One writer a file: a second appliance on it records nothing, and says so."""
        if self._own_lock is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(ANOTHERS) from None
        self._own_lock = descriptor

    def _commit(self) -> bool:
        """One batch; whether there was one."""
        assert self._writer is not None
        with self._lock:
            batch = [self._queue[index] for index in range(min(self._batch_items, len(self._queue)))]
        if not batch:
            return False
        lost = self._dropped
        self._writer.apply(batch)
        with self._lock:
            # what the queue dropped meanwhile was the oldest: part of this batch, and kept after all
            overtaken = min(self._dropped - lost, len(batch))
            self._dropped -= overtaken
            self._untold -= overtaken
            for _ in range(len(batch) - overtaken):
                self._queue.popleft()
            self._committed += len(batch)
        self._committed_at_s = self._monotonic()
        self._damages = 0
        self._batch_items = min(BATCH_ITEMS, self._batch_items * 2)
        pruned = self._writer.keep_within_budget()
        self._pruned += pruned
        self._bytes = self._writer.used_bytes
        self._refused = self._writer.series_refused
        if self._writer.last_hash != self._last_hash:
            self._last_hash = self._writer.last_hash
            log.info("audit.action", extra={"fields": {"hash": self._last_hash}})
        return True

    def _recovered(self) -> None:
        """Say what was lost while there was no room, once there is."""
        if self._problem and self._problem != "not started":
            log.warning("recorder.recovered", extra={"fields": {"problem": self._problem, "dropped": self._untold}})
            self.record_event("recorder.recovered", "warning", {"problem": self._problem, "dropped": self._untold})
            self._untold = 0
            self._make_ballast()
        self._problem = ""

    def _trouble(self, problem: str) -> None:
        if problem != self._problem:
            log.error("recorder.problem", extra={"fields": {"reason": problem}})
        self._problem = problem

    def _failed(self, error: sqlite3.Error) -> float:
        """Make room on a full disk, set a damaged file aside; how long to wait before the next try."""
        if self._writer is not None and is_full(error):
            self._trouble(f"no room: {error}")
            with contextlib.suppress(FileNotFoundError):
                self._ballast.unlink()
            self._batch_items = max(LEAST_BATCH_ITEMS, self._batch_items // 4)
            try:
                # what was rolled back still fills the WAL
                self._writer.shrink()
                self._pruned += (pruned := self._writer.drop_oldest())
            except sqlite3.Error:
                return RETRY_S
            return FREED_S if pruned else RETRY_S
        self._trouble(str(error))
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if not is_damage(error):
            return RETRY_S
        # opened anew it is checked, and set aside if it is what is wrong
        self._damages += 1
        return 0.0 if self._damages <= 2 else RETRY_S

    @property
    def _ballast(self) -> Path:
        return self.path.with_name(f"{self.path.name}.ballast")

    def _make_ballast(self) -> None:
        if self._ballast.exists():
            return
        try:
            with self._ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._ballast_bytes)
        except OSError:
            # no room for it is no room: the next full disk drops less gracefully
            with contextlib.suppress(OSError):
                self._ballast.unlink()

    def _leave(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.end()
            self._writer.close()
            self._writer = None
        if self._own_lock is not None:
            os.close(self._own_lock)
            self._own_lock = None
        with self._idle:
            self._idle.notify_all()


def _plain(text: str) -> str:
    """Text that a file takes, whatever a peer put into it."""
    return text[:200].encode("utf-8", "backslashreplace").decode()


def read_boot_id() -> str:
    """The kernel's name for this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
