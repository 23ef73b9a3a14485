"""Starts workers from the template, loads models into them, and notices when either ends.

It owns every process below the front. Whether and when a lost worker is replaced is not decided here: the owner of its instances
does that (`lifecycle`), with the budgets of `core.retry`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from appliance.core.assembly import plan_slot
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.manifest import WorkerManifest
from appliance.engines.base import EngineOptions
from appliance.host import systemd
from appliance.workers import arena
from appliance.workers.link import SLOTS, Instance, WorkerLink
from appliance.workers.messages import (
    MAX_MESSAGE_BYTES,
    SOCKET_BUFFER_BYTES,
    Attach,
    Fork,
    Forked,
    Load,
    Loaded,
    Warmed,
    decode_from_template,
    encode,
)

FORK_TIMEOUT_S = 30.0
"""The template answers in milliseconds; on a box that swaps at boot it may take its imports' time many times over."""

QUIET_LIBRARIES = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""Numerical libraries must not start threads in the template: a fork would lose them."""


class Supervisor:
    """The processes. `start` before the first instance, `close` at the end; `close` works after half a start."""

    def __init__(
        self, *, max_arena_bytes: int, on_worker_lost: Callable[[WorkerLink, str], None], sandbox: bool = True
    ) -> None:
        self._sandbox = sandbox
        self._max_arena_bytes = max_arena_bytes
        self._on_worker_lost = on_worker_lost
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._forks: dict[int, asyncio.Future[Forked]] = {}
        self._links: dict[int, WorkerLink] = {}
        self._shared: dict[str, asyncio.Task[WorkerLink]] = {}
        self._next_worker = 1
        self._next_handle = 1
        self.template_restarts = 0

    def start(self) -> None:
        """Start the template; it imports while the caller goes on."""
        ours, theirs = _socketpair()
        try:
            self._template = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [
                    sys.executable,
                    "-m",
                    "appliance.workers.template",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    *["sandbox"] * self._sandbox,
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**systemd.for_children(os.environ), **QUIET_LIBRARIES, "ORT_DISABLE_TELEMETRY": "1"},
            )
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours

    def watch(self) -> None:
        """Listen to the template; needs the running loop, which `start` does not."""
        assert self._control is not None
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._template_readable)

    @property
    def links(self) -> list[WorkerLink]:
        """The workers that live."""
        return list(self._links.values())

    @property
    def template_pid(self) -> int:
        """The template's process id, 0 if it is gone."""
        return self._template.pid if self._template is not None else 0

    async def open_instance(
        self, title: str, options: EngineOptions, manifest: WorkerManifest, *, max_request_rows: int | None = None
    ) -> Instance:
        """A worker with this model loaded and warmed up; ready for batches once it has an owner.

        UNAVAILABLE with the reason if it cannot be loaded, crashes, or takes longer than `load_budget_ms`.
        """
        link = await self._link_for(title, options.device, manifest)
        handle = self._next_handle
        self._next_handle += 1
        budget_s = manifest.load_budget_ms / 1000
        try:
            loaded = await link.ask(handle, Load(handle, options), None, budget_s)
            assert isinstance(loaded, Loaded)
            instance = Instance(link, handle, loaded.traits)
            link.instances[handle] = instance
            await self._attach(instance, manifest, budget_s)
        except BaseException:
            self._discard(link, handle)
            raise
        return instance

    async def _attach(self, instance: Instance, manifest: WorkerManifest, budget_s: float) -> None:
        """Give the instance its arena and warm it up; once more, unbatched, if batches prove to be wrong for it."""
        traits = instance.traits
        batched, rows, static = traits.batched, traits.max_batch_size, True
        reason = traits.unbatched_reason
        while True:
            layout = plan_slot(traits.inputs, traits.outputs, batched=batched, max_rows=rows, static_outputs=static)
            while batched and layout.slot_bytes * SLOTS > self._max_arena_bytes and rows > 1:
                rows //= 2
                layout = plan_slot(traits.inputs, traits.outputs, batched=batched, max_rows=rows, static_outputs=static)
            descriptor = arena.create("arena", layout.slot_bytes * SLOTS)
            try:
                message = Attach(
                    instance.handle,
                    SLOTS,
                    layout,
                    _warm_up_sizes(rows if batched else 1),
                    manifest.max_output_bytes,
                    manifest.busy_poll_us,
                )
                warmed = await instance.link.ask(instance.handle, message, descriptor, budget_s)
                memory = arena.Mapping(descriptor)
            finally:
                os.close(descriptor)
            assert isinstance(warmed, Warmed)
            if warmed.unbatched_reason and batched:
                memory.close()
                batched, reason = False, warmed.unbatched_reason
                continue
            if not warmed.static_outputs and layout.static_outputs:
                memory.close()
                static = False
                continue
            break
        instance.traits = msgspec.structs.replace(
            traits,
            batched=batched,
            max_batch_size=layout.max_rows,
            unbatched_reason=reason,
            details={**traits.details, **warmed.details},
        )
        instance.batch_s = warmed.batch_s
        instance.attach(layout, memory)

    def _discard(self, link: WorkerLink, handle: int) -> None:
        """A load failed: unload what there is, and end a worker that has nothing else."""
        instance = link.instances.get(handle)
        if instance is not None:
            instance.unload()
        if not link.instances:
            self.close_worker(link)

    def close_instance(self, instance: Instance) -> None:
        """Unload, which ends the worker if this was its last model."""
        instance.unload()
        if not instance.link.instances:
            self.close_worker(instance.link)

    def close_worker(self, link: WorkerLink) -> None:
        """End the process and forget it."""
        link.close()
        self._links.pop(link.worker, None)
        self._forget_shared(link)

    async def _link_for(self, title: str, device: str, manifest: WorkerManifest) -> WorkerLink:
        if manifest.isolation == "version":
            return await self._fork(title)
        task = self._shared.get(device)
        if task is None:
            task = asyncio.create_task(self._fork(f"device-{device}"), name=f"fork-{device}")
            self._shared[device] = task
        try:
            return await asyncio.shield(task)
        except ApplianceError:
            self._shared.pop(device, None)
            raise

    async def _fork(self, title: str) -> WorkerLink:
        self._ensure_template()
        assert self._control is not None
        worker = self._next_worker
        self._next_worker += 1
        ours, theirs = _socketpair()
        ours.setblocking(False)
        link = WorkerLink(worker, ours, on_lost=self._link_lost)
        answer: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        self._forks[worker] = answer
        self._links[worker] = link
        try:
            socket.send_fds(self._control, [encode(Fork(worker, title))], [theirs.fileno()])
            async with asyncio.timeout(FORK_TIMEOUT_S):
                await answer
        except (TimeoutError, OSError) as error:
            self.close_worker(link)
            raise ApplianceError(
                ErrorCode.UNAVAILABLE, "no worker process could be started", retry_after_s=1.0
            ) from error
        except asyncio.CancelledError:
            # nobody wants it any more: it is ended when the template says that it runs
            self.close_worker(link)
            raise
        finally:
            theirs.close()
            self._forks.pop(worker, None)
        return link

    def _ensure_template(self) -> None:
        """A template that died is replaced; its workers died with it."""
        if self._template is not None and self._template.poll() is None and self._control is not None:
            return
        self._drop_template()
        self.template_restarts += 1
        self.start()
        self.watch()

    def _template_readable(self) -> None:
        while self._control is not None:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, descriptors = b"", []
            if not data:
                self._drop_template()
                for answer in self._forks.values():
                    if not answer.done():
                        answer.set_exception(ApplianceError(ErrorCode.UNAVAILABLE, "the template process ended"))
                return
            message = decode_from_template(data)
            link = self._links.get(message.worker)
            if isinstance(message, Forked):
                waiting = self._forks.get(message.worker)
                if link is None or waiting is None or waiting.done():
                    _end_unwanted(descriptors[0])
                    continue
                link.started(message.pid, descriptors[0])
                waiting.set_result(message)
            elif link is not None:
                link.exited(message.status)

    def _drop_template(self) -> None:
        if self._control is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if self._template is not None:
            self._template.kill()
            self._template.wait()
            self._template = None

    def _link_lost(self, link: WorkerLink, reason: str) -> None:
        self._links.pop(link.worker, None)
        self._forget_shared(link)
        self._on_worker_lost(link, reason)

    def _forget_shared(self, link: WorkerLink) -> None:
        for device, task in list(self._shared.items()):
            if task.done() and not task.cancelled() and task.exception() is None and task.result() is link:
                del self._shared[device]

    def close(self) -> None:
        """End every worker, then the template."""
        for link in self.links:
            self.close_worker(link)
        self._drop_template()


def _socketpair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return ours, theirs


def _end_unwanted(pidfd: int) -> None:
    """A worker that came up after whoever asked for it had gone away."""
    try:
        # a worker that found its socket closed may have ended by itself
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def _warm_up_sizes(rows: int) -> tuple[int, ...]:
    sizes = [1]
    while sizes[-1] * 2 <= rows:
        sizes.append(sizes[-1] * 2)
    if sizes[-1] != rows:
        sizes.append(rows)
    return tuple(sizes)
