"""The front's end of one worker process: its socket, its pidfd, and the instances (loaded models) in it.

It runs on the event loop and decides nothing: it writes batches into slots, passes answers on, and says when the process is lost.
Driven by `supervisor` (life) and by `scheduling` (batches).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from appliance.core.admission import Fitted
from appliance.core.assembly import Place, SlotLayout, place_inputs
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.engines.base import EngineTraits
from appliance.workers import arena
from appliance.workers.messages import (
    MAX_MESSAGE_BYTES,
    Done,
    Failed,
    Faulted,
    FromWorker,
    Loaded,
    Refused,
    Run,
    ToWorker,
    Unload,
    Warmed,
    decode_from_worker,
    encode,
)

SLOTS = 2
"""One batch running, one staged."""

EXIT_STATUS_WAIT_S = 0.1
"""How long a dead worker's requests wait for the template to say how it died. It says so within a millisecond, if it lives."""


class InstanceOwner(Protocol):
    """Who feeds an instance: hears of every batch exactly once, as done, as failed, or by the loss of the worker."""

    def batch_done(self, instance: Instance, message: Done, memory: memoryview) -> None:
        """Outputs lie in `memory` at their places until this returns; then the slot is free and `slot_freed` is called."""

    def slot_freed(self, instance: Instance) -> None:
        """The instance can take a batch again; answers that `batch_done` gathered may go out after that."""

    def batch_failed(self, instance: Instance, batch: int, message: str) -> None:
        """The engine refused the batch; the worker lives."""

    def worker_lost(self, instance: Instance, reason: str) -> None:
        """The process is gone; whatever was in its slots has not run to an answer."""


class Instance:
    """A model loaded in a worker, with its arena."""

    def __init__(self, link: WorkerLink, handle: int, traits: EngineTraits) -> None:
        self.link = link
        self.handle = handle
        self.number = 0
        self.traits = traits
        self.owner: InstanceOwner | None = None
        self.layout: SlotLayout | None = None
        self.memory: arena.Mapping | None = None
        self.batch_s: dict[int, float] = {}
        self.batches = 0
        self.in_flight: dict[int, int] = {}  # batch -> slot
        self.busy_since = 0.0
        self._free = list(range(SLOTS))

    def attach(self, layout: SlotLayout, memory: arena.Mapping) -> None:
        """Slots may be used once the worker has warmed up."""
        self.layout = layout
        self.memory = memory

    def dispatch(self, batch: int, requests: Sequence[Fitted], rows: int, now: float) -> None:
        """Write the rows into a free slot and tell the worker. The caller keeps to SLOTS batches in flight."""
        layout, memory = self.layout, self.memory
        assert layout is not None
        assert memory is not None
        slot = self._free.pop()
        if not self.in_flight:
            self.busy_since = now
        self.in_flight[batch] = slot
        base = slot * layout.slot_bytes
        if layout.static_inputs:
            view = memory.view
            for index, offset in enumerate(layout.input_offsets):
                start = base + offset
                for request in requests:
                    data = request.tensors[index].data
                    end = start + len(data)
                    view[start:end] = data
                    start = end
            self.link.send(Run(self.handle, batch, slot, rows))
            return
        places, nbytes = place_inputs([request.tensors for request in requests], batched=layout.batched)
        if nbytes <= layout.output_base:
            _write(memory.view, base, places, requests)
            self.link.send(Run(self.handle, batch, slot, rows, places))
            return
        descriptor = arena.create("inputs", nbytes)
        try:
            spilled = arena.Mapping(descriptor)
            _write(spilled.view, 0, places, requests)
            spilled.close()
            self.link.send(Run(self.handle, batch, slot, rows, places, True), descriptor)
        finally:
            os.close(descriptor)

    def finish(self, batch: int, now: float) -> None:
        """The batch has its answer: its slot is free, and the staged one runs."""
        self._free.append(self.in_flight.pop(batch))
        self.batches += 1
        self.busy_since = now

    def unload(self) -> None:
        """Forget the model in the worker; a worker without models is closed by the supervisor."""
        self.owner = None
        self.link.forget(self)
        if self.memory is not None:
            self.memory.close()
            self.memory = None


def _write(view: memoryview, base: int, places: Sequence[Place], requests: Sequence[Fitted]) -> None:
    for index, place in enumerate(places):
        start = base + place.offset
        for request in requests:
            data = request.tensors[index].data
            view[start : start + len(data)] = data
            start += len(data)


class LoadRefusedError(ApplianceError):
    """The engine itself would not load the file: not a lost worker, not a timeout, not want of memory or of a library."""


class NoRoomError(ApplianceError):
    """The engine found no memory for it when it loaded. Nothing is said against the file."""


REFUSALS: dict[str, type[ApplianceError]] = {"file": LoadRefusedError, "memory": NoRoomError}


class WorkerLink:
    """One worker process as the front sees it. `faulted`: the handle whose work showed that the device is lost, if it was so."""

    def __init__(self, worker: int, channel: socket.socket, *, on_lost: Callable[[WorkerLink, str], None]) -> None:
        self.worker = worker
        self.pid = 0
        self.pidfd = -1
        self.lost = False
        self.faulted: int | None = None
        self.loading = False
        self.instances: dict[int, Instance] = {}
        self._channel = channel
        self._channel_fd = channel.fileno()
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(MAX_MESSAGE_BYTES)
        self._view = memoryview(self._buffer)
        self._answers: dict[int, asyncio.Future[FromWorker]] = {}
        self._polling_until = 0.0
        self._polling = False
        self._exit_reason = ""
        self._loop.add_reader(self._channel_fd, self._readable)

    def started(self, pid: int, pidfd: int) -> None:
        """The template forked it."""
        self.pid = pid
        self.pidfd = pidfd
        self._loop.add_reader(pidfd, self._process_ended)

    def send(self, message: ToWorker, descriptor: int | None = None) -> None:
        """Send one packet. A worker that is gone is no error here: its loss is reported by its own path, once."""
        try:
            if descriptor is None:
                self._channel.send(encode(message))
            else:
                socket.send_fds(self._channel, [encode(message)], [descriptor])
        except (BrokenPipeError, ConnectionResetError):
            return

    async def ask(self, handle: int, message: ToWorker, descriptor: int | None, timeout_s: float) -> FromWorker:
        """Send a control message and wait for its answer. UNAVAILABLE with a reason: refused, lost, or out of time (killed)."""
        if self.lost:
            raise ApplianceError(ErrorCode.UNAVAILABLE, self._exit_reason or "its worker ended")
        answer: asyncio.Future[FromWorker] = self._loop.create_future()
        self._answers[handle] = answer
        self.loading = True
        self.send(message, descriptor)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError:
            self.kill(f"it took longer than {timeout_s:g} s to load")
            raise ApplianceError(ErrorCode.UNAVAILABLE, f"it took longer than {timeout_s:g} s to load") from None
        finally:
            self.loading = False
            self._answers.pop(handle, None)
        if isinstance(reply, Refused):
            kind = REFUSALS.get(reply.kind, ApplianceError)
            raise kind(ErrorCode.UNAVAILABLE, reply.message)
        return reply

    def poll_until(self, deadline: float) -> None:
        """Keep the loop turning without sleeping until that time or the next answer: a wake-up costs more than a short run."""
        self._polling_until = deadline
        if not self._polling:
            self._polling = True
            self._loop.call_soon(self._poll)

    def stop_polling(self) -> None:
        """More work has come than one short run: the loop has better to do than to turn empty."""
        self._polling_until = 0.0

    def _poll(self) -> None:
        self._polling = False
        if self.lost or self._readable() or time.monotonic() >= self._polling_until:
            return
        self._polling = True
        self._loop.call_soon(self._poll)

    def _readable(self) -> bool:
        """Take every packet that is there; whether there was one."""
        found = False
        while not self.lost:
            try:
                count, ancillary, _, _ = self._channel.recvmsg_into([self._buffer], 64, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except ConnectionResetError:
                count, ancillary = 0, []
            if count == 0:
                # its end of the socket is closed: the process is ending, and its pidfd says so in a moment
                self._loop.remove_reader(self._channel_fd)
                return found
            found = True
            self._handle(self._view[:count], ancillary)
        return found

    def _handle(self, data: memoryview, ancillary: list[tuple[int, int, bytes]]) -> None:
        descriptors = array.array("i")
        for _, _, raw in ancillary:
            descriptors.frombytes(raw[: len(raw) - len(raw) % descriptors.itemsize])
        try:
            message = decode_from_worker(data)
            if type(message) is Done:
                self._done(message, descriptors)
            elif isinstance(message, Failed):
                instance = self.instances.get(message.handle)
                if instance is not None and instance.owner is not None:
                    instance.owner.batch_failed(instance, message.batch, message.message)
                    instance.finish(message.batch, time.monotonic())
                    instance.owner.slot_freed(instance)
            elif isinstance(message, Faulted):
                # it exits at once; its requests do not wait until a driver has torn down what it held
                self.faulted = message.handle
                self._exit_reason = self._exit_reason or message.reason
                self._lose()
            elif isinstance(message, Loaded | Refused | Warmed):
                waiting = self._answers.get(message.handle)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _done(self, message: Done, descriptors: array.array[int]) -> None:
        instance = self.instances.get(message.handle)
        if instance is None or instance.owner is None or instance.memory is None or instance.layout is None:
            return  # unloaded meanwhile: nobody waits any more
        if message.spilled:
            spilled = arena.Mapping(descriptors[0])
            instance.owner.batch_done(instance, message, spilled.view)
            spilled.close()
        else:
            nbytes = instance.layout.slot_bytes
            base = instance.in_flight[message.batch] * nbytes
            instance.owner.batch_done(instance, message, instance.memory.view[base : base + nbytes])
        instance.finish(message.batch, time.monotonic())
        instance.owner.slot_freed(instance)

    def kill(self, reason: str) -> None:
        """End the process now. Its loss is reported through its pidfd, with this reason."""
        self._exit_reason = self._exit_reason or reason
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def exited(self, status: int) -> None:
        """The template reaped it: now the reason is known."""
        if not self._exit_reason:
            self._exit_reason = describe_exit(status)
        self._process_ended()

    def _process_ended(self) -> None:
        if self.lost:
            return
        if not self._exit_reason:
            # the template tells the exit status in a moment; if it is gone too, go on without
            self._loop.remove_reader(self.pidfd)
            self._loop.call_later(EXIT_STATUS_WAIT_S, self._ended_unexplained)
            return
        self._lose()

    def _ended_unexplained(self) -> None:
        if not self.lost:
            self._exit_reason = self._exit_reason or "its worker ended"
            self._lose()

    def _lose(self) -> None:
        """Take the answers that were sent before the end, then report the loss once."""
        self._readable()
        self.lost = True
        self._release()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(ApplianceError(ErrorCode.UNAVAILABLE, self._exit_reason))
        instances, self.instances = self.instances, {}
        for instance in instances.values():
            if instance.memory is not None:
                instance.memory.close()
                instance.memory = None
            if instance.owner is not None:
                instance.owner.worker_lost(instance, self._exit_reason)
        self._on_lost(self, self._exit_reason)

    def forget(self, instance: Instance) -> None:
        """Unload one model; the worker goes on with the others."""
        if self.instances.pop(instance.handle, None) is not None and not self.lost:
            self.send(Unload(instance.handle))

    def close(self) -> None:
        """Close the socket, which ends the worker; whoever hangs is killed."""
        if self.lost:
            return
        self.lost = True
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._release()
        for instance in self.instances.values():
            if instance.memory is not None:
                instance.memory.close()
                instance.memory = None
        self.instances.clear()

    def _release(self) -> None:
        self._loop.remove_reader(self._channel_fd)
        self._channel.close()
        if self.pidfd >= 0:
            self._loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1


def describe_exit(status: int) -> str:
    """How a process ended, in words: `status` negative for a signal."""
    if status < 0:
        return f"its worker was ended by {signal.Signals(-status).name}"
    return f"its worker exited with status {status}"
