"""One generation of one model version: its state, its workers, its scheduler, and the steps from NEW to UNLOADED.

It replaces lost workers within its restart budget and gives up, with its reason, beyond that. What should be loaded is not
decided here: `manager` does that, by `core.version_policy`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine

import msgspec

from appliance.building.version_files import weights_bytes
from appliance.config import WorkersConfig
from appliance.core.description import ModelDescription, ModelStatistics, VerificationRecord, WorkerDescription
from appliance.core.errors import ApplianceError, ErrorCode, not_found, unavailable
from appliance.core.manifest import ModelManifest
from appliance.core.memory_budget import HOST
from appliance.core.request import ModelName, Version
from appliance.core.retry import RestartBudget, backoff
from appliance.core.states import ModelState, model_transition
from appliance.engines.base import EngineOptions, EngineTraits
from appliance.lifecycle.compiler import Artifact, BuildProgress, Compiler, RejectedError
from appliance.lifecycle.memory import MemoryShortError, ModelMemory
from appliance.lifecycle.repository import ModelFolder, VersionFolder
from appliance.observability.events import EventBus
from appliance.scheduling.governor import Governor
from appliance.scheduling.scheduler import Scheduler, paying_sizes
from appliance.workers.link import SLOTS, Instance, LoadRefusedError, NoRoomError
from appliance.workers.supervisor import Supervisor

log = logging.getLogger(__name__)

MEMORY_PAUSE_S = 1.0
MOST_MEMORY_PAUSE_S = 60.0
"""Between two tries of a version that waits for memory: doubled each time, from the first to the second."""


class AlteredError(LoadRefusedError):
    """The engine's files are gone, or not what was sealed when it was made: they are not loaded."""

    def __init__(self) -> None:
        super().__init__(
            ErrorCode.UNAVAILABLE, "the engine's file is gone, or was altered since it was made: not loaded"
        )


class ModelVersion:
    """One generation. `state` changes only in `_to`, which publishes it."""

    def __init__(
        self,
        folder: ModelFolder,
        version: VersionFolder,
        *,
        supervisor: Supervisor,
        events: EventBus,
        workers: WorkersConfig,
        on_change: Callable[[], None],
        compiler: Compiler | None = None,
        artifact: Artifact | None = None,
        governor: Governor | None = None,
        memory: ModelMemory | None = None,
        evictable: bool = False,
    ) -> None:
        self._memory = memory
        self._evictable = evictable
        self._governor = governor
        self.artifact = artifact
        self._compiler = compiler
        self.name: ModelName = folder.name
        self.version = Version(str(version.version))
        self.number = version.version
        self.fingerprint = version.fingerprint
        self.manifest: ModelManifest = folder.manifest
        self.labels = folder.labels
        self.state = ModelState.NEW
        self.reason = ""
        self.restarts = 0
        self.scheduler: Scheduler | None = None
        self.statistics = ModelStatistics(self.name, self.version)
        self._model = folder
        self._folder = version
        self._supervisor = supervisor
        self._events = events
        self._on_change = on_change
        self._budget = RestartBudget(
            limit=workers.crash_limit,
            window_s=workers.crash_window_s,
            backoff_initial_s=workers.backoff_initial_s,
            backoff_max_s=workers.backoff_max_s,
        )
        self._traits: EngineTraits | None = None
        self._paying: tuple[int, ...] = ()
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: set[asyncio.Task[Instance]] = set()
        self._unwanted = False
        self.waits_for_memory = False
        self._memory_tries = 0
        self._memory_retry_s = 0.0
        self.engine_refused = False
        self.rejected = False

    @property
    def generation(self) -> str:
        """This version as it was on disk when it was seen, and what runs it."""
        key = f"+{self.artifact.key[:16]}" if self.artifact is not None else ""
        return f"{self.version}@{self.fingerprint[:16]}{key}"

    @property
    def device(self) -> str:
        """Where it runs, or would: "gpu:1", or "host"."""
        kind, _, index = self.manifest.device.partition(":")
        return HOST if kind == "cpu" or self.provider == "CPUExecutionProvider" else f"gpu:{index or 0}"

    @property
    def owner(self) -> str:
        """Its name in the memory's ledger."""
        return f"{self.name}/{self.generation}"

    async def _reserve(self) -> None:
        """Book memory before anything is started. UNAVAILABLE with the numbers if it does not fit."""
        if self._memory is None:
            return
        # nobody asked for it at this moment: a retry takes what is free and unloads nothing
        evict = not self._memory_tries
        key, device, file_bytes = self._size()
        await self._memory.reserve(
            self.owner,
            key,
            device=device,
            file_bytes=file_bytes,
            instances=self.manifest.worker.instances,
            evictable=self._evictable,
            evict=evict,
        )

    def _size(self) -> tuple[str, str, int]:
        """For the ledger: under which name its peak is kept, where its weights will be, and its file's bytes."""
        file = self.artifact.model_file if self.artifact is not None else self._folder.model_file
        return f"{self.owner}/{self.manifest.device}", self.device, weights_bytes(file)

    def _release(self) -> None:
        if self._memory is not None:
            self._memory.release(self.owner)

    def _wait_for_memory(self, reason: str) -> None:
        """FAILED, but only until there is room: `manager` tries again then."""
        self.waits_for_memory = True
        pause_s = backoff(self._memory_tries, MEMORY_PAUSE_S, MOST_MEMORY_PAUSE_S)
        self._memory_tries += 1
        self._memory_retry_s = time.monotonic() + pause_s
        self._to(ModelState.FAILED, f"waits for memory: {reason}")

    def memory_pause_s(self, now: float) -> float | None:
        """How long to wait before it is worth another try; None while it does not fit."""
        if self._memory is None or not self.waits_for_memory:
            return None
        key, device, file_bytes = self._size()
        instances = self.manifest.worker.instances
        fits = self._memory.fits(key, device=device, file_bytes=file_bytes, instances=instances)
        return max(0.0, self._memory_retry_s - now) if fits else None

    def again(self) -> None:
        """From waiting for memory to NEW: it is tried again."""
        fields = {"model": self.name, "version": self.version, "tries": self._memory_tries}
        log.info("memory.retried", extra={"fields": fields})
        self._events.publish("memory.retried", **fields)
        self.waits_for_memory = False
        self._to(ModelState.NEW)

    @property
    def wanted(self) -> str:
        """What is to be made of it, in a word or two; empty if it serves as it is."""
        return self._compiler.wanted(self._model, self._folder) if self._compiler is not None else ""

    @property
    def provider(self) -> str:
        """What really runs it; empty before it was loaded."""
        return self._traits.provider if self._traits is not None else ""

    @property
    def gave_out(self) -> bool:
        """Its engine failed in loading or serving, not on somebody's wish: the model may go on without that engine.

        `engine_refused`: the file does not load here any more, so it is to be made anew.
        """
        failed = self.state is ModelState.FAILED and not self.waits_for_memory
        return failed and self.artifact is not None and not self._unwanted

    @property
    def answering(self) -> bool:
        """READY, at least one worker lives, and so does its device."""
        if self._governor is not None and self._governor.condemned(self.device):
            return False
        return self.state is ModelState.READY and self.scheduler is not None and bool(self.scheduler.instances)

    def _to(self, state: ModelState, reason: str = "") -> None:
        self.state = model_transition(self.state, state)
        self.reason = reason
        level = logging.ERROR if state is ModelState.FAILED else logging.INFO
        fields = {"model": self.name, "version": self.version, "state": str(state)}
        if reason:
            fields["reason"] = reason
        log.log(level, "model.state", extra={"fields": fields})
        self._events.publish("model.state", **fields)
        self._on_change()

    async def build(self) -> None:
        """From NEW to BUILDING, with an artifact in the end, or to FAILED with the reason. `start` goes on from there."""
        assert self._compiler is not None
        self._to(ModelState.APPROVED)
        self._to(ModelState.BUILDING)
        try:
            self.artifact = await self._compiler.make(self._model, self._folder, self._progressed)
        except RejectedError as error:
            self.artifact, self.rejected = error.artifact, True
            self._to(ModelState.FAILED, error.message)
        except ApplianceError as error:
            self._to(ModelState.FAILED, error.message)

    def _progressed(self, progress: BuildProgress) -> None:
        """Say how far it is, in the reason and as an event: once for every percent at most."""
        reason = f"{progress.phase} {progress.percent:.0f} %"
        if reason != self.reason:
            self.reason = reason
            fields = {"model": self.name, "version": self.version, "state": str(self.state)}
            self._events.publish("model.progress", phase=progress.phase, percent=round(progress.percent, 1), **fields)

    async def _verify(self) -> None:
        """Hold an engine that is new against the reference. RejectedError with the reason if it must not serve."""
        if self.artifact is None or self.artifact.verified:
            return
        assert self._compiler is not None
        self._to(ModelState.VERIFYING)
        self.artifact = await self._compiler.verify(self._model, self._folder, self.artifact, self._progressed)

    async def start(self) -> None:
        """From NEW (or BUILDING) to READY, or to FAILED with the reason. Never raises for what is wrong with the model."""
        if self.state is ModelState.NEW:
            self._to(ModelState.APPROVED)
        try:
            await self._reserve()
        except MemoryShortError as error:
            if error.hopeless:
                self._to(ModelState.FAILED, error.message)
            else:
                self._wait_for_memory(error.numbers)
            return
        except ApplianceError as error:
            self._to(ModelState.FAILED, error.message)
            return
        self._to(ModelState.LOADING)
        begun = time.monotonic()
        opened: list[Instance] = []
        try:
            for number in range(self.manifest.worker.instances):
                opened.append(await self._open(number))  # noqa: PERF401  a comprehension would lose those opened before an error
        except ApplianceError as error:
            self.engine_refused = isinstance(error, LoadRefusedError)
            self._abandon(opened, error)
            return
        self._to(ModelState.WARMING)
        try:
            await self._verify()
        except ApplianceError as error:
            self.rejected = isinstance(error, RejectedError)
            self._abandon(opened, error)
            return
        layout = opened[0].layout
        assert layout is not None
        self._traits = opened[0].traits
        self._paying = paying_sizes(opened[0].batch_s)
        self.scheduler = Scheduler(
            layout,
            self.manifest,
            self.statistics,
            self.labels,
            on_instance_lost=self._instance_lost,
            on_idle=self._idle.set,
            governor=self._governor,
            device=self.device,
        )
        for instance in opened:
            self.scheduler.add_instance(instance)
            if instance.link.lost:
                self.scheduler.worker_lost(instance, "its worker ended while it was loaded")
        if self._memory is not None:
            pids = {instance.link.pid for instance in opened}
            self._memory.measured(self.owner, f"{self.owner}/{self.manifest.device}", pids)
        self._to(ModelState.READY)
        log.info(
            "model.ready",
            extra={
                "fields": {
                    "model": self.name,
                    "version": self.version,
                    "seconds": round(time.monotonic() - begun, 3),
                    "batch_sizes": list(paying_sizes(opened[0].batch_s)),
                    "unbatched": opened[0].traits.unbatched_reason,
                }
            },
        )

    def _abandon(self, opened: list[Instance], error: ApplianceError) -> None:
        for instance in opened:
            self._supervisor.close_instance(instance)
        if isinstance(error, NoRoomError) and self.artifact is None and self._memory is not None:
            # the ledger had it fit, so its own giving back is no reason to try again at once
            self._memory.budget.release(self.owner)
            self._wait_for_memory(error.message)
            return
        self._release()
        self._to(ModelState.FAILED, error.message)

    async def _open(self, number: int) -> Instance:
        cores = len(os.sched_getaffinity(0))
        options = EngineOptions(
            engine=self.artifact.engine if self.artifact is not None else self._folder.engine,
            model_file=self.artifact.model_file if self.artifact is not None else self._folder.model_file,
            device=self.manifest.device,
            max_batch_size=self.manifest.batching.max_batch_size,
            cores=max(1, cores // self.manifest.worker.instances),
            onnxruntime=self.manifest.onnxruntime,
            parameters=self.manifest.parameters,
            fallback=self.manifest.fallback,
        )
        opening = asyncio.create_task(self._load(options), name=f"open-{self.name}")
        # a replacement and a recycling may open at the same time
        self._opening.add(opening)
        try:
            instance = await opening
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._unwanted or (task is not None and task.cancelling()):
                raise
            raise unavailable("it was unloaded while it was loaded") from None
        finally:
            self._opening.discard(opening)
        instance.number = number
        return instance

    async def _load(self, options: EngineOptions) -> Instance:
        """A worker with the model. An engine may have been altered since it was found, or last loaded: AlteredError."""
        if self.artifact is not None:
            assert self._compiler is not None
            if not await self._compiler.intact(self.name, self.artifact):
                raise AlteredError
        return await self._supervisor.open_instance(f"{self.name}:{self.version}", options, self.manifest.worker)

    def give_up(self) -> None:
        """End a load that is under way: its worker is ended, and `start` comes back with FAILED. Nothing happens otherwise."""
        if self.state in (ModelState.APPROVED, ModelState.LOADING):
            self._end_opening()

    def _end_opening(self) -> None:
        """Whatever is being opened is not wanted any more: its worker is ended, and who waits for it hears UNAVAILABLE."""
        self._unwanted = True
        for opening in tuple(self._opening):
            opening.cancel()

    def _instance_lost(self, instance: Instance, reason: str) -> None:
        """A worker is gone: replace it after a pause, or quarantine the version when that happens too often."""
        culprit = instance.link.faulted
        fields = {
            "model": self.name,
            "version": self.version,
            "pid": instance.link.pid,
            "reason": reason,
            "device_fault": culprit is not None,
        }
        log.error("worker.lost", extra={"fields": fields})
        self._events.publish("worker.lost", **fields)
        if self.state is not ModelState.READY:
            return
        if culprit is not None and culprit != instance.handle:
            # another model of this shared worker met the fault: this one comes back without a mark against it
            delay_s: float | None = self._budget.pause_s
        else:
            delay_s = self._budget.next_delay(time.monotonic())
        if delay_s is None:
            self._quarantine(reason)
            return
        self._own(self._replace(instance.number, delay_s), f"replace-{self.name}")
        self._on_change()

    async def _replace(self, number: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while self.state is ModelState.READY:
            try:
                instance = await self._open(number)
            except AlteredError as error:
                # nothing brings it back: it is made anew, and meanwhile the model goes on without it
                self.engine_refused = True
                self._fail(error.message)
                return
            except ApplianceError as error:
                self.engine_refused = isinstance(error, LoadRefusedError)
                next_s = self._budget.next_delay(time.monotonic())
                if next_s is None:
                    self._quarantine(error.message)
                    return
                await asyncio.sleep(next_s)
                continue
            if self.state is not ModelState.READY or self.scheduler is None:
                self._supervisor.close_instance(instance)
                return
            self.restarts += 1
            self.scheduler.add_instance(instance)
            fields = {"model": self.name, "version": self.version, "pid": instance.link.pid, "restarts": self.restarts}
            log.info("worker.replaced", extra={"fields": fields})
            self._events.publish("worker.replaced", **fields)
            self._on_change()
            return

    async def recycle(self, instance: Instance, reason: str) -> None:
        """Replace a worker without losing a request: a new one first, then the old one finishes what it has, and ends.

        UNAVAILABLE if no new one comes up (then the old one goes on), or the version is not READY any more.
        """
        number = instance.number
        fresh = await self._open(number)
        scheduler = self.scheduler
        if self.state is not ModelState.READY or scheduler is None:
            self._supervisor.close_instance(fresh)
            raise self.not_ready()
        if instance.handle not in scheduler.instances:
            # it died meanwhile, and is being replaced the other way
            self._supervisor.close_instance(fresh)
            return
        scheduler.add_instance(fresh)
        await scheduler.retire_instance(instance)
        if instance.handle in scheduler.instances:
            del scheduler.instances[instance.handle]
            self._supervisor.close_instance(instance)
        fields = {"model": self.name, "version": self.version, "pid": fresh.link.pid, "reason": reason}
        log.info("worker.recycled", extra={"fields": fields})
        self._events.publish("worker.recycled", **fields)
        self._on_change()

    def _quarantine(self, reason: str) -> None:
        deaths = f"{self._budget.limit} deaths of its worker within {self._budget.window_s:g} s"
        self._fail(f"quarantined after {deaths}: {reason}")

    def _fail(self, text: str) -> None:
        """From READY to FAILED: every waiter hears why, and every worker is ended."""
        if self.state is not ModelState.READY:
            return
        self._to(ModelState.FAILED, text)
        if self.scheduler is not None:
            self.scheduler.fail_all(unavailable(f"model {self.name!r} gave out: {text}"))
            self._close_instances()
        self._release()

    def _own(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self, drain_timeout_s: float, reason: str = "") -> None:
        """Drain and unload. Waiters that outlast the timeout get UNAVAILABLE. From any state; afterwards UNLOADED."""
        if self.state is ModelState.READY:
            self._to(ModelState.DRAINING)
            await self._drain(drain_timeout_s)
        if self.state not in (ModelState.NEW, ModelState.FAILED, ModelState.UNLOADED):
            self._to(ModelState.UNLOADING)
        for task in list(self._tasks):
            task.cancel()
        self._end_opening()
        self.waits_for_memory = False
        if self.scheduler is not None:
            self.scheduler.fail_all(unavailable(f"model {self.name!r} was unloaded"))
            self.scheduler.close()
            self._close_instances()
            self.scheduler = None
        if self.state is not ModelState.UNLOADED:
            self._to(ModelState.UNLOADED, reason or self.reason)
        self._release()

    async def _drain(self, timeout_s: float) -> None:
        assert self.scheduler is not None
        try:
            async with asyncio.timeout(timeout_s):
                while not self.scheduler.idle:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning(
                "model.drain_timeout",
                extra={"fields": {"model": self.name, "version": self.version, "pending": self.scheduler.pending}},
            )

    def _close_instances(self) -> None:
        if self.scheduler is None:
            return
        for instance in list(self.scheduler.instances.values()):
            self._supervisor.close_instance(instance)
        self.scheduler.instances.clear()

    def describe(self, versions: tuple[Version, ...]) -> ModelDescription:
        """This version as clients see it; UNAVAILABLE with the reason unless it is READY."""
        traits = self._traits
        if self.state is not ModelState.READY or self.scheduler is None or traits is None:
            raise self.not_ready()
        layout = self.scheduler.layout
        return ModelDescription(
            name=self.name,
            version=self.version,
            versions=versions,
            platform=traits.platform,
            backend=traits.backend,
            inputs=layout.inputs,
            outputs=layout.outputs,
            max_batch_size=layout.max_rows if layout.batched else 0,
            max_queue_delay_us=int(self.manifest.batching.max_queue_delay_ms * 1000),
            instances=self.manifest.worker.instances,
            device=self.manifest.device,
            provider=traits.provider,
            labels=self.labels,
            description=self.manifest.description,
            unbatched_reason=traits.unbatched_reason,
            paying_batch_sizes=self._paying,
            engine=self.artifact.label if self.artifact is not None else "",
            verification=self.artifact.summary if self.artifact is not None else "",
            parameters=self.manifest.parameters,
        )

    async def verification(self) -> VerificationRecord:
        """What the gate found of what serves here, or must not serve (`rejected`). NOT_FOUND in words if no report is kept."""
        which = f"model {self.name!r} version {self.version}"
        if self._compiler is None:
            raise not_found(f"{which}: this appliance keeps no engines and no reports")
        kept = await self._compiler.report(self._model, self._folder, self.artifact)
        if kept is None:
            what = "no report of its engine is kept" if self.artifact is not None else "it serves as it is, unverified"
            raise not_found(f"{which}: {what}; `appliance verify {self.name}` makes one")
        label = self.artifact.label if self.artifact is not None else ""
        return VerificationRecord(self.name, self.version, label, kept[0], not self.rejected, msgspec.Raw(kept[1]))

    def not_ready(self) -> ApplianceError:
        """Why it does not answer now."""
        reason = f" ({self.reason})" if self.reason else ""
        return ApplianceError(
            ErrorCode.UNAVAILABLE,
            f"model {self.name!r} version {self.version} is not at ready state: {self.state}{reason}",
            retry_after_s=1.0,
        )

    def workers(self) -> list[WorkerDescription]:
        """Its worker processes, for `ps`."""
        if self.scheduler is None:
            return []
        return [
            WorkerDescription(
                model=self.name,
                version=self.version,
                instance=instance.number,
                pid=instance.link.pid,
                state="BUSY" if instance.in_flight else "IDLE",
                provider=instance.traits.provider,
                restarts=self.restarts,
                rss_bytes=0,
                batches=instance.batches,
                batch_size_cap=self.scheduler.coalesce_rows,
                engine=self.artifact.label if self.artifact is not None else "",
                details=instance.traits.details,
                arena_bytes=instance.memory.nbytes if instance.memory is not None else 0,
                slots=SLOTS,
                slots_in_use=len(instance.in_flight),
                configured_device=self.manifest.device,
                device=instance.traits.device,
                batch_ms={str(rows): round(seconds * 1000, 3) for rows, seconds in instance.batch_s.items()},
            )
            for instance in self.scheduler.instances.values()
        ]
