"""Which version to load or unload next: stateless, idempotent, one action at a time, as TensorFlow Serving's policies are.

A *generation* is one version as it was on disk when it was seen; a changed file makes a new generation of the same version.
Availability-preserving: what serves goes on serving until something aspired is READY, or nothing is aspired any more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import msgspec

from appliance.core.manifest import VersionPolicyManifest
from appliance.core.states import ModelState

LOADED = frozenset({ModelState.READY})
GONE = frozenset({ModelState.UNLOADED, ModelState.DRAINING, ModelState.UNLOADING})


class GenerationSnapshot(msgspec.Struct, frozen=True):
    """One generation as the policy sees it."""

    generation: str
    state: ModelState
    aspired: bool


class Load(msgspec.Struct, frozen=True):
    """Start this generation."""

    generation: str


class Unload(msgspec.Struct, frozen=True):
    """Drain this generation and end it."""

    generation: str


Action: TypeAlias = Load | Unload


def next_action(snapshots: Sequence[GenerationSnapshot]) -> Action | None:
    """The one next step, or None when facts agree with the aspired set. Failed generations stay, with their reason."""
    for snapshot in snapshots:
        if snapshot.aspired and snapshot.state is ModelState.NEW:
            return Load(snapshot.generation)
    aspired = [snapshot for snapshot in snapshots if snapshot.aspired]
    covered = not aspired or any(snapshot.state in LOADED for snapshot in aspired)
    for snapshot in snapshots:
        if snapshot.aspired or snapshot.state in GONE:
            continue
        if covered or snapshot.state not in LOADED:
            return Unload(snapshot.generation)
    return None


def aspired_versions(on_disk: Collection[int], policy: VersionPolicyManifest) -> tuple[int, ...]:
    """The versions to serve, ascending, of those on disk."""
    ordered = sorted(on_disk)
    if policy.specific:
        return tuple(version for version in ordered if version in policy.specific)
    if policy.all:
        return tuple(ordered)
    return tuple(ordered[-policy.latest :])
