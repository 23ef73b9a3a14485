"""Who holds how much memory, on the host and on each GPU: reserved before a load, corrected after it, given back at the unload.

Pure: a ledger of numbers, in bytes. It measures nothing and ends nothing; `lifecycle` tells it what was measured and carries out
its evictions. A reservation is made whole or not at all: on every device that a model needs, or on none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

HOST = "host"
MIB = 1 << 20

WEIGHTS_FACTOR = 2.0
"""A library holds the file's weights about twice while it loads: as read, and as packed for its kernels. A TensorRT plan holds
them once; its activations and the CUDA context, which no file tells, take the other half until they are measured."""

WORKER_BYTES = 96 * MIB
"""An interpreter with an engine's library and no model."""

PEAK_SPARE = 1.1
"""What was measured last time, and a tenth more: allocators do not repeat themselves to the byte."""


class Need(msgspec.Struct, frozen=True):
    """Bytes that one version needs, by device."""

    bytes_by_device: dict[str, int]


class Held(msgspec.Struct, frozen=True):
    """One reservation. `evictable`: its manifest allows that it is unloaded for another. `last_used_s` monotonic.

    `settled`: it is loaded, and the numbers are measured; else it may not have taken its memory yet.
    """

    owner: str
    bytes_by_device: dict[str, int]
    evictable: bool = False
    required: bool = False
    in_use: bool = False
    settled: bool = False
    last_used_s: float = 0.0


class Reserved(msgspec.Struct, frozen=True):
    """It fits and is booked."""

    owner: str


class Evict(msgspec.Struct, frozen=True):
    """It fits once these are unloaded, in this order; then ask again. Nothing is booked yet."""

    owners: tuple[str, ...]


class Refused(msgspec.Struct, frozen=True):
    """It does not fit; the message says by how much, and what could be done. `hopeless`: not even with nothing else loaded."""

    message: str
    hopeless: bool = False


def estimate(
    *,
    device: str,
    file_bytes: int,
    instances: int = 1,
    measured: Mapping[str, int] | None = None,
) -> Need:
    """What a version will need. The last measured peak counts where there is one: it is a fact, the rest is a rule.

    `device` is where the engine runs ("host" or "gpu:0"); `measured` is of all instances together.
    """
    if measured:
        return Need({where: int(peak * PEAK_SPARE) for where, peak in measured.items()})
    weights = int(file_bytes * WEIGHTS_FACTOR)
    needs = {HOST: WORKER_BYTES * instances}
    needs[device] = needs.get(device, 0) + weights * instances
    return Need(needs)


class MemoryBudget:
    """The ledger. `capacity` is what may be booked on each device; a device that is not in it is not counted.

    It was measured when nothing was loaded, and other programs come and go: see `look`. `most`: what could be booked if they held
    nothing; by default they never do.
    """

    def __init__(self, capacity: Mapping[str, int], most: Mapping[str, int] | None = None) -> None:
        self.capacity = dict(capacity)
        self._first = dict(capacity)
        self._most = {device: max(nbytes, (most or {}).get(device, 0)) for device, nbytes in capacity.items()}
        self._held: dict[str, Held] = {}

    @property
    def held(self) -> tuple[Held, ...]:
        """Every reservation, oldest first."""
        return tuple(self._held.values())

    def document(self) -> dict[str, dict[str, object]]:
        """For the status document: by device what may be used, what is reserved, and by whom, in bytes."""
        return {
            device: {
                "capacity_bytes": capacity,
                "reserved_bytes": self.booked(device),
                "owners": {
                    held.owner: held.bytes_by_device[device] for held in self.held if held.bytes_by_device.get(device)
                },
            }
            for device, capacity in self.capacity.items()
        }

    def booked(self, device: str) -> int:
        """Bytes reserved there."""
        return sum(held.bytes_by_device.get(device, 0) for held in self._held.values())

    def free(self, device: str) -> int:
        """Bytes that can still be reserved there; never negative, also when a correction took more than there was."""
        return max(0, self.capacity[device] - self.booked(device))

    def look(self, room_bytes: Mapping[str, int], taken_bytes: Mapping[str, int]) -> None:
        """Book by what there is now where that is more than at first: others gave memory back.

        That is what is free, and what loaded versions have really taken of it: on the host less than what is booked, since pages
        that processes share are booked for each. What is not in `taken_bytes` counts as booked. Never by less than at first: what
        was unloaded a moment ago may not have arrived yet.
        """
        for device, first in self._first.items():
            settled = sum(held.bytes_by_device.get(device, 0) for held in self._held.values() if held.settled)
            found = room_bytes.get(device, 0) + taken_bytes.get(device, settled)
            self.capacity[device] = min(max(first, found), self._most[device])

    def reserve(
        self, owner: str, need: Need, *, evictable: bool = False, required: bool = False
    ) -> Reserved | Evict | Refused:
        """Book `need` for a new owner. ValueError for one that has a reservation: a bug of ours."""
        if owner in self._held:
            raise ValueError(f"{owner} has a reservation")
        missing = self._missing(need, ())
        if not missing:
            self._held[owner] = Held(owner, dict(need.bytes_by_device), evictable=evictable, required=required)
            return Reserved(owner)
        hopeless = any(need.bytes_by_device[device] > self._most[device] for device in missing)
        return self._evictions(need) or Refused(self._refusal(need, missing), hopeless)

    def fits(self, need: Need) -> bool:
        """Whether it could be booked now, with nobody unloaded for it."""
        return not self._missing(need, ())

    def _missing(self, need: Need, without: Iterable[str]) -> dict[str, int]:
        """By how much it does not fit, by device, if those were gone."""
        gone = [self._held[owner] for owner in without]
        missing = {}
        for device, nbytes in need.bytes_by_device.items():
            if device in self.capacity:
                given_back = sum(held.bytes_by_device.get(device, 0) for held in gone)
                short = nbytes + self.booked(device) - given_back - self.capacity[device]
                if short > 0:
                    missing[device] = short
        return missing

    def _evictions(self, need: Need) -> Evict | None:
        """The least recently used that may go, until it fits; of those, only the ones that help."""
        idle = [held for held in self._held.values() if held.evictable and not held.required and not held.in_use]
        chosen: list[str] = []
        for held in sorted(idle, key=lambda held: held.last_used_s):
            missing = self._missing(need, chosen)
            if not missing:
                break
            if any(held.bytes_by_device.get(device, 0) > 0 for device in missing):
                chosen.append(held.owner)
        if self._missing(need, chosen):
            return None
        for owner in list(chosen):
            without = [other for other in chosen if other != owner]
            if not self._missing(need, without):
                chosen = without
        return Evict(tuple(chosen))

    def _refusal(self, need: Need, missing: Mapping[str, int]) -> str:
        device = max(missing, key=lambda name: missing[name])
        text = f"needs {size(need.bytes_by_device[device])} on {device}, {size(self.free(device))} free"
        helping = [held for held in self._held.values() if held.bytes_by_device.get(device, 0) >= missing[device]]
        if need.bytes_by_device[device] > self._most[device]:
            return f"{text}: more than the {size(self._most[device])} that may be used there at all"
        if need.bytes_by_device[device] > self.capacity[device]:
            return f"{text}: other programs hold more than they leave: end some, and it is loaded"
        if helping:
            smallest = min(helping, key=lambda held: (held.in_use or held.required, held.bytes_by_device[device]))
            return f"{text}: unload {smallest.owner} ({size(smallest.bytes_by_device[device])})?"
        return f"{text}: unload other models first"

    def correct(self, owner: str, measured: Mapping[str, int]) -> None:
        """After the warm-up: what it really takes, by device, in place of the estimate. A released owner is left alone."""
        held = self._held.get(owner)
        if held is not None:
            kept = {**held.bytes_by_device, **{device: max(0, nbytes) for device, nbytes in measured.items()}}
            self._held[owner] = msgspec.structs.replace(held, bytes_by_device=kept, settled=True)

    def used(self, owner: str, now: float, *, in_use: bool) -> None:
        """It has requests now, or had its last one at `now`."""
        held = self._held.get(owner)
        if held is not None:
            self._held[owner] = msgspec.structs.replace(held, in_use=in_use, last_used_s=max(held.last_used_s, now))

    def release(self, owner: str) -> None:
        """Give everything back; a second time changes nothing."""
        self._held.pop(owner, None)


def size(nbytes: int) -> str:
    """Bytes for people, in units of 1000: "1.2 GB", "40 MB"."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"
