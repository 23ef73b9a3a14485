"""A compiler that makes engines of a wish: what it keeps, what it makes, what it was told to discard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from appliance.core.errors import unavailable
from appliance.core.request import ModelName
from appliance.lifecycle.compiler import Artifact, OnProgress
from appliance.lifecycle.repository import ModelFolder, VersionFolder


class FakeCompiler:
    """Wants "better" for every version. `kept` is found; `made` is what a build gives once `release` is set, or why not."""

    def __init__(self, kept: Artifact | None = None, made: Artifact | str = "there is no GPU") -> None:
        self.kept = kept
        self.made = made
        self.release = asyncio.Event()
        self.builds = 0
        self.discarded: list[tuple[str, str]] = []
        self.altered: set[str] = set()
        self.pruned: list[frozenset[str]] = []

    def wanted(self, folder: ModelFolder, version: VersionFolder) -> str:
        return "better"

    async def find(self, folder: ModelFolder, version: VersionFolder) -> Artifact | None:
        return self.kept

    async def make(self, folder: ModelFolder, version: VersionFolder, on_progress: OnProgress) -> Artifact:
        self.builds += 1
        await self.release.wait()
        if isinstance(self.made, str):
            raise unavailable(self.made)
        return self.made

    async def verify(
        self, folder: ModelFolder, version: VersionFolder, artifact: Artifact, on_progress: OnProgress
    ) -> Artifact:
        return artifact

    async def intact(self, model: ModelName, artifact: Artifact) -> bool:
        return artifact.key not in self.altered

    async def prune(self, in_use: Callable[[], frozenset[str]]) -> None:
        self.pruned.append(in_use())

    async def discard(self, folder: ModelFolder, artifact: Artifact, reason: str) -> None:
        self.discarded.append((artifact.key, reason))
        self.kept = None
