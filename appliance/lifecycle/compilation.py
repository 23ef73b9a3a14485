"""The compiler of a running appliance: kept engines, and builds in processes of their own, one at a time.

Which engine is wanted follows from the manifest and from what this box has; a build, a verdict and what is kept are `building`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from appliance.building import jobs, keys
from appliance.building.orders import (
    BuildError,
    BuildOrder,
    CheckOrder,
    DeviceFacts,
    Order,
    Outcome,
    ProbeOrder,
    Result,
    Target,
    wanted_engine,
)
from appliance.building.store import EngineStore, StoreError, as_is
from appliance.config import Config, EnginesConfig
from appliance.core.errors import ApplianceError, unavailable
from appliance.core.manifest import ModelManifest
from appliance.core.request import ModelName
from appliance.lifecycle.compiler import Artifact, BuildProgress, OnProgress, RejectedError
from appliance.lifecycle.repository import ModelFolder, VersionFolder
from appliance.scheduling.governor import Governor

log = logging.getLogger(__name__)

PROBE_BUDGET_S = 60.0
MIB = 1 << 20


def engines_path(config: Config) -> Path:
    """Where engines are kept: configured, or what systemd gives for state, or `.engines` in the model repository."""
    if config.engines.path:
        return Path(config.engines.path)
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0]) / "engines"
    return Path(config.repository.path).resolve() / ".engines"


def tensorrt_flavour() -> str:
    """The TensorRT that this box could run, found without importing it: a package, and a driver that is loaded."""
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/nvhost-ctrl-gpu").exists():
        return ""
    for flavour in ("tensorrt", "tensorrt_rtx"):
        if any(find_spec(name) is not None for name in (flavour, f"{flavour}_bindings")):
            return flavour
    return ""


def device_index(manifest: ModelManifest) -> int:
    """The number in "cuda:1"; 0 for "cuda"."""
    return int(manifest.device.partition(":")[2] or 0)


class ModelCompiler:
    """Implements `compiler.Compiler`. Errors are UNAVAILABLE with the reason."""

    def __init__(
        self, path: Path, config: EnginesConfig, governor: Governor | None = None, *, sandbox: bool = True
    ) -> None:
        self._sandbox = sandbox
        self._governor = governor
        self._path = path
        self._config = config
        self._flavour = tensorrt_flavour()
        self._turn = asyncio.Semaphore(1)
        self._devices: dict[int, DeviceFacts] = {}

    def wanted(self, folder: ModelFolder, version: VersionFolder) -> str:
        """What should be made of this version; empty if it serves as it is."""
        engine = wanted_engine(folder.manifest, tensorrt=self._flavour)
        return self._target(folder, version, engine, DeviceFacts()).label if engine and version.model_file else ""

    def _target(self, folder: ModelFolder, version: VersionFolder, engine: str, device: DeviceFacts) -> Target:
        return target(self._path, folder, version, engine, device)

    async def _complete(self, folder: ModelFolder, version: VersionFolder) -> Target:
        """The target with what is known of the GPU, which is looked at once, in a process of its own."""
        engine = wanted_engine(folder.manifest, tensorrt=self._flavour)
        if engine == "onnxruntime":
            return self._target(folder, version, engine, DeviceFacts())
        index = device_index(folder.manifest)
        if index not in self._devices:
            result = await self._run(ProbeOrder(index), _silent, PROBE_BUDGET_S)
            assert result.device is not None
            self._devices[index] = result.device
        return self._target(folder, version, engine, self._devices[index])

    async def _run(self, order: Order, on_progress: OnProgress, budget_s: float) -> Result:
        try:
            return await jobs.run(
                order,
                lambda phase, percent: on_progress(BuildProgress(phase, percent)),
                time_budget_s=budget_s,
                memory_limit_mb=self._config.memory_limit_mb,
                sandbox=self._sandbox,
            )
        except BuildError as error:
            raise unavailable(str(error)) from error

    async def find(self, folder: ModelFolder, version: VersionFolder) -> Artifact | None:
        """The verified engine that is kept for exactly this, or None."""
        try:
            wanted = await self._complete(folder, version)
        except ApplianceError as error:
            log.warning("engine.no_device", extra={"fields": {"model": folder.name, "reason": error.message}})
            return None
        outcome = await self._lookup(wanted)
        if outcome is None or outcome.verified != "passed":
            return None
        return self._artifact(outcome, verified=True)

    async def _lookup(self, wanted: Target) -> Outcome | None:
        try:
            return await asyncio.to_thread(keys.find, wanted)
        except BuildError as error:
            log.warning("engine.unreadable", extra={"fields": {"model": wanted.model, "reason": str(error)}})
            return None

    def _artifact(self, outcome: Outcome, *, verified: bool) -> Artifact:
        return Artifact(outcome.engine, outcome.model_file, outcome.digest, outcome.label, verified, outcome.summary)

    async def make(self, folder: ModelFolder, version: VersionFolder, on_progress: OnProgress) -> Artifact:
        """Build it, or take the one that is kept; RejectedError for one that failed its verification."""
        wanted = await self._complete(folder, version)
        known = await self._lookup(wanted)
        if known is not None and known.verified == "failed":
            raise RejectedError(self._artifact(known, verified=False), known.reason)
        async with self._turn:
            await self._cool(on_progress)
            order = BuildOrder(wanted)
            result = await self._run(order, on_progress, folder.manifest.build.time_budget_s)
        assert result.outcome is not None
        return self._artifact(result.outcome, verified=result.outcome.verified == "passed")

    async def _cool(self, on_progress: OnProgress) -> None:
        """A build that is wanted while it is warm waits, and says why. One that runs is not stopped: it would begin anew."""
        if self._governor is not None and not self._governor.gates.builds:
            on_progress(BuildProgress(f"waiting: {self._governor.gates.reason}", 0.0))
            await self._governor.builds_allowed()

    async def verify(
        self, folder: ModelFolder, version: VersionFolder, artifact: Artifact, on_progress: OnProgress
    ) -> Artifact:
        """Hold it against the reference; RejectedError says by how much it missed what."""
        wanted = await self._complete(folder, version)
        async with self._turn:
            await self._cool(on_progress)
            order = CheckOrder(wanted, artifact.key)
            result = await self._run(order, on_progress, folder.manifest.build.time_budget_s)
        assert result.outcome is not None
        if result.outcome.verified != "passed":
            raise RejectedError(self._artifact(result.outcome, verified=False), result.outcome.reason)
        return self._artifact(result.outcome, verified=True)

    async def report(
        self, folder: ModelFolder, version: VersionFolder, artifact: Artifact | None
    ) -> tuple[str, bytes] | None:
        """The report that was kept beside the engine, or on the version as it is now."""
        try:
            return await asyncio.to_thread(self._report, folder, version, artifact)
        except (StoreError, OSError, BuildError) as error:
            raise unavailable(f"the report cannot be read: {error}") from error

    def _report(
        self, folder: ModelFolder, version: VersionFolder, artifact: Artifact | None
    ) -> tuple[str, bytes] | None:
        if artifact is not None:
            key = artifact.key
        else:
            plain = self._target(folder, version, "onnxruntime", DeviceFacts())
            key = as_is(plain.version, keys.as_is_digest(plain))
        found = EngineStore(self._path).report(folder.name, key)
        return (key, found) if found is not None else None

    async def intact(self, model: ModelName, artifact: Artifact) -> bool:
        """The seal and every digest, read anew each time: 0.6 s for a GiB, less than the load that follows it takes.

        That size and times are as before would not do: a failing disk changes neither.
        """
        try:
            return await asyncio.to_thread(self._intact, model, artifact)
        except StoreError as error:
            raise unavailable(f"whether its engine was altered cannot be told: {error}") from error

    def _intact(self, model: ModelName, artifact: Artifact) -> bool:
        store = EngineStore(self._path)
        entry = store.find(model, artifact.key)
        if entry is None or str(entry.model_file) != artifact.model_file:
            return False
        store.used(entry)
        return True

    async def prune(self, in_use: Callable[[], frozenset[str]]) -> None:
        """Least recently loaded first. Between builds: nobody can name yet what one that runs has just made."""
        async with self._turn:
            most, keep = self._config.max_size_mb * MIB, in_use()
            try:
                removed = await asyncio.to_thread(EngineStore(self._path).prune, most, keep)
            except (StoreError, OSError) as error:
                log.warning("engine.not_pruned", extra={"fields": {"reason": str(error)}})
                return
        if removed:
            log.info("engine.pruned", extra={"fields": {"engines": removed}})

    async def discard(self, folder: ModelFolder, artifact: Artifact, reason: str) -> None:
        """Remove it from the store, and look at the GPU anew: a driver or a card may have changed under us."""
        fields = {"model": folder.name, "engine": artifact.label, "key": artifact.key, "reason": reason}
        log.warning("engine.discarded", extra={"fields": fields})
        self._devices.clear()
        try:
            await asyncio.to_thread(EngineStore(self._path).drop, folder.name, artifact.key)
        except StoreError as error:
            log.error("engine.not_discarded", extra={"fields": fields | {"error": str(error)}})


def target(path: Path, folder: ModelFolder, version: VersionFolder, engine: str, device: DeviceFacts) -> Target:
    """What a build process needs to know of that version."""
    return Target(
        store=str(path.absolute()),
        model=folder.name,
        version=str(version.version),
        source=version.model_file,
        folder=str(Path(version.model_file).parent.parent),
        engine=engine,
        manifest=folder.manifest,
        labels=folder.labels,
        device=device,
    )


def _silent(_progress: BuildProgress) -> None:
    pass
