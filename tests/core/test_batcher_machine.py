"""The batcher against a model of the whole world: workers, clock, clients. Every admitted request ends exactly once."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.core.batcher import Batcher, BatcherLimits, Dispatch, Entry, Expire, Fail, Supersede
from appliance.core.errors import ApplianceError
from appliance.core.states import RequestState

ENDED = {
    RequestState.COMPLETED,
    RequestState.FAILED,
    RequestState.EXPIRED,
    RequestState.SUPERSEDED,
    RequestState.CANCELLED,
}


class BatcherMachine(RuleBasedStateMachine):
    delay_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.limits = BatcherLimits(
            max_batch_size=8, coalesce_rows=4, max_queue_delay_s=self.delay_s, max_queue_size=12, max_queue_bytes=300
        )
        self.batcher = Batcher(self.limits)
        self.now = 100.0
        self.workers: dict[int, list[int]] = {}
        self.gone: set[int] = set()
        self.running: dict[int, Dispatch] = {}
        self.entries: list[Entry] = []
        self.endings: dict[int, list[str]] = {}
        self.runs: dict[int, int] = {}
        self.next_worker = 0
        self.next_key = 0

    # --- the world acts ---

    @rule()
    def a_worker_starts(self) -> None:
        if len(self.workers) < 3:
            self.batcher.add_worker(self.next_worker)
            self.workers[self.next_worker] = []
            self.next_worker += 1
            self.poll()

    @rule(
        rows=st.integers(0, 9),
        shape=st.sampled_from("ab"),
        priority=st.sampled_from([1, 8, 8, 8]),
        ttl=st.sampled_from([None, 0.005, 0.05]),
        stream=st.sampled_from(["", "", "s", "t"]),
        idempotent=st.sampled_from([True, True, False]),
        nbytes=st.integers(0, 60),
        poll=st.booleans(),
    )
    def a_request_comes(
        self,
        rows: int,
        shape: str,
        priority: int,
        ttl: float | None,
        stream: str,
        idempotent: bool,
        nbytes: int,
        poll: bool,
    ) -> None:
        self.next_key += 1
        made = Entry(
            key=self.next_key,
            shape_key=shape,
            rows=rows,
            nbytes=nbytes,
            priority=priority,
            deadline=math.inf if ttl is None else self.now + ttl,
            stream=stream,
            idempotent=idempotent,
            payload=None,
        )
        try:
            self.batcher.enqueue(made, self.now)
        except ApplianceError:
            assert made.state is RequestState.REJECTED
        else:
            self.entries.append(made)
            self.endings[made.key] = []
        if poll:
            self.poll()

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.004, 0.02]))
    def time_passes(self, seconds: float) -> None:
        """Never past a wake-up without a poll: that is the shell's promise."""
        self.poll()
        target = self.now + seconds
        while (wakeup := self.batcher.next_wakeup()) is not None and wakeup <= target:
            self.now = max(self.now, wakeup)
            self.poll()
        self.now = target

    @precondition(lambda self: self.running)
    @rule(data=st.data(), refused=st.sampled_from([False, False, False, True]))
    def a_batch_ends(self, data: st.DataObject, refused: bool) -> None:
        # a worker runs its batches in order
        firsts = [batches[0] for batches in self.workers.values() if batches] + [
            batch for batch, dispatch in self.running.items() if dispatch.worker in self.gone
        ]
        batch = data.draw(st.sampled_from(sorted(set(firsts))))
        dispatch = self.running.pop(batch)
        if dispatch.worker in self.workers:
            self.workers[dispatch.worker].remove(batch)
        results = (self.batcher.batch_failed if refused else self.batcher.batch_done)(batch, self.now)
        assert len(results) == len(dispatch.entries)
        for expected, result in zip(dispatch.entries, results, strict=True):
            if result is not None:
                assert result is expected, "results are positional"
                self.end(result, "FAILED" if refused else "COMPLETED")
        self.poll()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        for number, batch in enumerate(self.workers.pop(worker)):
            dispatch = self.running.pop(batch)
            for made in dispatch.entries:
                # what was staged has not run
                self.runs[made.key] -= number > 0
        self.batcher.worker_lost(worker, self.now)
        self.poll()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def a_worker_is_retired(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        self.batcher.remove_worker(worker)
        del self.workers[worker]
        self.gone.add(worker)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        made = data.draw(st.sampled_from(self.entries[-20:]))
        had_ended = bool(self.endings[made.key]) or made.state in ENDED
        assert self.batcher.cancel(made) is not had_ended
        if not had_ended:
            self.end(made, "CANCELLED")

    # --- what the batcher wants ---

    def poll(self) -> None:
        for action in self.batcher.poll(self.now):
            match action:
                case Dispatch():
                    self.dispatch(action)
                case Expire(made):
                    assert made.deadline <= self.now, "expired early"
                    self.end(made, "EXPIRED")
                case Supersede(made, newer):
                    assert made.stream == newer.stream != ""
                    assert made.seq < newer.seq
                    self.end(made, "SUPERSEDED")
                case Fail(made):
                    self.end(made, "FAILED")
        assert self.batcher.poll(self.now) == [], "a second poll at once finds nothing to do"
        wakeup = self.batcher.next_wakeup()
        assert wakeup is None or wakeup > self.now, "the shell would spin"
        alive = [made for made in self.entries if made.state not in ENDED]
        assert all(made.deadline > self.now for made in alive), "an expired request was not answered"
        self.nobody_idles_while_work_waits()

    def dispatch(self, action: Dispatch) -> None:
        assert action.worker in self.workers, "sent to a worker that is gone"
        assert action.batch not in self.running
        self.workers[action.worker].append(action.batch)
        assert len(self.workers[action.worker]) <= self.limits.in_flight_per_worker
        self.running[action.batch] = action
        assert len({made.shape_key for made in action.entries}) == 1
        assert action.rows == sum(made.rows for made in action.entries)
        assert action.rows <= (4 if len(action.entries) > 1 else 8)
        orders = [(made.priority, not made.alone, made.deadline, made.seq) for made in action.entries]
        assert orders == sorted(orders), "out of order"
        queued = [made for made in self.entries if made.state is RequestState.QUEUED]
        waiting = {made: (made.priority, not made.alone, made.deadline, made.seq) for made in queued}
        if self.limits.max_queue_delay_s == 0:
            assert all(orders[0] < order for order in waiting.values()), "the head of the order was passed over"
        same_shape = [order for made, order in waiting.items() if made.shape_key == action.entries[0].shape_key]
        assert not same_shape or orders[-1] < min(same_shape), "somebody of the same shape was overtaken"
        for made in action.entries:
            assert made.deadline > self.now, "an expired request was run"
            self.runs[made.key] = self.runs.get(made.key, 0) + 1
            assert self.runs[made.key] <= (2 if made.idempotent else 1), "run too often"
            if self.runs[made.key] == 2:
                assert len(action.entries) == 1, "a second run is alone"

    def end(self, made: Entry, how: str) -> None:
        self.endings[made.key].append(how)
        assert self.endings[made.key] == [how], f"ended twice: {self.endings[made.key]}"
        assert made.state == how

    def nobody_idles_while_work_waits(self) -> None:
        queued = [made for made in self.entries if made.state is RequestState.QUEUED]
        idle = [worker for worker, batches in self.workers.items() if not batches]
        if queued and idle:
            assert self.batcher.next_wakeup() is not None, "an idle worker waits for company without an end"
            oldest = min(made.enqueued_at for made in queued)
            assert self.now < oldest + self.limits.max_queue_delay_s + 1e-9, "waited longer than the delay"

    @invariant()
    def the_accounts_are_right(self) -> None:
        queued = [made for made in self.entries if made.state is RequestState.QUEUED]
        assert self.batcher.queued == len(queued) <= self.limits.max_queue_size + 8
        assert self.batcher.queued_bytes == sum(made.nbytes for made in queued)
        assert self.batcher.in_flight == sum(len(dispatch.entries) for dispatch in self.running.values())

    def teardown(self) -> None:
        """Let the world end: the model is unloaded, what runs ends, and everybody has had exactly one answer."""
        self.poll()
        self.batcher.fail_all(self.now)
        self.poll()
        for batch in list(self.running):
            assert set(self.batcher.batch_done(batch, self.now)) <= {None}
        assert self.batcher.idle
        assert self.batcher.queued == self.batcher.queued_bytes == self.batcher.in_flight == 0
        assert all(len(endings) == 1 for endings in self.endings.values()), self.endings


class DelayingBatcherMachine(BatcherMachine):
    delay_s = 0.01


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestDelayingBatcherMachine = DelayingBatcherMachine.TestCase
TestDelayingBatcherMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
