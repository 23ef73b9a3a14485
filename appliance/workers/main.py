"""The worker: one process, one thread, one loop that takes a message, runs an engine and answers.

It owns engines and nothing else: no queue (the socket holds at most one staged batch), no deadlines, no network. It ends
when its socket closes, which is how a front that died takes its workers along. Driven by `template`, which forks it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import gc
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.core.assembly import Place, SlotLayout, align
from appliance.core.tensor import DataType
from appliance.engines import registry
from appliance.engines.base import (
    DeviceFaultError,
    Engine,
    EngineBatch,
    EngineError,
    EngineOutput,
    EngineTensor,
    MissingError,
    OutOfMemoryError,
    OutputMismatchError,
)
from appliance.workers import arena
from appliance.workers.messages import (
    MAX_MESSAGE_BYTES,
    Attach,
    Done,
    Failed,
    Faulted,
    FromWorker,
    Load,
    Loaded,
    RefusalKind,
    Refused,
    Run,
    Unload,
    Warmed,
    decode_to_worker,
    encode,
)

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

WARM_UP_RUNS = 20
WARM_UP_BUDGET_S = 0.05
"""Per batch size: at most so many timed runs, and no more once so much time is spent. The first run is never counted."""

GAIN = 0.97
"""A larger batch must take at most this share of the best time per row so far, or growing stops after two disappointments."""

IDLE_GAP_S = 0.01
"""Gaps between requests are counted up to this: one long pause must not make the worker forget a dense stream at once."""


def become_child(parent: int, title: str) -> None:
    """After the fork: die with the template, be the first whom the kernel ends when memory is short, have a name in `ps`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    libc.prctl(PR_SET_NAME, title.encode()[:15], 0, 0, 0)
    # a container may forbid it; then the kernel chooses by size, as ever
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    # the front decides when we end: a terminal and a service manager signal the whole group, and a drain needs its workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class LoadedModel:
    """One model in this worker: its engine and, once attached, its arena."""

    def __init__(self, handle: int, engine: Engine) -> None:
        self.handle = handle
        self.engine = engine
        self.memory: arena.Mapping | None = None
        self.layout: SlotLayout | None = None
        self.static_outputs = True
        self.max_output_bytes = 0
        self._generation = 0
        self._batches: dict[tuple[int, int], EngineBatch] = {}

    def attach(self, message: Attach, descriptor: int) -> None:
        """Map the arena."""
        memory = arena.Mapping(descriptor, name="arena")
        # before the old mapping goes: the engine may have it pinned
        self.engine.attach_memory(memory.address, memory.nbytes)
        self.memory = memory
        self.layout = message.layout
        self.static_outputs = message.layout.static_outputs
        self.max_output_bytes = message.max_output_bytes
        self._forget_batches()

    def _forget_batches(self) -> None:
        """Places or shapes have changed, so that an engine must not take a new batch for one that it has seen."""
        self._batches.clear()
        self._generation += 1

    def _tensors(
        self, layout: SlotLayout, places: Sequence[Place], memory: arena.Mapping, base: int, *, outputs: bool
    ) -> tuple[EngineTensor, ...]:
        specs = layout.outputs if outputs else layout.inputs
        return tuple(
            EngineTensor(
                spec.name,
                spec.datatype,
                place.shape,
                memory.slice(base + place.offset, place.nbytes),
                memory.address + base + place.offset,
            )
            for spec, place in zip(specs, places, strict=True)
        )

    def batch(self, slot: int, rows: int) -> EngineBatch:
        """The batch of a static layout: made once per slot and row count."""
        known = self._batches.get((slot, rows))
        if known is not None:
            return known
        assert self.layout is not None
        layout = self.layout
        places = [
            Place(offset, size * (rows if layout.batched else 1), layout.shape(spec, rows))
            for spec, offset, size in zip(layout.inputs, layout.input_offsets, layout.input_row_bytes, strict=True)
        ]
        batch = self._make(slot, rows, places, None, key=(self._generation, slot, rows))
        self._batches[slot, rows] = batch
        return batch

    def _make(
        self,
        slot: int,
        rows: int,
        places: Sequence[Place],
        spilled: arena.Mapping | None,
        *,
        key: tuple[int, int, int] | None,
    ) -> EngineBatch:
        assert self.layout is not None
        assert self.memory is not None
        layout = self.layout
        base = slot * layout.slot_bytes
        inputs = self._tensors(layout, places, spilled or self.memory, 0 if spilled else base, outputs=False)
        outputs = None
        if self.static_outputs:
            out_places = [
                Place(offset, size * (rows if layout.batched else 1), layout.shape(spec, rows))
                for spec, offset, size in zip(
                    layout.outputs, layout.output_offsets, layout.output_row_bytes, strict=True
                )
            ]
            outputs = self._tensors(layout, out_places, self.memory, base, outputs=True)
        return EngineBatch(key, rows, inputs, outputs)

    def dynamic_batch(self, run: Run, spilled: arena.Mapping | None) -> EngineBatch:
        """The batch of places that were computed for it alone."""
        return self._make(run.slot, run.rows, run.inputs, spilled, key=None)

    def forget_static_outputs(self) -> None:
        """The model's declared output shapes are untrue: from now on outputs are allocated by the engine."""
        self.static_outputs = False
        self._forget_batches()

    def place_outputs(self, slot: int, outputs: Sequence[EngineOutput]) -> tuple[tuple[Place, ...], int | None]:
        """Copy outputs that the engine allocated into the slot, or into memory of their own; its descriptor, if so."""
        assert self.layout is not None
        assert self.memory is not None
        places = []
        offset = 0
        for output in outputs:
            places.append(Place(offset, len(output.data), output.shape))
            offset = align(offset + len(output.data))
        if offset > self.max_output_bytes:
            raise EngineError(
                f"the outputs of this batch take {offset} bytes, {self.max_output_bytes} are allowed (worker.max_output_bytes)"
            )
        region = self.layout.slot_bytes - self.layout.output_base
        descriptor = None
        if offset <= region:
            memory, base = self.memory, slot * self.layout.slot_bytes + self.layout.output_base
        else:
            descriptor = arena.create("outputs", offset)
            memory, base = arena.Mapping(descriptor), 0
        for place, output in zip(places, outputs, strict=True):
            memory.slice(base + place.offset, place.nbytes)[:] = output.data
        if descriptor is None:
            return tuple(
                Place(place.offset + self.layout.output_base, place.nbytes, place.shape) for place in places
            ), None
        memory.close()
        return tuple(places), descriptor


class Worker:
    """The loop."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._models: dict[int, LoadedModel] = {}
        self._buffer = bytearray(MAX_MESSAGE_BYTES)
        self._view = memoryview(self._buffer)
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._busy_poll_s = 0.0
        self._gap_s = IDLE_GAP_S
        self._last_answer = time.perf_counter()

    def serve(self) -> None:
        """Until the front closes the socket. DeviceFaultError, of which the front knows: this process has no device any more."""
        while True:
            received = self._receive()
            if received is None:
                return
            data, descriptors = received
            try:
                message = decode_to_worker(data)
                if type(message) is Run:
                    self._run(message, descriptors)
                else:
                    self._control(message, descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _receive(self) -> tuple[memoryview, list[int]] | None:
        """The next packet, or None at the end. Polls without sleeping for a moment if requests come that densely."""
        waited_from = time.perf_counter()
        while True:
            try:
                count, ancillary, _, _ = self._channel.recvmsg_into([self._buffer], 64, socket.MSG_DONTWAIT)
                break
            except BlockingIOError:
                now = time.perf_counter()
                if self._gap_s >= self._busy_poll_s or now - waited_from >= self._busy_poll_s:
                    self._poll.poll()
                else:
                    # on a small box the front may need this very core
                    os.sched_yield()
            except ConnectionResetError:
                return None
        if count == 0:
            return None
        return self._view[:count], _descriptors(ancillary) if ancillary else []

    def _send(self, message: FromWorker, descriptor: int | None = None) -> None:
        data = encode(message)
        if descriptor is None:
            self._channel.send(data)
        else:
            socket.send_fds(self._channel, [data], [descriptor])

    def _run(self, run: Run, descriptors: list[int]) -> None:
        arrived = time.perf_counter()
        self._gap_s += (min(arrived - self._last_answer, IDLE_GAP_S) - self._gap_s) * 0.25
        started = time.perf_counter_ns()
        model = self._models[run.handle]
        descriptor = None
        try:
            if run.inputs:
                spilled = arena.Mapping(descriptors[0]) if run.spilled else None
                batch = model.dynamic_batch(run, spilled)
            else:
                batch = model.batch(run.slot, run.rows)
            placed = time.perf_counter_ns()
            try:
                outputs = model.engine.run(batch)
            except OutputMismatchError:
                model.forget_static_outputs()
                outputs = model.engine.run(EngineBatch(None, batch.rows, batch.inputs, None))
            ran = time.perf_counter_ns()
            places: tuple[Place, ...] = ()
            if outputs is not None:
                places, descriptor = model.place_outputs(run.slot, outputs)
            done = Done(
                run.handle,
                run.batch,
                places,
                descriptor is not None,
                placed - started,
                ran - placed,
                time.perf_counter_ns() - ran,
            )
        except DeviceFaultError as error:
            self._send(Faulted(run.handle, str(error)))
            raise
        except EngineError as error:
            self._send(Failed(run.handle, run.batch, str(error)))
        else:
            self._send(done, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        self._last_answer = time.perf_counter()

    def _control(self, message: Load | Attach | Unload | Run, descriptors: list[int]) -> None:
        try:
            self._obey(message, descriptors)
        except DeviceFaultError as error:
            self._send(Faulted(message.handle, str(error)))
            raise

    def _obey(self, message: Load | Attach | Unload | Run, descriptors: list[int]) -> None:
        match message:
            case Load(handle, options):
                try:
                    engine = registry.load(options)
                except DeviceFaultError:
                    raise
                except (EngineError, ImportError, MemoryError) as error:
                    self._send(_refusal(handle, error))
                    return
                self._models[handle] = LoadedModel(handle, engine)
                self._send(Loaded(handle, engine.traits))
            case Attach(handle):
                self._busy_poll_s = message.busy_poll_us / 1e6
                try:
                    model = self._models[handle]
                    model.attach(message, descriptors[0])
                    warmed = warm_up(model, message.sizes)
                    self._send(msgspec.structs.replace(warmed, details=model.engine.traits.details))
                except DeviceFaultError:
                    raise
                except (EngineError, ValueError, OSError, MemoryError) as error:
                    self._send(_refusal(handle, error, "warm-up failed: "))
                gc.collect()
            case Unload(handle):
                gone = self._models.pop(handle, None)
                if gone is not None:
                    gone.engine.close()
            case Run():
                raise AssertionError("handled by the caller")


def _refusal(handle: int, error: Exception, before: str = "") -> Refused:
    """In the error's words, with what is at fault."""
    kind: RefusalKind = "file"
    if isinstance(error, OutOfMemoryError | MemoryError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.ENOSPC)
    ):
        kind = "memory"
    elif isinstance(error, MissingError | ImportError):
        kind = "missing"
    return Refused(handle, f"{before}{str(error) or 'this machine has no memory left'}", kind)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def warm_up(model: LoadedModel, sizes: Sequence[int]) -> Warmed:
    """Run zeros at each batch size: what is slow the first time is done now, and the scheduler learns which sizes pay.

    Sizes stop growing after two that do not pay (a model slower in batches is not made to hold a large one), and where memory
    ends. A model whose outputs do not follow the batch axis is reported unbatched. EngineError: the model cannot run.
    """
    layout = model.layout
    assert layout is not None
    shapes_known = all(
        spec.datatype is not DataType.BYTES and all(size >= 0 for size in spec.shape[1 if layout.batched else 0 :])
        for spec in layout.inputs
    )
    if not shapes_known:
        return Warmed(model.handle, {}, model.static_outputs, "")
    times: dict[int, float] = {}
    best = float("inf")
    disappointments = 0
    for rows in sizes:
        try:
            seconds, outputs = _time(model, rows)
        except DeviceFaultError:
            raise
        except OutOfMemoryError:
            if not times:
                raise
            # there is room for the smaller ones: that is no reason to do without batches
            break
        except EngineError as error:
            if rows == 1 or not layout.batched:
                raise
            return Warmed(model.handle, times, model.static_outputs, f"a batch of {rows} fails: {error}")
        if outputs is not None and layout.batched:
            for spec, output in zip(layout.outputs, outputs, strict=True):
                if not output.shape or output.shape[0] != rows:
                    shape = list(output.shape)
                    reason = (
                        f"output {spec.name!r} has shape {shape} for {rows} rows: it does not follow the batch axis"
                    )
                    return Warmed(model.handle, times, model.static_outputs, reason)
        times[rows] = seconds
        disappointments = 0 if seconds / rows <= best * GAIN else disappointments + 1
        best = min(best, seconds / rows)
        if disappointments == 2:
            break
    return Warmed(model.handle, times, model.static_outputs, "")


def _time(model: LoadedModel, rows: int) -> tuple[float, Sequence[EngineOutput] | None]:
    """Seconds of a batch of zeros at its best, and the outputs where the engine allocated them.

    The best of several runs, since whatever else the machine does only ever adds to it.
    """
    batch = model.batch(0, rows)
    try:
        outputs = model.engine.run(batch)
    except OutputMismatchError:
        model.forget_static_outputs()
        batch = model.batch(0, rows)
        outputs = model.engine.run(batch)
    best = float("inf")
    begun = started = time.perf_counter()
    for number in range(WARM_UP_RUNS):
        if number and started - begun >= WARM_UP_BUDGET_S:
            break
        outputs = model.engine.run(batch)
        ended = time.perf_counter()
        best = min(best, ended - started)
        started = ended
    return best, outputs
