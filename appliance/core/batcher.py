"""The batcher of one model version: requests in, actions out. Order, batches, expiry and superseding are decided here alone.

Pure: `now` (monotonic seconds) is an argument, actions are values. Driven by `scheduling.scheduler`: feed it, then
`for action in poll(now)`, then sleep until `next_wakeup()`.

The invariant: every admitted entry ends exactly once, as COMPLETED, FAILED, EXPIRED, SUPERSEDED or CANCELLED. An entry's state is
changed here and nowhere else, and every ending leaves by exactly one way out: `batch_done` and `batch_failed` (their results),
`cancel` (its True) or an `Expire`, `Supersede` or `Fail` of `poll`.

Order is priority, then earliest deadline, then arrival. The head of the order decides which shapes share a batch; others of that
shape follow in order while their rows fit. An idle worker takes what there is; a busy one is handed a second, staged batch only
when it is worth having, so that batches form while it is busy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from enum import StrEnum
from typing import Any, TypeAlias

import msgspec

from appliance.core.errors import ApplianceError, ErrorCode, invalid
from appliance.core.states import RequestState

QUEUED = RequestState.QUEUED
DISPATCHED = RequestState.DISPATCHED

MAX_ATTEMPTS = 2
"""A request whose worker died runs once more, alone; then it has had its chance."""

FULL_QUEUE_RETRY_S = 0.05
"""What a client is told to wait when the queue is full."""

COMPACT_AT = 64
"""Entries that ended while queued stay in the heap until they outnumber the living, and at least so many."""


class Entry:
    """One admitted request. The shell makes it and reads it; only the batcher changes it."""

    __slots__ = (
        "alone",
        "attempts",
        "deadline",
        "dispatched_at",
        "enqueued_at",
        "idempotent",
        "key",
        "nbytes",
        "payload",
        "priority",
        "rows",
        "seq",
        "shape_key",
        "state",
        "stream",
    )

    def __init__(
        self,
        *,
        key: int,
        shape_key: Hashable,
        rows: int,
        nbytes: int,
        priority: int,
        deadline: float,
        stream: str,
        idempotent: bool,
        payload: Any,
    ) -> None:
        self.key = key
        self.shape_key = shape_key
        self.rows = rows
        self.nbytes = nbytes
        self.priority = priority
        self.deadline = deadline
        self.stream = stream
        self.idempotent = idempotent
        self.payload = payload
        self.state = RequestState.RECEIVED
        self.enqueued_at = 0.0
        self.dispatched_at = 0.0
        self.attempts = 0
        self.seq = 0
        self.alone = False


class BatcherLimits(msgspec.Struct, frozen=True):
    """What may be queued and gathered. Zero for `coalesce_rows` means `max_batch_size`; for `stage_rows`, half of that; for
    `max_batches`, no limit to the batches running or staged on all workers together.
    """

    max_batch_size: int
    coalesce_rows: int = 0
    max_queue_delay_s: float = 0.0
    max_queue_size: int = 1024
    max_queue_bytes: int = 256 << 20
    stage_rows: int = 0
    in_flight_per_worker: int = 2
    max_batches: int = 0


class FailReason(StrEnum):
    """Why an entry may not go on."""

    WORKER_LOST = "WORKER_LOST"
    MODEL_GONE = "MODEL_GONE"


class Dispatch(msgspec.Struct, frozen=True, gc=False):
    """Run these entries, in this order, as one batch of `rows` rows on that worker."""

    worker: int
    batch: int
    entries: tuple[Entry, ...]
    rows: int


class Expire(msgspec.Struct, frozen=True):
    """The entry's deadline has passed; `was_dispatched` if it was running."""

    entry: Entry
    was_dispatched: bool


class Supersede(msgspec.Struct, frozen=True):
    """A newer entry of the same stream took the queued one's place."""

    entry: Entry
    by: Entry


class Fail(msgspec.Struct, frozen=True):
    """The entry cannot be answered."""

    entry: Entry
    reason: FailReason


Action: TypeAlias = Dispatch | Expire | Supersede | Fail

_Item: TypeAlias = tuple[int, int, float, int, Entry]


class Batcher:
    """See the module. Nothing here is thread-safe; one loop owns it."""

    def __init__(self, limits: BatcherLimits) -> None:
        self.queued = 0
        self.queued_bytes = 0
        self.in_flight = 0
        self._seq = 0
        self._next_batch = 0
        self._heaps: dict[Hashable, list[_Item]] = {}
        self._queued_rows: dict[Hashable, int] = {}
        self._dead = 0
        self._deadlines: list[tuple[float, int, Entry]] = []
        self._streams: dict[str, Entry] = {}
        self._workers: dict[int, list[int]] = {}
        self._batches: dict[int, tuple[int, tuple[Entry, ...]]] = {}
        self._actions: list[Action] = []
        self._delay_until = math.inf
        self.set_limits(limits)

    def set_limits(self, limits: BatcherLimits) -> None:
        """New limits for what comes; what is queued stays."""
        self.limits = limits
        self._rows = limits.coalesce_rows or limits.max_batch_size
        self._stage_rows = limits.stage_rows or max(1, self._rows // 2)

    @property
    def idle(self) -> bool:
        """Nothing queued, nothing running, nothing to be said."""
        return not (self.queued or self.in_flight or self._actions)

    def add_worker(self, worker: int) -> None:
        """A worker that can take batches."""
        self._workers[worker] = []

    def remove_worker(self, worker: int) -> None:
        """No more batches to it. Those it has still end by `batch_done`, `batch_failed` or `worker_lost`."""
        self._workers.pop(worker, None)

    def enqueue(self, entry: Entry, now: float) -> None:
        """Admit an entry. RESOURCE_EXHAUSTED if the queue is full, INVALID_ARGUMENT if it can never fit a batch."""
        limits = self.limits
        if not 0 < entry.rows <= limits.max_batch_size:
            entry.state = RequestState.REJECTED
            raise invalid(f"a request may have 1 to {limits.max_batch_size} rows, {entry.rows} came; split it")
        superseded = self._streams.get(entry.stream) if entry.stream else None
        freed, freed_bytes = (1, superseded.nbytes) if superseded is not None else (0, 0)
        if self.queued - freed >= limits.max_queue_size:
            entry.state = RequestState.REJECTED
            raise ApplianceError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"Exceeds maximum queue size: {self.queued} requests are waiting, {limits.max_queue_size} may",
                retry_after_s=FULL_QUEUE_RETRY_S,
            )
        if self.queued_bytes - freed_bytes + entry.nbytes > limits.max_queue_bytes and self.queued > freed:
            entry.state = RequestState.REJECTED
            raise ApplianceError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"{self.queued_bytes} bytes are waiting, {limits.max_queue_bytes} may",
                retry_after_s=FULL_QUEUE_RETRY_S,
            )
        if superseded is not None:
            self._leave_queue(superseded, RequestState.SUPERSEDED)
            self._actions.append(Supersede(superseded, entry))
        self._seq += 1
        entry.seq = self._seq
        entry.enqueued_at = now
        if entry.stream:
            self._streams[entry.stream] = entry
        self._push(entry)
        if entry.deadline != math.inf:
            heapq.heappush(self._deadlines, (entry.deadline, entry.seq, entry))
            if len(self._deadlines) > 2 * (self.queued + self.in_flight) + COMPACT_AT:
                self._deadlines = [item for item in self._deadlines if item[2].state in (QUEUED, DISPATCHED)]
                heapq.heapify(self._deadlines)

    def _push(self, entry: Entry) -> None:
        entry.state = QUEUED
        self.queued += 1
        self.queued_bytes += entry.nbytes
        key = entry.shape_key
        heap = self._heaps.get(key)
        if heap is None:
            heap = self._heaps[key] = []
            self._queued_rows[key] = 0
        self._queued_rows[key] += entry.rows
        heapq.heappush(heap, (entry.priority, 0 if entry.alone else 1, entry.deadline, entry.seq, entry))

    def _leave_queue(self, entry: Entry, state: RequestState) -> None:
        """Out of the queue's accounts; its place in the heap is dead."""
        assert entry.state is QUEUED, entry.state
        entry.state = state
        self.queued -= 1
        self.queued_bytes -= entry.nbytes
        self._queued_rows[entry.shape_key] -= entry.rows
        if entry.stream and self._streams.get(entry.stream) is entry:
            del self._streams[entry.stream]
        self._dead += 1
        if self._dead >= COMPACT_AT and self._dead > self.queued:
            self._compact()

    def _compact(self) -> None:
        for key in list(self._heaps):
            live = [item for item in self._heaps[key] if item[4].state is QUEUED]
            if live:
                heapq.heapify(live)
                self._heaps[key] = live
            else:
                del self._heaps[key], self._queued_rows[key]
        self._dead = 0

    def cancel(self, entry: Entry) -> bool:
        """End an entry whose caller is gone. True if it had not ended; nobody else in its batch notices."""
        if entry.state is QUEUED:
            self._leave_queue(entry, RequestState.CANCELLED)
            return True
        if entry.state is DISPATCHED:
            entry.state = RequestState.CANCELLED
            return True
        return False

    def batch_done(self, batch: int, now: float) -> tuple[Entry | None, ...]:
        """The batch has run: its entries in order, COMPLETED, with None for those that ended meanwhile. KeyError if unknown."""
        return self._finish(batch, RequestState.COMPLETED)

    def batch_failed(self, batch: int, now: float) -> tuple[Entry | None, ...]:
        """The engine refused the batch. A single entry is given back, FAILED; of several, each runs once more, alone, if it may.

        As `batch_done`, with None also for those that are queued again.
        """
        _, entries = self._batches[batch]
        if len(entries) == 1:
            return self._finish(batch, RequestState.FAILED)
        self._forget(batch)
        ended: list[Entry | None] = []
        for entry in entries:
            if entry.state is not DISPATCHED:
                ended.append(None)
            elif entry.idempotent and entry.attempts < MAX_ATTEMPTS:
                self._again(entry)
                ended.append(None)
            else:
                entry.state = RequestState.FAILED
                ended.append(entry)
        return tuple(ended)

    def _finish(self, batch: int, state: RequestState) -> tuple[Entry | None, ...]:
        entries = self._forget(batch)
        found: list[Entry | None] = []
        for entry in entries:
            if entry.state is DISPATCHED:
                entry.state = state
                found.append(entry)
            else:
                found.append(None)
        return tuple(found)

    def _forget(self, batch: int) -> tuple[Entry, ...]:
        worker, entries = self._batches.pop(batch)
        self.in_flight -= len(entries)
        batches = self._workers.get(worker)
        if batches is not None:
            batches.remove(batch)
        return entries

    def _again(self, entry: Entry, *, alone: bool = True) -> None:
        """Back into the queue; to be run alone, ahead of others of its priority, if it may be to blame."""
        entry.alone = alone
        self._push(entry)
        if not entry.stream:
            return
        other = self._streams.get(entry.stream)
        if other is None:
            self._streams[entry.stream] = entry
            return
        # both may come from the same lost worker, in any order: the newer one stays
        older, newer = (entry, other) if entry.seq < other.seq else (other, entry)
        self._streams[entry.stream] = newer
        self._leave_queue(older, RequestState.SUPERSEDED)
        self._actions.append(Supersede(older, newer))

    def worker_lost(self, worker: int, now: float) -> None:
        """The worker is gone. What it ran runs once more, alone, elsewhere, if it may; otherwise it fails or expires.

        What was staged behind that has not run: it goes back into the queue as if nothing had been.
        """
        self._workers.pop(worker, None)
        # batches are numbered as they are dispatched, and a worker runs them in that order
        for number, batch in enumerate(sorted(batch for batch, (owner, _) in self._batches.items() if owner == worker)):
            for entry in self._forget(batch):
                if entry.state is not DISPATCHED:
                    continue
                if entry.deadline <= now:
                    entry.state = RequestState.EXPIRED
                    self._actions.append(Expire(entry, True))
                elif number > 0:
                    entry.attempts -= 1
                    self._again(entry, alone=entry.alone)
                elif entry.idempotent and entry.attempts < MAX_ATTEMPTS:
                    self._again(entry)
                else:
                    entry.state = RequestState.FAILED
                    self._actions.append(Fail(entry, FailReason.WORKER_LOST))

    def fail_all(self, now: float) -> None:
        """The model goes away: everything queued or running fails at the next poll."""
        for heap in list(self._heaps.values()):
            for item in sorted(heap):
                if item[4].state is QUEUED:
                    self._leave_queue(item[4], RequestState.FAILED)
                    self._actions.append(Fail(item[4], FailReason.MODEL_GONE))
        for _, entries in self._batches.values():
            for entry in entries:
                if entry.state is DISPATCHED:
                    entry.state = RequestState.FAILED
                    self._actions.append(Fail(entry, FailReason.MODEL_GONE))

    def poll(self, now: float) -> list[Action]:
        """What is to be done now. An early or needless call is harmless."""
        deadlines = self._deadlines
        if deadlines and deadlines[0][0] <= now:
            self._expire(now)
        actions, self._actions = self._actions, []
        self._delay_until = math.inf
        while self.queued:
            dispatch = self._next_dispatch(now)
            if dispatch is None:
                break
            actions.append(dispatch)
        return actions

    def _expire(self, now: float) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            entry = heapq.heappop(deadlines)[2]
            if entry.state is QUEUED:
                self._leave_queue(entry, RequestState.EXPIRED)
                self._actions.append(Expire(entry, False))
            elif entry.state is DISPATCHED:
                entry.state = RequestState.EXPIRED
                self._actions.append(Expire(entry, True))

    def _next_dispatch(self, now: float) -> Dispatch | None:
        """The next batch, if a worker should have one now."""
        worker = self._freest()
        if worker is None:
            return None
        busy = bool(self._workers[worker])
        for head in self._heads():
            if head.alone:
                return self._gather(worker, head, now)
            rows = min(self._queued_rows[head.shape_key], self._rows)
            if busy:
                # what is staged must be worth it, and be the head: others get their turn when the worker is free
                return self._gather(worker, head, now) if rows >= self._stage_rows else None
            if not self._waits(head, rows, now):
                return self._gather(worker, head, now)
        return None

    def _freest(self) -> int | None:
        """The worker with the fewest batches, of equals the one that waits longest (dicts keep order; see `_gather`)."""
        best = None
        fewest = self.limits.in_flight_per_worker
        if 0 < self.limits.max_batches <= len(self._batches):
            return None
        for worker, batches in self._workers.items():
            if len(batches) < fewest:
                best, fewest = worker, len(batches)
        return best

    def _heads(self) -> list[Entry]:
        """The first entry of each shape, in the order."""
        heads: list[_Item] = []
        empty: list[Hashable] = []
        for key, heap in self._heaps.items():
            while heap and heap[0][4].state is not QUEUED:
                heapq.heappop(heap)
                self._dead -= 1
            if heap:
                heads.append(heap[0])
            else:
                empty.append(key)
        if len(self._heaps) > COMPACT_AT:
            for key in empty:
                del self._heaps[key], self._queued_rows[key]
        if len(heads) > 1:
            heads.sort()
        return [item[4] for item in heads]

    def _waits(self, head: Entry, rows: int, now: float) -> bool:
        """Whether an idle worker should wait for company; remembers until when."""
        delay = self.limits.max_queue_delay_s
        if delay <= 0 or rows >= self._rows:
            return False
        oldest = min(item[4].enqueued_at for item in self._heaps[head.shape_key] if item[4].state is QUEUED)
        until = min(oldest + delay, head.deadline - delay)
        if until <= now:
            return False
        self._delay_until = min(self._delay_until, until)
        return True

    def _gather(self, worker: int, head: Entry, now: float) -> Dispatch:
        heap = self._heaps[head.shape_key]
        chosen: list[Entry] = []
        rows = 0
        while heap:
            entry = heap[0][4]
            if entry.state is not QUEUED:
                heapq.heappop(heap)
                self._dead -= 1
                continue
            if chosen and (entry.alone or rows + entry.rows > self._rows):
                break
            heapq.heappop(heap)
            entry.state = DISPATCHED
            entry.dispatched_at = now
            entry.attempts += 1
            self.queued_bytes -= entry.nbytes
            if entry.stream and self._streams.get(entry.stream) is entry:
                del self._streams[entry.stream]
            rows += entry.rows
            chosen.append(entry)
            if entry.alone or rows >= self._rows:
                break
        count = len(chosen)
        self.queued -= count
        self.in_flight += count
        self._queued_rows[head.shape_key] -= rows
        batch = self._next_batch
        self._next_batch += 1
        entries = tuple(chosen)
        self._batches[batch] = (worker, entries)
        # to the end of the line, so that equally free workers take turns
        batches = self._workers.pop(worker)
        batches.append(batch)
        self._workers[worker] = batches
        return Dispatch(worker, batch, entries, rows)

    def next_wakeup(self) -> float | None:
        """When `poll` must be called again if nothing else happens; None if never."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][2].state not in (QUEUED, DISPATCHED):
            heapq.heappop(deadlines)
        soonest = min(deadlines[0][0] if deadlines else math.inf, self._delay_until)
        return None if soonest == math.inf else soonest
