"""All generations of one model name: which are aspired to, which answer, and what is being built beside them.

A record that `manager` and `builds` work on; it decides nothing but which generation answers for a version.
"""

from __future__ import annotations

import asyncio

from appliance.core.request import ModelName, Version
from appliance.core.states import ModelState
from appliance.lifecycle.compiler import Artifact
from appliance.lifecycle.model_version import ModelVersion
from appliance.lifecycle.repository import ModelFolder


class Model:
    """One name.

    `candidates`, by version number, are the newest engines that do not serve: under way, or failed with their reason. `remake`
    are versions whose kept engine did not load here, so that it is to be made anew. `found` are engines that a look at what is
    kept has given, until they have their generations. `turn` counts what was asked of this model.
    """

    def __init__(self, name: ModelName) -> None:
        self.name = name
        self.folder: ModelFolder | None = None
        self.generations: dict[str, ModelVersion] = {}
        self.candidates: dict[int, ModelVersion] = {}
        self.builds: set[asyncio.Task[None]] = set()
        self.remake: set[int] = set()
        self.found: dict[int, Artifact] = {}
        self.turn = 0
        self.aspired: frozenset[str] = frozenset()
        self.ready: dict[Version, ModelVersion] = {}
        self.newest: ModelVersion | None = None
        self.changed = asyncio.Event()
        self.lock = asyncio.Lock()

    def ask(self) -> int:
        """Something is asked of this model; the turn, by which whoever does it sees whether something else was asked since."""
        self.turn += 1
        self.found = {}
        return self.turn

    def refresh(self) -> None:
        """What answers now, by version; of two generations of one version the aspired one."""
        ready: dict[Version, ModelVersion] = {}
        for key, generation in self.generations.items():
            if generation.state is ModelState.READY and (generation.version not in ready or key in self.aspired):
                ready[generation.version] = generation
        self.ready = ready
        self.newest = max(ready.values(), key=lambda generation: generation.number, default=None)
        self.changed.set()

    @property
    def gave_out(self) -> bool:
        """Whether the engine of something that is aspired to has failed."""
        return any(key in self.aspired and generation.gave_out for key, generation in self.generations.items())

    @property
    def engines(self) -> set[str]:
        """The keys of the engines that its generations and candidates have, or are about to have."""
        alive = [
            one
            for one in (*self.generations.values(), *self.candidates.values())
            if one.state is not ModelState.UNLOADED
        ]
        artifacts = [*self.found.values(), *(one.artifact for one in alive if one.artifact is not None)]
        return {artifact.key for artifact in artifacts}

    def reason(self, generation: ModelVersion) -> str:
        """Why a version is as it is, and what is being built for it or could not be."""
        candidate = self.candidates.get(generation.number)
        if candidate is None:
            return generation.reason
        building = f"{candidate.wanted}: {candidate.state} {candidate.reason}".strip()
        return f"{generation.reason}; {building}" if generation.reason else building
