"""The shell of `core.memory_budget`: reserves before a load, measures after the warm-up, evicts, and keeps what was measured.

It measures resident memory of worker processes; memory on a GPU is what a callable given by `daemon` says of a process. Which
model may go is the core's decision; the unload itself is done by a callable of the manager.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec
import psutil

from appliance.core.errors import ApplianceError, ErrorCode, unavailable
from appliance.core.memory_budget import HOST, MIB, Evict, MemoryBudget, Need, Refused, Reserved, estimate, size
from appliance.host.cgroup import memory_limits
from appliance.host.durable import write_durably
from appliance.observability.events import EventBus

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 10.0
"""How often it is seen whether there is room now for what waits: other programs tell nobody when they give memory back."""

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


def host_most(reserve_mb: int) -> int:
    """What models could take of this host if nothing else ran on it, in bytes."""
    total: int = psutil.virtual_memory().total
    limit = memory_limits().tightest_bytes
    return max(0, (total if limit is None else min(total, limit)) - reserve_mb * MIB)


def resident_bytes(pids: Iterable[int]) -> dict[str, int]:
    """Resident memory of these processes together. Pages shared with the template count in each: too much, never too little."""
    found = 0
    for pid in pids:
        try:
            found += psutil.Process(pid).memory_info().rss
        except psutil.Error:
            continue  # it ended meanwhile and holds nothing
    return {HOST: found}


def own_bytes(pids: Iterable[int]) -> dict[str, int]:
    """What only these processes hold on the host, each for itself: what would be free without them, or a little less."""
    found = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found += psutil.Process(pid).memory_full_info().uss
    return {HOST: found}


def read_peaks(file: Path) -> Peaks:
    """What was measured of earlier loads, by "owner/device"; nothing if there is no file. OSError, msgspec.DecodeError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Peaks)
    except FileNotFoundError:
        return {}


class MemoryShortError(ApplianceError):
    """It does not fit now. `numbers`: what it needs, what is free, and what to do; `hopeless`: it never will."""

    def __init__(self, refused: Refused) -> None:
        message = f"it does not fit into memory: it {refused.message}"
        super().__init__(ErrorCode.UNAVAILABLE, message, retry_after_s=10.0)
        self.numbers = refused.message
        self.hopeless = refused.hopeless


class ModelMemory:
    """One ledger for all model versions. `peaks` is a JSON file; one that cannot be read is as none, and said so.

    `integrated`: the devices without memory of their own; what models need there is booked on the host. `room`: what is free
    now by device, for models, as seen after that monotonic time; a device of which nothing newer is known is left out. `taken`:
    what workers really hold of the host.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        events: EventBus,
        *,
        peaks: Path,
        measure: Callable[[Iterable[int]], dict[str, int]] = resident_bytes,
        integrated: frozenset[str] = frozenset(),
        room: Callable[[float], Mapping[str, int]] = lambda _: {},
        taken: Callable[[Iterable[int]], Mapping[str, int]] = own_bytes,
    ) -> None:
        self.budget = budget
        self._events = events
        self._file = peaks
        self._measure = measure
        self._integrated = integrated
        self._room = room
        self._taken = taken
        self._pids: dict[str, tuple[int, ...]] = {}
        self._settled_s = 0.0
        self._peaks = self._read()
        self._usage: Callable[[], Iterable[Usage]] = tuple
        self._evict: Callable[[str, str], Awaitable[None]] = _nobody_unloads
        self._freed: Callable[[], None] = lambda: None
        self._evicting = 0

    def attach(
        self,
        usage: Callable[[], Iterable[Usage]],
        evict: Callable[[str, str], Awaitable[None]],
        freed: Callable[[], None] = lambda: None,
    ) -> None:
        """Who says which owners are in use, who unloads one (its owner, and for whom), and who hears that memory came back."""
        self._usage = usage
        self._evict = evict
        self._freed = freed

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
        evict: bool = True,
    ) -> None:
        """Book what it needs, evicting others for it unless `evict` is off. MemoryShortError if it does not fit."""
        need = self.need(key, device=device, file_bytes=file_bytes, instances=instances)
        while True:
            for other, last_used_s, in_use in self._usage():
                self.budget.used(other, last_used_s, in_use=in_use)
            self._look()
            match self.budget.reserve(owner, need, evictable=evictable):
                case Reserved():
                    return
                case Refused() as refused:
                    self._events.publish("memory.refused", owner=owner, reason=refused.message)
                    raise MemoryShortError(refused)
                case Evict(owners) if evict:
                    await self._make_room(owners, owner)
                case Evict(owners):
                    raise MemoryShortError(Refused(f"would need {', '.join(owners)} to be unloaded"))

    async def _make_room(self, owners: Iterable[str], wanted_by: str) -> None:
        """Unload these. What they give back is for whom they go, so nobody else hears of it before."""
        self._evicting += 1
        try:
            for owner in owners:
                log.info("memory.evicted", extra={"fields": {"owner": owner, "for": wanted_by}})
                self._events.publish("memory.evicted", owner=owner, wanted_by=wanted_by)
                await self._evict(owner, wanted_by)
                self.budget.release(owner)
        finally:
            self._evicting -= 1
        self._tell_freed()

    def fits(self, key: str, *, device: str, file_bytes: int, instances: int) -> bool:
        """Whether it could be loaded now, with nobody unloaded for it."""
        self._look()
        return self.budget.fits(self.need(key, device=device, file_bytes=file_bytes, instances=instances))

    def _look(self) -> None:
        room = self._room(self._settled_s)
        if room:
            # a worker that was replaced since counts as nothing, which errs on the safe side
            held = {held.owner for held in self.budget.held}
            self._pids = {owner: pids for owner, pids in self._pids.items() if owner in held}
            self.budget.look(room, self._taken(pid for pids in self._pids.values() for pid in pids))

    def need(self, key: str, *, device: str, file_bytes: int, instances: int) -> Need:
        """What a version will need: by its kept peak, else by its file."""
        place = HOST if device in self._integrated else device
        return estimate(device=place, file_bytes=file_bytes, instances=instances, measured=self._peaks.get(key))

    def release(self, owner: str) -> None:
        """Give everything back, and say so. A second time changes nothing."""
        if any(held.owner == owner for held in self.budget.held):
            self.budget.release(owner)
            self._tell_freed()

    def _tell_freed(self) -> None:
        if not self._evicting:
            self._freed()

    def measured(self, owner: str, key: str, pids: Iterable[int]) -> dict[str, int]:
        """After the warm-up: the facts in place of the estimate, kept for the next load. Serving matters more than an OSError."""
        self._pids[owner] = tuple(pids)
        found = self._measure(self._pids[owner])
        before_bytes = {device: self.budget.booked(device) for device in self.budget.capacity}
        self.budget.correct(owner, found)
        self._settled_s = time.monotonic()
        if any(self.budget.booked(device) < nbytes for device, nbytes in before_bytes.items()):
            self._tell_freed()
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
