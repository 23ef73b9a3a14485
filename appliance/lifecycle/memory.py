"""The shell of `core.memory_budget`: reserves before a load, measures after the warm-up, evicts, and keeps what was measured.

It measures resident memory of worker processes; memory on a GPU is what a callable given by `daemon` says of a process. Which
model may go is the core's decision; the unload itself is done by a callable of the manager.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import msgspec
import psutil

from appliance.building.durable import write_durably
from appliance.core.errors import unavailable
from appliance.core.memory_budget import HOST, MIB, Evict, MemoryBudget, Need, Refused, Reserved, estimate, size
from appliance.host.cgroup import memory_limits
from appliance.observability.events import EventBus

log = logging.getLogger(__name__)

MOST_PEAKS = 512
"""Peaks that are kept; the oldest are forgotten."""

Peaks: TypeAlias = dict[str, dict[str, int]]
Usage: TypeAlias = tuple[str, float, bool]
"""Owner, when it was last used (monotonic seconds), and whether it has requests now."""


async def _nobody_unloads(owner: str, wanted_by: str) -> None:
    raise unavailable(f"{owner} would have to be unloaded for {wanted_by}, and nobody does that here")


def host_capacity(reserve_mb: int) -> int:
    """What models may take of this host: what is available now and what our control groups leave, less the reserve; bytes."""
    available: int = psutil.virtual_memory().available
    room = memory_limits().room_bytes
    return max(0, (available if room is None else min(available, room)) - reserve_mb * MIB)


def resident_bytes(pids: Iterable[int]) -> dict[str, int]:
    """Resident memory of these processes together. Pages shared with the template count in each: too much, never too little."""
    found = 0
    for pid in pids:
        try:
            found += psutil.Process(pid).memory_info().rss
        except psutil.Error:
            continue  # it ended meanwhile and holds nothing
    return {HOST: found}


def read_peaks(file: Path) -> Peaks:
    """What was measured of earlier loads, by "owner/device"; nothing if there is no file. OSError, msgspec.DecodeError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Peaks)
    except FileNotFoundError:
        return {}


class ModelMemory:
    """One ledger for all model versions. `peaks` is a JSON file; one that cannot be read is as none, and said so.

    `integrated`: the devices without memory of their own; what models need there is booked on the host.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        events: EventBus,
        *,
        peaks: Path,
        measure: Callable[[Iterable[int]], dict[str, int]] = resident_bytes,
        integrated: frozenset[str] = frozenset(),
    ) -> None:
        self.budget = budget
        self._events = events
        self._file = peaks
        self._measure = measure
        self._integrated = integrated
        self._peaks = self._read()
        self._usage: Callable[[], Iterable[Usage]] = tuple
        self._evict: Callable[[str, str], Awaitable[None]] = _nobody_unloads

    def attach(self, usage: Callable[[], Iterable[Usage]], evict: Callable[[str, str], Awaitable[None]]) -> None:
        """Who says which owners are in use, and who unloads one (its owner, and for whom)."""
        self._usage = usage
        self._evict = evict

    def _read(self) -> Peaks:
        try:
            return read_peaks(self._file)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("memory.peaks_unreadable", extra={"fields": {"reason": str(error)}})
            return {}

    async def reserve(
        self,
        owner: str,
        key: str,
        *,
        device: str,
        file_bytes: int,
        instances: int,
        evictable: bool,
    ) -> None:
        """Book what it needs, evicting others for it. UNAVAILABLE with the numbers if it does not fit."""
        place = HOST if device in self._integrated else device
        need: Need = estimate(device=place, file_bytes=file_bytes, instances=instances, measured=self._peaks.get(key))
        while True:
            for other, last_used_s, in_use in self._usage():
                self.budget.used(other, last_used_s, in_use=in_use)
            match self.budget.reserve(owner, need, evictable=evictable):
                case Reserved():
                    return
                case Refused(message):
                    self._events.publish("memory.refused", owner=owner, reason=message)
                    raise unavailable(f"it does not fit into memory: it {message}", retry_after_s=10.0)
                case Evict(owners):
                    for other in owners:
                        log.info("memory.evicted", extra={"fields": {"owner": other, "for": owner}})
                        self._events.publish("memory.evicted", owner=other, wanted_by=owner)
                        await self._evict(other, owner)
                        self.budget.release(other)

    def measured(self, owner: str, key: str, pids: Iterable[int]) -> dict[str, int]:
        """After the warm-up: the facts in place of the estimate, kept for the next load. Serving matters more than an OSError."""
        found = self._measure(pids)
        self.budget.correct(owner, found)
        before = self._peaks.pop(key, {})
        self._peaks[key] = {device: max(nbytes, before.get(device, 0)) for device, nbytes in found.items()}
        while len(self._peaks) > MOST_PEAKS:
            del self._peaks[next(iter(self._peaks))]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._file, msgspec.json.encode(self._peaks))
        except OSError as error:
            log.warning("memory.peaks_unwritten", extra={"fields": {"reason": str(error)}})
        if self.budget.booked(HOST) > self.budget.capacity.get(HOST, self.budget.booked(HOST)):
            over = self.budget.booked(HOST) - self.budget.capacity[HOST]
            log.warning("memory.overbooked", extra={"fields": {"by": size(over), "owner": owner}})
        return found
