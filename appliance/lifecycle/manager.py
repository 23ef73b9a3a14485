"""Reconciles what is loaded with what is aspired to: one task per model name, one action of the policy at a time.

Sources set what is aspired (start, load, unload, a reread of the disk); `core.version_policy` says the next step; this carries it
out and publishes. The data plane only asks `resolve`. Engines that are built beside what serves are `builds`'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any

from appliance.config import RepositoryConfig, WorkersConfig
from appliance.core.description import IndexEntry, VerificationRecord
from appliance.core.errors import ApplianceError, ErrorCode, not_found, unavailable
from appliance.core.request import ModelName, Version
from appliance.core.states import ModelState, public_state
from appliance.core.version_policy import GenerationSnapshot, Load, Unload, aspired_versions, next_action
from appliance.lifecycle.builds import Builds
from appliance.lifecycle.compiler import Artifact, Compiler
from appliance.lifecycle.memory import LOOK_AGAIN_S, ModelMemory
from appliance.lifecycle.model import Model
from appliance.lifecycle.model_version import ModelVersion
from appliance.lifecycle.repository import ModelFolder, Repository
from appliance.observability.events import EventBus
from appliance.scheduling.governor import Governor
from appliance.workers.supervisor import Supervisor

log = logging.getLogger(__name__)


class Manager:
    """The models. `start` loads what the configuration says, in the background; `close` drains and unloads all."""

    def __init__(
        self,
        repository: Repository,
        supervisor: Supervisor,
        events: EventBus,
        *,
        config: RepositoryConfig,
        workers: WorkersConfig,
        drain_timeout_s: float,
        compiler: Compiler | None = None,
        governor: Governor | None = None,
        memory: ModelMemory | None = None,
    ) -> None:
        self._governor = governor
        self._memory = memory
        if memory is not None:
            memory.attach(self._usage, self._evict, self._memory_freed)
        self._repository = repository
        self._compiler = compiler
        self._supervisor = supervisor
        self._events = events
        self._config = config
        self._workers = workers
        self._drain_timeout_s = drain_timeout_s
        self._models: dict[ModelName, Model] = {}
        self._loads = asyncio.Semaphore(config.parallel_loads)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._builds = Builds(
            compiler,
            events,
            generation=self._generation,
            reconcile=self._reconcile,
            loads=self._loads,
            in_use=self._engines_in_use,
        )
        self._required: frozenset[ModelName] = frozenset()
        self._wanted: frozenset[ModelName] = frozenset()
        self._closed = False
        self._waiting: asyncio.Task[None] | None = None
        self._room = asyncio.Event()

    @property
    def repository(self) -> str:
        """Which folder it serves: `Repository.identity`."""
        return self._repository.identity

    @property
    def models(self) -> dict[ModelName, Model]:
        """Every model that was ever asked for or seen on disk."""
        return self._models

    def start(self) -> list[ModelName]:
        """Aspire to what the configuration lists (or to all there is), and begin; the names begun."""
        folders = self._repository.scan()
        for name, folder in folders.items():
            self._model(name).folder = folder
        names = list(folders) if self._config.load == "all" else [ModelName(name) for name in self._config.models]
        for name in names:
            self._own(self._bring(self._model(name), folders.get(name)), f"reconcile-{name}")
        self._required = frozenset(ModelName(name) for name in self._config.required) or frozenset(names)
        self._wanted = frozenset(names)
        self._tell_unservable()
        return names

    def reconfigure(self, config: RepositoryConfig, drain_timeout_s: float) -> None:
        """A reload: look at the disk again, load what is new or changed, unload what is gone from disk or list.

        OSError: the folder cannot be read, and nothing has changed.
        """
        if self._closed:
            return
        folders = self._repository.scan()
        self._config = config
        self._drain_timeout_s = drain_timeout_s
        names = set(folders) if config.load == "all" else {ModelName(name) for name in config.models}
        for name in names | {name for name, model in self._models.items() if model.aspired}:
            model = self._model(name)
            self._own(self._bring(model, folders.get(name) if name in names else None), f"reconcile-{name}")
        for name in {*self._models, *folders}:
            # one that is gone from the disk is gone from the index, too, once it is unloaded
            self._model(name).folder = folders.get(name)
        self._required = frozenset(ModelName(name) for name in config.required) or frozenset(names)
        self._wanted = frozenset(names)
        self._tell_unservable()

    def _tell_unservable(self) -> None:
        """What is wrong on disk never becomes a generation whose state could be told, so it is told here."""
        for name, version, reason in self.unservable():
            model = self._models.get(name)
            missing = model is None or model.folder is None
            fields = {"model": name, "version": version, "state": str(ModelState.FAILED), "reason": reason}
            log.error("model.missing" if missing else "model.state", extra={"fields": fields})
            self._events.publish("model.state", **fields)
        for name in self._wanted:
            model = self._models[name]
            if model.folder is not None and model.folder.problem and model.generations:
                fields = {"model": name, "reason": f"{model.folder.problem}; what was loaded before serves on"}
                log.error("model.broken", extra={"fields": fields})

    def unservable(self) -> list[tuple[ModelName, Version, str]]:
        """What is wanted here and cannot even be begun, with its reason: wrong folders (version "") or versions, missing folders.

        A version that the policy would not choose is not wanted.
        """
        found = []
        for name in sorted(self._wanted | self._required):
            model = self._models.get(name)
            folder = model.folder if model is not None else None
            known = {generation.version for generation in model.generations.values()} if model is not None else set()
            if folder is None or folder.problem:
                if not known:
                    reason = "there is no model folder of that name" if folder is None else folder.problem
                    found.append((name, Version(""), reason))
                continue
            chosen = aspired_versions({*folder.versions, *folder.broken}, folder.manifest.versions)
            found += [
                (name, Version(str(number)), folder.broken[number])
                for number in sorted(folder.broken)
                if number in chosen and str(number) not in known
            ]
        return found

    def _model(self, name: ModelName) -> Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = Model(name)
        return model

    async def _bring(self, model: Model, folder: ModelFolder | None) -> bool:
        """Aspire to what is in a folder (None: to nothing), with the engines that are kept for it, and reconcile.

        Versions for which a better engine is wanted and none is kept serve as they are, and it is built meanwhile. False if
        something else was asked of this model before this was done: then that counts.
        """
        turn = model.ask()
        artifacts = await self._builds.find(model, folder) if folder is not None else {}
        if model.turn != turn:
            return False
        self._builds.end(model)
        self._aspire(model, folder, artifacts)
        model.found = {}
        await self._reconcile(model)
        if model.turn != turn:
            return False
        if folder is not None:
            kept = {number for number in artifacts if number not in model.remake}
            self._builds.begin(model, folder, kept)
        return True

    async def _recover(self, model: Model) -> None:
        """An engine gave out while it served: go on without it, and make it anew if it does not load any more."""
        turn = model.turn
        await self._reconcile(model)
        if model.turn == turn:
            self._builds.remake(model)

    def _changed(self, model: Model) -> None:
        """A generation changed its state."""
        model.refresh()
        if any(generation.waits_for_memory for generation in model.generations.values()):
            self._memory_freed()
        if model.gave_out and not model.lock.locked():
            self._own(self._recover(model), f"recover-{model.name}")

    def _generation(self, model: Model, folder: ModelFolder, number: int, artifact: Artifact | None) -> ModelVersion:
        return ModelVersion(
            folder,
            folder.versions[number],
            supervisor=self._supervisor,
            events=self._events,
            workers=self._workers,
            on_change=lambda: self._changed(model),
            compiler=self._compiler,
            artifact=artifact,
            governor=self._governor,
            memory=self._memory,
            evictable=folder.manifest.worker.evictable and model.name not in self._config.required,
        )

    def _engines_in_use(self) -> frozenset[str]:
        """The keys of engines that serve, are to serve, or are shown as what could not be."""
        return frozenset(key for model in self._models.values() for key in model.engines)

    def _aspire(self, model: Model, folder: ModelFolder | None, artifacts: dict[int, Artifact]) -> None:
        """Set the aspired generations from a folder (None: nothing), making records for new ones."""
        if folder is None or folder.problem:
            if folder is not None:
                model.folder = folder
            # what serves goes on serving when its folder was broken; a folder that is gone means: unload
            if folder is None:
                model.aspired = frozenset()
            model.refresh()
            return
        model.folder = folder
        aspired = set()
        for number in aspired_versions(folder.versions, folder.manifest.versions):
            made = self._generation(model, folder, number, artifacts.get(number))
            known = model.generations.get(made.generation)
            if known is None or known.state in (ModelState.FAILED, ModelState.UNLOADED):
                model.generations[made.generation] = made
            aspired.add(made.generation)
        model.aspired = frozenset(aspired)
        model.refresh()

    async def _reconcile(self, model: Model) -> None:
        """Take the policy's steps until facts and aspirations agree."""
        async with model.lock:
            while True:
                await self._builds.go_without(model)
                action = next_action(
                    [
                        GenerationSnapshot(key, generation.state, key in model.aspired)
                        for key, generation in model.generations.items()
                    ]
                )
                match action:
                    case None:
                        break
                    case Load(generation):
                        async with self._loads:
                            await model.generations[generation].start()
                    case Unload(generation):
                        await model.generations[generation].stop(self._drain_timeout_s)
                        if generation not in model.aspired:
                            del model.generations[generation]
                model.refresh()

    async def load(self, name: ModelName) -> None:
        """Read the folder anew and bring it up; returns when it is READY. See `InferenceService.load` for the errors."""
        folder = self._repository.read(name)
        if folder is None:
            raise not_found(f"failed to load '{name}': there is no model folder of that name")
        if folder.problem:
            raise ApplianceError(ErrorCode.INVALID_ARGUMENT, f"failed to load '{name}': {folder.problem}")
        model = self._model(name)
        if not await self._bring(model, folder):
            raise unavailable(f"failed to load '{name}': it was unloaded while it was loaded, or loaded anew")
        if not model.aspired:
            reason = "; ".join(folder.broken.values()) or "no version on disk is one of those the version policy names"
            raise ApplianceError(ErrorCode.INVALID_ARGUMENT, f"failed to load '{name}': {reason}")
        failed = [
            generation
            for key, generation in model.generations.items()
            if key in model.aspired and generation.state is ModelState.FAILED
        ]
        if failed:
            message = f"failed to load '{name}': {failed[0].reason}"
            if failed[0].waits_for_memory:
                raise unavailable(f"{message}; it is loaded as soon as there is room", retry_after_s=10.0)
            raise ApplianceError(ErrorCode.INVALID_ARGUMENT, message)

    def _usage(self) -> Iterator[tuple[str, float, bool]]:
        """For the ledger: who was used when. Statistics tell in wall-clock time, whose order is all that counts."""
        for generation in self.generations():
            pending = generation.scheduler.pending if generation.scheduler is not None else 0
            busy = pending > 0 or generation.state is not ModelState.READY
            yield generation.owner, generation.statistics.last_inference_ms / 1000, busy

    async def _evict(self, owner: str, wanted_by: str) -> None:
        """Unload an idle version for another one. It stays unloaded until somebody loads it: nothing is loaded on demand."""
        for model in self._models.values():
            for key, generation in model.generations.items():
                if generation.owner == owner:
                    model.aspired -= {key}
                    self._required -= {model.name}
                    await generation.stop(self._drain_timeout_s, f"evicted for {wanted_by}")
                    model.refresh()
                    return

    def _memory_freed(self) -> None:
        """Somebody gave memory back, or waits for some: see whether a version that waits fits now."""
        self._room.set()
        if self._closed or (self._waiting is not None and not self._waiting.done()):
            return
        if any(generation.waits_for_memory for generation in self.generations()):
            self._waiting = asyncio.create_task(self._load_what_waits(), name="waiting-for-memory")
            self._waiting.add_done_callback(self._finished)

    async def _load_what_waits(self) -> None:
        """Try versions that fit now again, one at a time, until none does. Each waits longer from try to try."""
        while True:
            self._room.clear()
            now = time.monotonic()
            waiting = [
                (model, generation)
                for model in self._models.values()
                for key, generation in model.generations.items()
                if key in model.aspired and generation.waits_for_memory
            ]
            if not waiting:
                return
            pauses = [
                (pause_s, model, generation)
                for model, generation in waiting
                if (pause_s := generation.memory_pause_s(now)) is not None
            ]
            pause_s, model, generation = min(pauses, key=lambda entry: entry[0], default=(LOOK_AGAIN_S, *waiting[0]))
            if pause_s > 0:
                # another one may fit sooner; and nobody tells us of memory that other programs give back
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(pause_s, LOOK_AGAIN_S)):
                        await self._room.wait()
                continue
            generation.again()
            await self._reconcile(model)

    async def unload(self, name: ModelName) -> None:
        """Drain and unload every version; returns when they are gone. NOT_FOUND for a name never seen."""
        model = self._models.get(name)
        if model is None or (not model.generations and model.folder is None):
            raise not_found(f"Request for unknown model: '{name}' is not found")
        model.ask()
        ending = self._builds.end(model)
        model.aspired = frozenset()
        model.refresh()
        for generation in model.generations.values():
            generation.give_up()
        await self._reconcile(model)
        if ending:
            # a build takes memory, too: unloaded means that its process is gone
            await asyncio.wait(ending)

    def resolve(self, name: ModelName, version: Version) -> ModelVersion:
        """The generation that answers for this name and version ("" for the newest); NOT_FOUND or UNAVAILABLE."""
        model = self._models.get(name)
        if model is not None:
            found = model.ready.get(version) if version else model.newest
            if found is not None:
                return found
        return self._unresolved(model, name, version)

    def _unresolved(self, model: Model | None, name: ModelName, version: Version) -> ModelVersion:
        if model is None or (not model.generations and model.folder is None):
            raise not_found(f"Request for unknown model: '{name}' is not found")
        candidates = [generation for generation in model.generations.values() if version in ("", generation.version)]
        if candidates:
            raise candidates[-1].not_ready()
        folder = model.folder
        if version and (
            folder is None or not version.isdecimal() or int(version) not in {*folder.versions, *folder.broken}
        ):
            raise not_found(f"Request for unknown model: '{name}' version {version} is not found")
        reason = folder.problem if folder is not None and folder.problem else "it is not loaded"
        raise unavailable(f"model '{name}' is not at ready state: {reason}")

    async def verification(self, name: ModelName, version: Version) -> VerificationRecord:
        """What the gate found of an engine that must not serve, or else of what does. As `resolve`, or NOT_FOUND in words."""
        model = self._models.get(name)
        if model is not None:
            for number in sorted(model.candidates, reverse=True):
                candidate = model.candidates[number]
                if candidate.rejected and version in ("", candidate.version):
                    return await candidate.verification()
        return await self.resolve(name, version).verification()

    def known(self, name: ModelName, version: Version) -> bool:
        """Whether that name, and that version of it, exists here in any state."""
        try:
            self.resolve(name, version)
        except ApplianceError as error:
            return error.code is not ErrorCode.NOT_FOUND
        return True

    def versions(self, name: ModelName) -> tuple[Version, ...]:
        """The versions that answer now, ascending."""
        return tuple(sorted(self._models[name].ready, key=int))

    @property
    def required(self) -> frozenset[ModelName]:
        """The models that readiness waits for."""
        return self._required

    @property
    def ready(self) -> bool:
        """Every required model answers."""
        for name in self._required:
            model = self._models.get(name)
            if model is None or not any(generation.answering for generation in model.ready.values()):
                return False
        return True

    @property
    def settled(self) -> bool:
        """Nothing is being loaded or unloaded. Builds go on beside what serves, and are not waited for."""
        return not self._tasks

    @property
    def memory(self) -> ModelMemory | None:
        """The ledger; None if there is none."""
        return self._memory

    def generations(self) -> Iterable[ModelVersion]:
        """Every generation there is a record of."""
        for model in self._models.values():
            yield from model.generations.values()

    def index(self, *, ready_only: bool) -> list[IndexEntry]:
        """Triton's repository index: loaded and failed versions, broken folders, and those nobody asked for."""
        entries = []
        for name, model in sorted(self._models.items()):
            shown = {generation.version: generation for generation in model.generations.values()}
            for generation in model.ready.values():
                shown[generation.version] = generation
            for version, generation in sorted(shown.items(), key=lambda item: int(item[0])):
                entries.append(IndexEntry(name, version, public_state(generation.state), model.reason(generation)))
            folder = model.folder
            if folder is None:
                continue
            entries.extend(
                IndexEntry(name, str(number), "UNAVAILABLE", reason)
                for number, reason in sorted(folder.broken.items())
                if str(number) not in shown
            )
            if folder.problem and not shown:
                entries.append(IndexEntry(name, "", "UNAVAILABLE", folder.problem))
            elif not shown and not folder.broken:
                entries.append(IndexEntry(name, "", "UNAVAILABLE", "unloaded"))
        return [entry for entry in entries if entry.state == "READY" or not ready_only]

    def _own(self, coroutine: Coroutine[None, None, object], name: str) -> None:
        task: asyncio.Task[object] = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("manager.task_failed", exc_info=task.exception(), extra={"fields": {"task": task.get_name()}})

    async def close(self, drain_timeout_s: float) -> None:
        """Stop loading, drain every version at once, unload all."""
        self._closed = True
        waiting = [] if self._waiting is None else [self._waiting]
        tasks = [*self._tasks, *self._builds.tasks, *waiting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(generation.stop(drain_timeout_s) for generation in self.generations()))
        for model in self._models.values():
            model.refresh()
