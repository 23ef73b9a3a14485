"""What the lifecycle asks of compiling: whether an engine is wanted for a version, whether one is kept, to make it, to check it.

`compilation` is the real one; model versions and the manager know only this. Nothing here runs an engine or knows a library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import msgspec

from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import ModelName
from appliance.lifecycle.repository import ModelFolder, VersionFolder


class Artifact(msgspec.Struct, frozen=True):
    """An engine made from a version's model.onnx: what runs it, its file, its key in the cache, and whether it was verified.

    `label` is what people call it: "int8", "tensorrt fp16"; `summary` says in one line what the verification found.
    """

    engine: str
    model_file: str
    key: str
    label: str
    verified: bool
    summary: str = ""


class BuildProgress(msgspec.Struct, frozen=True):
    """How far a build is: what it does, and its share in percent, which never falls."""

    phase: str
    percent: float


class RejectedError(ApplianceError):
    """An engine that is kept and failed its verification: its report is there to be read, and it never serves."""

    def __init__(self, artifact: Artifact, reason: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, f"it failed its verification: {reason}", retry_after_s=1.0)
        self.artifact = artifact


OnProgress: TypeAlias = Callable[[BuildProgress], None]


class Compiler(Protocol):
    """Makes engines for this box. All of its errors are UNAVAILABLE with the reason."""

    def wanted(self, folder: ModelFolder, version: VersionFolder) -> str:
        """What should be made of this version, in a word or two ("int8"); empty if the model serves as it is."""

    async def find(self, folder: ModelFolder, version: VersionFolder) -> Artifact | None:
        """The verified engine that is kept for exactly this, or None. One that failed its verification is not given."""

    async def make(self, folder: ModelFolder, version: VersionFolder, on_progress: OnProgress) -> Artifact:
        """Build it, in a process of its own; cancelled with the task. RejectedError for one that is known to fail its gate."""

    async def verify(
        self, folder: ModelFolder, version: VersionFolder, artifact: Artifact, on_progress: OnProgress
    ) -> Artifact:
        """Hold it against the reference; the artifact as verified. RejectedError says by how much it missed what."""

    async def report(
        self, folder: ModelFolder, version: VersionFolder, artifact: Artifact | None
    ) -> tuple[str, bytes] | None:
        """What the verification of this engine (None: of the version as it is) found: its key, and JSON; None: none is kept."""

    async def intact(self, model: ModelName, artifact: Artifact) -> bool:
        """Whether its files are, now, what was sealed when it was made: asked before every load of it."""

    async def prune(self, in_use: Callable[[], frozenset[str]]) -> None:
        """Keep no more than was configured; those whose keys are in use when it begins stay in any case. Never raises."""

    async def discard(self, folder: ModelFolder, artifact: Artifact, reason: str) -> None:
        """Keep it no longer: it does not load here any more. Never raises; `make` builds it anew."""
