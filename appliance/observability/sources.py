"""What the metrics are read from, as narrow as they need it: protocols that the service, the transports, the governor and the
recorder fulfil as they are. `daemon` connects them; nothing here knows who stands behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Protocol

from appliance.core.description import ModelStatistics, WorkerDescription


class Source(Protocol):
    """The service, seen from below."""

    def statistics(self) -> list[ModelStatistics]:
        """Live counters of every served version."""

    def workers(self) -> list[WorkerDescription]:
        """The worker processes."""

    def refusals(self) -> Mapping[tuple[str, str], int]:
        """Requests refused since the start, by model ("" if there is no such model) and error code."""

    def snapshot(self) -> dict[str, Any]:
        """The status document."""


class HttpCounters(Protocol):
    """The HTTP face's own counters."""

    statuses: dict[int, int]
    refusals: dict[str, int]
    bytes_in_flight: int

    @property
    def connections(self) -> int:
        """Open connections."""


class Gates(Protocol):
    """What the governor lets pass: `core.thermal.Gates`."""

    @property
    def level(self) -> IntEnum:
        """From 0, nominal, upwards; all levels are the members of its type."""

    @property
    def max_priority(self) -> int:
        """Priorities up to this number are admitted."""

    @property
    def builds(self) -> bool:
        """Whether engines may be built."""

    @property
    def concurrency(self) -> float:
        """The share of a version's instances that may run at once."""

    @property
    def batch_growth(self) -> float:
        """The share of the usual rows that a batch may gather."""


class GovernedDevice(Protocol):
    """One device as last judged: `core.thermal.DeviceState`."""

    @property
    def device(self) -> str:
        """ "gpu:0", "host"."""

    @property
    def level(self) -> IntEnum:
        """Its own level."""

    @property
    def headroom_c(self) -> float | None:
        """Degrees below slowdown, less what the trend will take; None: not known."""


class Judgement(Protocol):
    """What the governor made of the last sample: `core.thermal.Judgement`."""

    @property
    def gates(self) -> Gates:
        """Over all devices."""

    @property
    def devices(self) -> Sequence[GovernedDevice]:
        """One by one."""


class RecorderState(Protocol):
    """How the flight recorder is: `recording.recorder.RecorderState`. Counts are since the start."""

    @property
    def problem(self) -> str:
        """Empty: it records."""

    @property
    def committed(self) -> int:
        """Records on the disk."""

    @property
    def dropped(self) -> int:
        """Records lost."""

    @property
    def pruned(self) -> int:
        """Records given up for space."""

    @property
    def series_refused(self) -> int:
        """Names of readings beyond the limit."""

    @property
    def set_aside(self) -> int:
        """Damaged files put away."""

    @property
    def bytes(self) -> int:
        """What the file uses."""

    @property
    def committed_at_s(self) -> float | None:
        """Monotonic seconds of the last commit; None before the first."""


class EnergyShare(Protocol):
    """One model's part of a window: `core.energy.ModelShare`."""

    @property
    def model(self) -> str:
        """Its "name:version"."""

    @property
    def active_uj(self) -> int:
        """Microjoules that it used."""


class EnergyWindow(Protocol):
    """One device, one window: `core.energy.EnergyWindow`. The parts sum to what the device used."""

    @property
    def device(self) -> str:
        """Which device."""

    @property
    def source(self) -> str:
        """What counted: nvml, ina3221, rapl or estimate."""

    @property
    def estimated(self) -> bool:
        """Whether it is an estimate."""

    @property
    def within(self) -> str:
        """The device whose energy has this in it already; "" for none."""

    @property
    def idle_uj(self) -> int:
        """What it would have used without any model."""

    @property
    def unattributed_uj(self) -> int:
        """What somebody else used."""

    @property
    def models(self) -> Sequence[EnergyShare]:
        """What each model used."""
