"""The shell of `core.batcher` for one model version: waiters, one timer, workers.

It carries out what the batcher decides: writes batches to instances, splits their answers, ends each waiter exactly once. It
decides neither order nor batches, and knows no transport. Driven by `service` (submit, cancel), by the instances (answers,
losses) and by its timer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from appliance.core.admission import Admission, Fitted
from appliance.core.assembly import Place, SlotLayout, split_rows
from appliance.core.batcher import Batcher, BatcherLimits, Dispatch, Entry, Expire, Fail, Supersede
from appliance.core.classification import classify
from appliance.core.description import BatchStatistic, DurationStatistic, ModelStatistics
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.histogram import bucket
from appliance.core.manifest import ModelManifest
from appliance.core.memory_budget import HOST
from appliance.core.request import InferenceRequest, InferenceResponse, Timing
from appliance.core.tensor import Tensor
from appliance.core.thermal import OPEN
from appliance.observability.requests import RequestLog
from appliance.scheduling.governor import Governor
from appliance.workers.link import SLOTS, Instance, WorkerLink
from appliance.workers.messages import Done

Outcome: TypeAlias = InferenceResponse | ApplianceError
DoneCallback: TypeAlias = Callable[[Outcome], None]

TIMER_GRAIN_S = 0.001
"""Event loops round timers to about a millisecond; arming less would spin. An early poll is harmless."""

POLLED_SHARE = 0.25
"""A run is awaited by polling if it is expected to take at most this share of the poll. Longer ones carry larger messages on the
whole, and whoever moves those needs the core more (measured with 1.2 MB: a quarter more answers without)."""

GAIN = 0.97
"""A larger batch pays if its time per row is at most this share of the smaller one's."""


class Job:
    """What the batcher carries along for the shell: the request, as fitted, and who waits for it."""

    __slots__ = ("done", "fitted", "received", "request", "scheduler")

    def __init__(
        self, scheduler: Scheduler, request: InferenceRequest, fitted: Fitted, done: DoneCallback, received: float
    ) -> None:
        self.scheduler = scheduler
        self.request = request
        self.fitted = fitted
        self.done = done
        self.received = received

    def release(self) -> None:
        """It has ended: let go of the tensors, and of the waiter, which holds this job by its ticket.

        That circle would keep every request's memory until the garbage collector comes by, and each new message would need
        fresh pages: ten times the cost for camera frames.
        """
        del self.request, self.fitted, self.done


def paying_sizes(batch_s: dict[int, float]) -> tuple[int, ...]:
    """The batch sizes worth waiting for, from seconds per batch: each is faster per row than every smaller one that pays."""
    chosen: list[int] = []
    best = math.inf
    for rows in sorted(batch_s):
        per_row = batch_s[rows] / rows
        if per_row <= best * GAIN:
            chosen.append(rows)
            best = per_row
    return tuple(chosen)


class Scheduler:
    """One model version's queue and its workers."""

    def __init__(
        self,
        layout: SlotLayout,
        manifest: ModelManifest,
        statistics: ModelStatistics,
        labels: Sequence[str],
        *,
        on_instance_lost: Callable[[Instance, str], None],
        on_idle: Callable[[], None],
        governor: Governor | None = None,
        device: str = HOST,
    ) -> None:
        self.layout = layout
        self.statistics = statistics
        self.instances: dict[int, Instance] = {}
        self._manifest = manifest
        self._labels = labels
        self._log = RequestLog("request.failed")
        self._on_instance_lost = on_instance_lost
        self._on_idle = on_idle
        self._admission = Admission(layout)
        self._governor = governor
        self._device = device
        self._paying_rows = 0
        self._batcher = Batcher(self._limits())
        self._end_gates = governor.subscribe(self._gates_changed) if governor is not None else None
        self._dispatched: dict[int, Dispatch] = {}
        self._answers: list[tuple[Job, Outcome]] = []
        self._loop = asyncio.get_running_loop()
        self._pump_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._budget_timer: asyncio.TimerHandle | None = None
        self._budget_s = manifest.worker.run_budget_ms / 1000
        self._busy_poll_s = manifest.worker.busy_poll_us / 1e6
        self._expected_s = 0.0
        self._polled: WorkerLink | None = None
        self._key = 0
        self._retiring: dict[int, asyncio.Future[None]] = {}

    def _limits(self) -> BatcherLimits:
        """What the manifest says, the sizes that pay, and what heat leaves of both."""
        batching = self._manifest.batching
        gates = self._governor.gates if self._governor is not None else OPEN
        narrowed = gates.concurrency < 1
        rows = self._paying_rows or self.layout.max_rows
        return BatcherLimits(
            max_batch_size=self.layout.max_rows,
            coalesce_rows=max(1, int(rows * gates.batch_growth)),
            in_flight_per_worker=1 if narrowed else SLOTS,
            max_batches=max(1, int(len(self.instances) * gates.concurrency)) if narrowed else 0,
            max_queue_delay_s=batching.max_queue_delay_ms / 1000,
            max_queue_size=batching.max_queue_size,
            max_queue_bytes=batching.max_queue_bytes,
        )

    def add_instance(self, instance: Instance) -> None:
        """Feed this instance from now on; the sizes that its warm-up found to pay are the ones used."""
        self.instances[instance.handle] = instance
        instance.owner = self
        sizes = paying_sizes(instance.batch_s)
        if sizes and self._manifest.batching.only_paying_sizes:
            self._paying_rows = sizes[-1]
        self._batcher.set_limits(self._limits())
        self._expected_s = instance.batch_s.get(1, 0.0)
        self._batcher.add_worker(instance.handle)
        self._schedule_pump()

    @property
    def coalesce_rows(self) -> int:
        """Rows that queued requests are gathered to at most."""
        limits = self._batcher.limits
        return limits.coalesce_rows or limits.max_batch_size

    @property
    def idle(self) -> bool:
        """Nothing queued, nothing running."""
        return self._batcher.idle and not self._answers

    @property
    def pending(self) -> int:
        """Requests queued or running."""
        return self._batcher.queued + self._batcher.in_flight

    @property
    def pending_bytes(self) -> int:
        """Bytes of the requests queued."""
        return self._batcher.queued_bytes

    def submit(self, request: InferenceRequest, done: DoneCallback, received: float) -> Entry:
        """Queue a request; `done` is called later, exactly once.

        INVALID_ARGUMENT if it does not fit the model, RESOURCE_EXHAUSTED if the queue is full, UNAVAILABLE if its device is
        gone, or too hot for its priority; then `done` is never called.
        """
        try:
            fitted = self._admission.fit(request)
            batching = self._manifest.batching
            priority = request.priority or batching.default_priority
            if self._governor is not None:
                self._governor.admit(priority, self._device)
            timeout_s = request.timeout_s
            if timeout_s is None and batching.default_timeout_ms:
                timeout_s = batching.default_timeout_ms / 1000
            self._key += 1
            entry = Entry(
                key=self._key,
                shape_key=fitted.shape_key,
                rows=fitted.rows,
                nbytes=fitted.nbytes,
                priority=priority,
                deadline=math.inf if timeout_s is None else received + timeout_s,
                stream=request.stream,
                idempotent=request.idempotent,
                payload=Job(self, request, fitted, done, received),
            )
            self._batcher.enqueue(entry, received)
        except ApplianceError:
            self.statistics.failures["REJECTED"] += 1
            raise
        if self._polled is not None and self._batcher.in_flight:
            self._polled.stop_polling()
            self._polled = None
        if not self._pump_scheduled:
            # on the loop's next turn, so that what arrived in this one shares a batch
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)
        return entry

    def cancel(self, entry: Entry) -> bool:
        """End a request whose caller is gone; its batch goes on for the others. False if it had ended."""
        if not self._batcher.cancel(entry):
            return False
        self.statistics.failures["CANCELED"] += 1
        self._fail(entry.payload, ApplianceError(ErrorCode.CANCELLED, "the request was cancelled"))
        self._schedule_pump()
        return True

    def fail_all(self, error: ApplianceError) -> None:
        """The model goes away: every waiter gets this error. Batches that still run are dropped when they end."""
        self._gone = error
        self._batcher.fail_all(time.monotonic())
        self._pump()

    _gone: ApplianceError | None = None

    def _gates_changed(self) -> None:
        self._batcher.set_limits(self._limits())
        self._schedule_pump()

    def _schedule_pump(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Carry out what the batcher wants now, arm the one timer, then hand out the answers."""
        self._pump_scheduled = False
        now = time.monotonic()
        for action in self._batcher.poll(now):
            if isinstance(action, Dispatch):
                self._dispatch(action, now)
            else:
                self._end(action, now)
        self._arm(now)
        if self._answers:
            self._deliver()

    def _dispatch(self, action: Dispatch, now: float) -> None:
        self._dispatched[action.batch] = action
        instance = self.instances[action.worker]
        instance.dispatch(action.batch, [entry.payload.fitted for entry in action.entries], action.rows, now)
        if self._budget_timer is None:
            self._budget_timer = self._loop.call_later(self._budget_s, self._check_budgets)
        if (
            0 < self._expected_s < POLLED_SHARE * self._busy_poll_s
            and len(action.entries) == 1 == self._batcher.in_flight
        ):
            instance.link.poll_until(now + self._busy_poll_s)
            self._polled = instance.link

    def _end(self, action: Expire | Supersede | Fail, now: float) -> None:
        job: Job = action.entry.payload
        if isinstance(action, Expire):
            self.statistics.failures["OTHER"] += 1
            waited_ms = (now - job.received) * 1000
            where = "while it ran" if action.was_dispatched else "in the queue"
            self._fail(
                job,
                ApplianceError(ErrorCode.DEADLINE_EXCEEDED, f"the deadline passed {where}, after {waited_ms:.0f} ms"),
            )
        elif isinstance(action, Supersede):
            self.statistics.failures["OTHER"] += 1
            self._fail(
                job,
                ApplianceError(
                    ErrorCode.SUPERSEDED, f"a newer request of stream {job.request.stream!r} took its place"
                ),
            )
        else:
            self.statistics.failures["BACKEND"] += 1
            self._fail(
                job,
                self._gone
                or ApplianceError(
                    ErrorCode.ENGINE_FAULT, f"the worker of model {job.request.model!r} died while it ran this request"
                ),
            )

    def _fail(self, job: Job, error: ApplianceError) -> None:
        self.statistics.fail.add(int((time.monotonic() - job.received) * 1e9))
        self._log.add(error, model=job.request.model, request_id=job.request.id)
        self._answers.append((job, error))

    def _deliver(self) -> None:
        answers, self._answers = self._answers, []
        for job, outcome in answers:
            done = job.done
            job.release()
            done(outcome)
        if self._batcher.idle:
            self._on_idle()

    def _arm(self, now: float) -> None:
        wakeup = self._batcher.next_wakeup()
        if wakeup is None or self._timer_at <= wakeup:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = wakeup
        self._timer = self._loop.call_later(max(TIMER_GRAIN_S, wakeup - now), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        self._pump()

    def _check_budgets(self) -> None:
        """End workers whose batch runs longer than it may; come back when the next one could."""
        self._budget_timer = None
        now = time.monotonic()
        soonest = math.inf
        for instance in self.instances.values():
            if not instance.in_flight or instance.link.loading:
                continue
            left = instance.busy_since + self._budget_s - now
            if left <= 0:
                instance.link.kill(f"a batch ran longer than its budget of {self._budget_s:g} s")
            else:
                soonest = min(soonest, left)
        if any(instance.in_flight for instance in self.instances.values()):
            self._budget_timer = self._loop.call_later(
                max(TIMER_GRAIN_S, min(soonest, self._budget_s)), self._check_budgets
            )

    # --- what instances tell us -------------------------------------------------------------------------------------------

    def batch_done(self, instance: Instance, message: Done, memory: memoryview) -> None:
        """Split the outputs, while they lie there, into one answer for each request that still waits."""
        now = time.monotonic()
        dispatch = self._dispatched.pop(message.batch)
        waiting = self._batcher.batch_done(message.batch, now)
        infer_s = message.infer_ns / 1e9
        if len(waiting) == 1:
            self._expected_s += (infer_s - self._expected_s) * 0.1 if self._expected_s else infer_s
        self._count(dispatch, message)
        try:
            outputs = self._split(dispatch, message, memory)
        except ApplianceError as error:
            for entry in waiting:
                if entry is not None:
                    self._fail(entry.payload, error)
            return
        statistics = self.statistics
        for position, entry in enumerate(waiting):
            if entry is None:
                continue
            job: Job = entry.payload
            queue_s = entry.dispatched_at - job.received
            total_s = now - job.received
            statistics.success.add(int(total_s * 1e9))
            statistics.queue.add(int(queue_s * 1e9))
            index = bucket(int(total_s * 1e6))
            statistics.request_times.counts[index] += 1
            statistics.recent_times.current.counts[index] += 1
            statistics.queue_times.add(int(queue_s * 1e6))
            self._answers.append((job, self._answer(job, outputs, position, queue_s, message.infer_ns)))

    def _answer(
        self, job: Job, outputs: list[list[tuple[tuple[int, ...], bytes]]], position: int, queue_s: float, infer_ns: int
    ) -> Outcome:
        request = job.request
        tensors = []
        for index, classes in job.fitted.outputs:
            spec = self.layout.outputs[index]
            shape, data = outputs[index][position]
            tensor = Tensor(spec.name, spec.datatype, shape, data)
            if classes:
                try:
                    tensor = classify(tensor, classes, self._labels, batched=self.layout.batched)
                except ApplianceError as error:
                    return error
            tensors.append(tensor)
        return InferenceResponse(
            request.model,
            self.statistics.version,
            request.id,
            tuple(tensors),
            Timing(int(queue_s * 1e6), infer_ns // 1000),
        )

    def _split(
        self, dispatch: Dispatch, message: Done, memory: memoryview
    ) -> list[list[tuple[tuple[int, ...], bytes]]]:
        """Per output, per request: shape and owned bytes."""
        layout = self.layout
        rows = [entry.rows for entry in dispatch.entries]
        if message.outputs:
            places: Sequence[Place] = message.outputs
            return [
                split_rows(spec, place.shape, memory[place.offset : place.offset + place.nbytes], rows)
                for spec, place in zip(layout.outputs, places, strict=True)
            ]
        outputs = []
        for spec, offset, row_nbytes in zip(
            layout.outputs, layout.output_offsets, layout.output_row_bytes, strict=True
        ):
            if not layout.batched:
                outputs.append([(spec.shape, bytes(memory[offset : offset + row_nbytes]))])
                continue
            tail = spec.shape[1:]
            parts = []
            for count in rows:
                end = offset + count * row_nbytes
                parts.append(((count, *tail), bytes(memory[offset:end])))
                offset = end
            outputs.append(parts)
        return outputs

    def _count(self, dispatch: Dispatch, message: Done) -> None:
        statistics = self.statistics
        requests = len(dispatch.entries)
        statistics.last_inference_ms = int(time.time() * 1000)
        statistics.inference_count += dispatch.rows
        statistics.execution_count += 1
        statistics.compute_input.add(message.input_ns * requests, requests)
        statistics.compute_infer.add(message.infer_ns * requests, requests)
        statistics.compute_output.add(message.output_ns * requests, requests)
        batch = statistics.batches.get(dispatch.rows)
        if batch is None:
            batch = BatchStatistic(dispatch.rows, DurationStatistic(), DurationStatistic(), DurationStatistic())
            statistics.batches[dispatch.rows] = batch
        batch.compute_input.add(message.input_ns)
        batch.compute_infer.add(message.infer_ns)
        batch.compute_output.add(message.output_ns)

    def batch_failed(self, instance: Instance, batch: int, message: str) -> None:
        """The engine refused a batch. A batch of several is tried again one by one: only the guilty one fails."""
        dispatch = self._dispatched.pop(batch)
        error = ApplianceError(ErrorCode.ENGINE_FAULT, f"the engine refused this request: {message}")
        for entry in self._batcher.batch_failed(batch, time.monotonic()):
            if entry is not None:
                self.statistics.failures["BACKEND"] += 1
                self._fail(entry.payload, error)
        del dispatch

    def slot_freed(self, instance: Instance) -> None:
        """Give the worker its next batch first; the answers go out while it runs."""
        self._pump()
        if self._retiring:
            self._tell_retired(instance)

    def worker_lost(self, instance: Instance, reason: str) -> None:
        """Requests it held are run once more, alone, elsewhere; the lifecycle decides about a new worker."""
        now = time.monotonic()
        self.instances.pop(instance.handle, None)
        for batch in instance.in_flight:
            self._dispatched.pop(batch, None)
        instance.in_flight.clear()
        self._batcher.worker_lost(instance.handle, now)
        self._tell_retired(instance)
        self._on_instance_lost(instance, reason)
        self._pump()

    def remove_instance(self, instance: Instance) -> None:
        """No more batches to it; used when the version is drained."""
        self._batcher.remove_worker(instance.handle)

    async def retire_instance(self, instance: Instance) -> None:
        """No more batches to it; returns when those it has are answered, or it is lost."""
        self.remove_instance(instance)
        while instance.in_flight and instance.handle in self.instances:
            emptied = self._loop.create_future()
            self._retiring[instance.handle] = emptied
            await emptied

    def _tell_retired(self, instance: Instance) -> None:
        emptied = self._retiring.pop(instance.handle, None)
        if emptied is not None and not emptied.done():
            emptied.set_result(None)

    def close(self) -> None:
        """Stop the timers. Nothing waits any more, or `fail_all` was called."""
        if self._end_gates is not None:
            self._end_gates()
        for timer in (self._timer, self._budget_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._budget_timer = None
