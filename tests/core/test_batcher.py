"""Examples of what the batcher decides, one rule a test. The whole of it is held by the state machine beside this file."""

from __future__ import annotations

import math
from typing import Any

import pytest

from appliance.core.batcher import Batcher, BatcherLimits, Dispatch, Entry, Expire, Fail, FailReason, Supersede
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.states import RequestState


def entry(key: int, **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "key": key,
        "shape_key": (),
        "rows": 1,
        "nbytes": 10,
        "priority": 8,
        "deadline": math.inf,
        "stream": "",
        "idempotent": True,
        "payload": None,
    }
    return Entry(**(values | changes))


def batcher(workers: int = 1, **limits: Any) -> Batcher:
    made = Batcher(BatcherLimits(**({"max_batch_size": 4} | limits)))
    for worker in range(workers):
        made.add_worker(worker)
    return made


def keys(action: Any) -> list[int]:
    assert isinstance(action, Dispatch)
    return [item.key for item in action.entries]


def test_an_idle_worker_takes_what_is_queued_at_once() -> None:
    b = batcher()
    b.enqueue(entry(1), 0.0)
    b.enqueue(entry(2), 0.0)
    [action] = b.poll(0.0)
    assert keys(action) == [1, 2]
    assert (action.rows, action.worker) == (2, 0)
    assert b.poll(0.0) == []


def test_a_second_batch_is_staged_only_when_half_a_batch_waits() -> None:
    b = batcher()
    b.enqueue(entry(1), 0.0)
    [first] = b.poll(0.0)
    b.enqueue(entry(2), 0.0)
    assert b.poll(0.0) == []
    b.enqueue(entry(3), 0.0)
    [staged] = b.poll(0.0)
    assert keys(staged) == [2, 3]
    for key in range(4, 10):
        b.enqueue(entry(key), 0.0)
    assert b.poll(0.0) == [], "two batches in flight are enough for one worker"
    assert [item.key for item in b.batch_done(first.batch, 1.0) if item] == [1]
    [third] = b.poll(1.0)
    assert keys(third) == [4, 5, 6, 7]


def test_priority_goes_before_deadline_and_deadline_before_arrival() -> None:
    b = batcher(max_batch_size=1)
    b.enqueue(entry(1), 0.0)
    b.enqueue(entry(2, deadline=5.0), 0.0)
    b.enqueue(entry(3, deadline=4.0), 0.0)
    b.enqueue(entry(4, priority=1), 0.0)
    order = []
    for _ in range(2):
        for action in b.poll(0.0):
            order += keys(action)
            b.batch_done(action.batch, 0.0)
    assert order == [4, 3, 2, 1]


def test_only_equal_shapes_share_a_batch() -> None:
    b = batcher(workers=2)
    b.enqueue(entry(1, shape_key="a"), 0.0)
    b.enqueue(entry(2, shape_key="b"), 0.0)
    b.enqueue(entry(3, shape_key="a"), 0.0)
    assert [keys(action) for action in b.poll(0.0)] == [[1, 3], [2]]


def test_the_head_s_shape_goes_first_however_many_wait_with_another() -> None:
    b = batcher()
    b.enqueue(entry(1, shape_key="a"), 0.0)
    for key in (2, 3, 4):
        b.enqueue(entry(key, shape_key="b"), 0.0)
    assert [keys(action) for action in b.poll(0.0)] == [[1], [2, 3, 4]]


def test_rows_never_exceed_the_batch_and_nobody_overtakes_the_one_that_does_not_fit() -> None:
    b = batcher()
    b.enqueue(entry(1, rows=2), 0.0)
    b.enqueue(entry(2, rows=3), 0.0)
    b.enqueue(entry(3, rows=1), 0.0)
    first, second = b.poll(0.0)
    assert (keys(first), first.rows) == ([1], 2)
    assert (keys(second), second.rows) == ([2, 3], 4)


def test_a_request_larger_than_what_pays_runs_by_itself() -> None:
    b = batcher(max_batch_size=8, coalesce_rows=2)
    b.enqueue(entry(1, rows=7), 0.0)
    b.enqueue(entry(2), 0.0)
    first, second = b.poll(0.0)
    assert (keys(first), keys(second)) == ([1], [2])


def test_a_request_larger_than_the_batch_is_refused_with_both_numbers() -> None:
    b = batcher()
    with pytest.raises(ApplianceError, match="1 to 4 rows, 5 came") as caught:
        b.enqueue(entry(1, rows=5), 0.0)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize("limits", [{"max_queue_size": 2}, {"max_queue_bytes": 25}])
def test_a_full_queue_refuses_with_a_time_to_wait(limits: dict[str, int]) -> None:
    b = batcher(workers=0, **limits)
    b.enqueue(entry(1), 0.0)
    b.enqueue(entry(2), 0.0)
    refused = entry(3)
    with pytest.raises(ApplianceError) as caught:
        b.enqueue(refused, 0.0)
    assert caught.value.code is ErrorCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s is not None
    assert refused.state is RequestState.REJECTED
    assert (b.queued, b.queued_bytes) == (2, 20)


def test_one_request_larger_than_the_byte_limit_still_runs_on_an_empty_queue() -> None:
    b = batcher(max_queue_bytes=5)
    b.enqueue(entry(1, nbytes=10), 0.0)
    assert keys(b.poll(0.0)[0]) == [1]


def test_a_queued_request_expires_at_its_deadline_and_not_before() -> None:
    b = batcher(workers=0)
    b.enqueue(entry(1, deadline=2.0), 0.0)
    assert b.next_wakeup() == 2.0
    assert b.poll(1.999) == []
    [action] = b.poll(2.0)
    assert isinstance(action, Expire)
    assert (action.entry.key, action.was_dispatched) == (1, False)
    assert (b.queued, b.queued_bytes, b.next_wakeup(), b.idle) == (0, 0, None, True)


def test_a_running_request_expires_too_and_its_result_is_dropped() -> None:
    b = batcher()
    b.enqueue(entry(1, deadline=2.0), 0.0)
    b.enqueue(entry(2), 0.0)
    [dispatch] = b.poll(0.0)
    [action] = b.poll(3.0)
    assert isinstance(action, Expire)
    assert action.was_dispatched
    assert [item and item.key for item in b.batch_done(dispatch.batch, 4.0)] == [None, 2]


def test_a_newer_frame_supersedes_the_queued_one_but_not_the_running_one() -> None:
    b = batcher()
    b.enqueue(entry(1, stream="cam"), 0.0)
    [running] = b.poll(0.0)
    b.enqueue(entry(2, stream="cam"), 0.0)
    b.enqueue(entry(3, stream="cam"), 0.0)
    b.enqueue(entry(4, stream="other"), 0.0)
    supersede, staged = b.poll(0.0)
    assert isinstance(supersede, Supersede)
    assert (supersede.entry.key, supersede.by.key) == (2, 3)
    assert keys(staged) == [3, 4]
    assert [item and item.key for item in b.batch_done(running.batch, 0.0)] == [1]


def test_superseding_makes_room_in_a_full_queue() -> None:
    b = batcher(workers=0, max_queue_size=1)
    b.enqueue(entry(1, stream="cam"), 0.0)
    b.enqueue(entry(2, stream="cam"), 0.0)
    assert b.queued == 1


@pytest.mark.parametrize("when", ["queued", "running", "ended"])
def test_cancelling_disturbs_nobody_else(when: str) -> None:
    b = batcher()
    first, second = entry(1), entry(2)
    b.enqueue(first, 0.0)
    b.enqueue(second, 0.0)
    if when == "queued":
        assert b.cancel(first)
        [dispatch] = b.poll(0.0)
        assert keys(dispatch) == [2]
    else:
        [dispatch] = b.poll(0.0)
    if when == "running":
        assert b.cancel(first)
    done = b.batch_done(dispatch.batch, 1.0)
    if when == "ended":
        assert not b.cancel(first)
    assert not b.cancel(first)
    assert second in done
    assert second.state is RequestState.COMPLETED
    assert b.idle


def test_waiting_for_company_ends_when_the_batch_is_full_or_the_delay_is_over() -> None:
    b = batcher(max_queue_delay_s=0.010)
    b.enqueue(entry(1), 1.0)
    assert b.poll(1.0) == []
    assert b.next_wakeup() == pytest.approx(1.010)
    b.enqueue(entry(2), 1.005)
    assert b.poll(1.009) == []
    [action] = b.poll(1.010)
    assert keys(action) == [1, 2]
    b.batch_done(action.batch, 1.011)
    for key in range(3, 7):
        b.enqueue(entry(key), 1.020)
    assert keys(b.poll(1.020)[0]) == [3, 4, 5, 6]


def test_a_deadline_is_not_risked_by_waiting_for_company() -> None:
    b = batcher(max_queue_delay_s=0.010)
    b.enqueue(entry(1, deadline=1.015), 1.0)
    assert b.poll(1.0) == []
    assert b.next_wakeup() == pytest.approx(1.005)
    assert keys(b.poll(1.005)[0]) == [1]


def test_the_requests_of_a_lost_worker_run_once_more_each_alone() -> None:
    b = batcher(workers=2)
    b.enqueue(entry(1), 0.0)
    b.enqueue(entry(2), 0.0)
    [dispatch] = b.poll(0.0)
    b.worker_lost(dispatch.worker, 1.0)
    first, second = b.poll(1.0)
    assert [keys(first), keys(second)] == [[1], [2]]
    assert first.worker == second.worker != dispatch.worker
    assert b.batch_done(first.batch, 2.0)[0] is not None


def test_nobody_joins_a_second_run() -> None:
    b = batcher()
    b.enqueue(entry(1), 0.0)
    b.poll(0.0)
    b.enqueue(entry(2), 0.0)
    b.worker_lost(0, 0.0)
    b.add_worker(1)
    first = b.poll(0.0)[0]
    assert keys(first) == [1]


def test_what_was_staged_behind_a_deadly_batch_is_not_to_blame() -> None:
    b = batcher(workers=1)
    for key in range(1, 7):
        b.enqueue(entry(key, idempotent=key != 6), 0.0)
    running, staged = b.poll(0.0)
    assert (keys(running), keys(staged)) == ([1, 2, 3, 4], [5, 6])
    b.worker_lost(0, 0.0)
    b.add_worker(1)
    first, second = b.poll(0.0)
    assert (keys(first), keys(second)) == ([1], [2])
    for batch in (first, second):
        b.batch_done(batch.batch, 0.0)
    third, fourth = b.poll(0.0)
    assert (keys(third), keys(fourth)) == ([3], [4])
    b.batch_done(third.batch, 0.0)
    b.batch_done(fourth.batch, 0.0)
    assert keys(b.poll(0.0)[0]) == [5, 6]


def test_a_request_whose_worker_dies_twice_fails() -> None:
    b = batcher(workers=2)
    b.enqueue(entry(1), 0.0)
    for worker in (0, 1):
        [dispatch] = b.poll(0.0)
        assert dispatch.worker == worker
        b.worker_lost(worker, 0.0)
    [action] = b.poll(0.0)
    assert isinstance(action, Fail)
    assert action.reason is FailReason.WORKER_LOST
    assert b.idle


def test_a_request_that_must_not_run_twice_fails_with_its_worker() -> None:
    b = batcher(workers=2)
    b.enqueue(entry(1, idempotent=False), 0.0)
    b.poll(0.0)
    b.worker_lost(0, 0.0)
    [action] = b.poll(0.0)
    assert isinstance(action, Fail)


def test_a_refused_batch_of_several_is_run_one_by_one_so_that_the_guilty_fails_alone() -> None:
    b = batcher()
    for key in (1, 2):
        b.enqueue(entry(key), 0.0)
    [dispatch] = b.poll(0.0)
    assert b.batch_failed(dispatch.batch, 0.0) == (None, None)
    first, second = b.poll(0.0)
    assert [keys(first), keys(second)] == [[1], [2]]
    [guilty] = b.batch_failed(first.batch, 0.0)
    assert guilty is not None
    assert guilty.state is RequestState.FAILED
    [innocent] = b.batch_done(second.batch, 0.0)
    assert innocent is not None
    assert innocent.key == 2


def test_a_rerun_frame_gives_way_to_a_newer_one_of_its_stream() -> None:
    b = batcher(workers=1)
    b.enqueue(entry(1, stream="cam"), 0.0)
    b.poll(0.0)
    b.enqueue(entry(2, stream="cam"), 0.0)
    b.worker_lost(0, 0.0)
    [action] = b.poll(0.0)
    assert isinstance(action, Supersede)
    assert (action.entry.key, action.by.key) == (1, 2)


def test_when_the_model_goes_everything_fails_once() -> None:
    b = batcher()
    for key in range(6):
        b.enqueue(entry(key), 0.0)
    dispatches = b.poll(0.0)
    b.fail_all(1.0)
    failed = sorted(action.entry.key for action in b.poll(1.0) if isinstance(action, Fail))
    assert failed == list(range(6))
    for dispatch in dispatches:
        assert set(b.batch_done(dispatch.batch, 2.0)) == {None}
    assert b.idle


def test_equally_free_workers_take_turns() -> None:
    b = batcher(workers=3, max_batch_size=1)
    order = []
    for key in range(6):
        b.enqueue(entry(key), 0.0)
        [action] = b.poll(0.0)
        order.append(action.worker)
        b.batch_done(action.batch, 0.0)
    assert order == [0, 1, 2, 0, 1, 2]


def test_a_removed_worker_gets_nothing_more_but_may_still_answer() -> None:
    b = batcher()
    b.enqueue(entry(1), 0.0)
    [dispatch] = b.poll(0.0)
    b.remove_worker(0)
    b.enqueue(entry(2), 0.0)
    assert b.poll(0.0) == []
    assert b.batch_done(dispatch.batch, 0.0)[0] is not None


def test_an_unknown_batch_is_our_bug() -> None:
    with pytest.raises(KeyError):
        batcher().batch_done(7, 0.0)


def test_the_dead_do_not_pile_up() -> None:
    b = batcher(workers=0)
    b.enqueue(entry(0), 0.0)
    for key in range(1, 5000):
        b.enqueue(entry(key, stream="cam", deadline=1e6 + key), 0.0)
        b.poll(0.0)
    held = sum(len(heap) for heap in b._heaps.values())
    assert held <= 2 * b.queued + 66
    assert len(b._deadlines) <= 2 * b.queued + 66


def test_many_shapes_leave_nothing_behind() -> None:
    b = batcher()
    for key in range(1000):
        b.enqueue(entry(key, shape_key=key), 0.0)
        [action] = b.poll(0.0)
        b.batch_done(action.batch, 0.0)
    assert len(b._heaps) <= 66
