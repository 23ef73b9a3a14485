"""What is built beside what serves: engines that are kept, under way, switched to, gone without, or made anew.

Works on the same `Model` records as `manager`, which owns this and reconciles afterwards. Without a compiler nothing is built.
Which engine is wanted, and what is kept, is the compiler's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol

from appliance.core.states import ModelState
from appliance.core.version_policy import aspired_versions
from appliance.lifecycle.compiler import Artifact, Compiler
from appliance.lifecycle.memory import LOOK_AGAIN_S
from appliance.lifecycle.model import Model
from appliance.lifecycle.model_version import ModelVersion
from appliance.lifecycle.repository import ModelFolder
from appliance.observability.events import EventBus

log = logging.getLogger(__name__)


class Generations(Protocol):
    """Makes the record of a generation."""

    def __call__(self, model: Model, folder: ModelFolder, number: int, artifact: Artifact | None) -> ModelVersion:
        """That version of that folder, run by that engine (None: as it is)."""


class Builds:
    """The builds of all models. `reconcile` is called when what is aspired to has changed; `loads` limits loads under way.

    `in_use` gives the keys of the engines that must be kept whatever they take.
    """

    def __init__(
        self,
        compiler: Compiler | None,
        events: EventBus,
        *,
        generation: Generations,
        reconcile: Callable[[Model], Awaitable[None]],
        loads: asyncio.Semaphore,
        in_use: Callable[[], frozenset[str]],
    ) -> None:
        self._compiler = compiler
        self._events = events
        self._generation = generation
        self._reconcile = reconcile
        self._loads = loads
        self._in_use = in_use
        self.tasks: set[asyncio.Task[Any]] = set()

    async def find(self, model: Model, folder: ModelFolder) -> dict[int, Artifact]:
        """The engines that are kept for the versions to be served, by version."""
        found: dict[int, Artifact] = {}
        model.found = found
        if self._compiler is None or folder.problem:
            return found
        for number in aspired_versions(folder.versions, folder.manifest.versions):
            version = folder.versions[number]
            if not self._compiler.wanted(folder, version):
                continue
            artifact = await self._compiler.find(folder, version)
            if artifact is not None:
                found[number] = artifact
        return found

    def begin(self, model: Model, folder: ModelFolder, kept: Collection[int]) -> None:
        """Begin to build what is wanted and not kept."""
        if self._compiler is None or folder.problem:
            return
        for number in aspired_versions(folder.versions, folder.manifest.versions):
            if number in kept or not self._compiler.wanted(folder, folder.versions[number]):
                continue
            candidate = self._generation(model, folder, number, None)
            model.remake.discard(number)
            model.candidates[number] = candidate
            task = asyncio.create_task(self._build(model, candidate), name=f"build-{model.name}")
            model.builds.add(task)
            self.tasks.add(task)
            task.add_done_callback(self._finished)
            task.add_done_callback(model.builds.discard)

    def end(self, model: Model) -> list[asyncio.Task[None]]:
        """Something else is asked of this model: end what is built for it. The tasks that are ending."""
        ending = list(model.builds)
        for task in ending:
            task.cancel()
        model.candidates.clear()
        model.remake.clear()
        return ending

    async def _build(self, model: Model, candidate: ModelVersion) -> None:
        """Build an engine, load it beside what serves, verify it, and switch; or leave all as it is, with the reason."""
        replaced = candidate.generation
        await candidate.build()
        model.refresh()
        if candidate.state is ModelState.FAILED:
            return
        while not await self._switch(model, replaced, candidate):
            await self._room(candidate)
            candidate.again()
        await self._reconcile(model)
        assert self._compiler is not None
        await self._compiler.prune(self._in_use)

    async def _switch(self, model: Model, replaced: str, candidate: ModelVersion) -> bool:
        """Let it serve in the other's place if it comes up; False if it only waits for memory beside what serves."""
        async with model.lock:
            if replaced not in model.aspired:
                await candidate.stop(0)
                return True
            async with self._loads:
                await candidate.start()
            if candidate.state is ModelState.READY:
                model.candidates.pop(candidate.number, None)
                model.generations[candidate.generation] = candidate
                model.aspired = model.aspired - {replaced} | {candidate.generation}
            elif not candidate.waits_for_memory:
                await self._discard(model, candidate)
            model.refresh()
            return not candidate.waits_for_memory

    async def _room(self, candidate: ModelVersion) -> None:
        """Until it is worth another try. Nothing hurries: the model serves without it."""
        while (pause_s := candidate.memory_pause_s(time.monotonic())) != 0:  # noqa: ASYNC110  other programs tell us nothing
            await asyncio.sleep(LOOK_AGAIN_S if pause_s is None else pause_s)

    async def _discard(self, model: Model, failed: ModelVersion) -> None:
        """Have an engine made anew, next time it is wanted, that does not load here any more."""
        if failed.gave_out and failed.engine_refused and failed.artifact is not None and model.folder is not None:
            assert self._compiler is not None
            await self._compiler.discard(model.folder, failed.artifact, failed.reason)

    async def go_without(self, model: Model) -> None:
        """In the place of an engine that gave out, aspire to the model as it is, where its device and fallback allow that.

        The failed one is shown beside it as what could not be, until the engine is made anew.
        """
        folder = model.folder
        for key, failed in list(model.generations.items()):
            if key not in model.aspired or not failed.gave_out or folder is None:
                continue
            version = folder.versions.get(failed.number)
            if version is None or version.fingerprint != failed.fingerprint:
                continue
            fields = {"model": model.name, "version": failed.version, "reason": failed.reason}
            log.warning("engine.gave_out", extra={"fields": fields})
            self._events.publish("engine.gave_out", **fields)
            if failed.engine_refused:
                await self._discard(model, failed)
                model.remake.add(failed.number)
            plain = self._generation(model, folder, failed.number, None)
            del model.generations[key]
            model.generations[plain.generation] = plain
            model.candidates[failed.number] = failed
            model.aspired = model.aspired - {key} | {plain.generation}
            model.refresh()

    def remake(self, model: Model) -> None:
        """Begin to make anew what did not load here any more."""
        if model.folder is not None and model.remake:
            self.begin(model, model.folder, set(model.folder.versions) - model.remake)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("manager.task_failed", exc_info=task.exception(), extra={"fields": {"task": task.get_name()}})
