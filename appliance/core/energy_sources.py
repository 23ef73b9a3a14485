"""Which counters of a snapshot tell what a device has used: NVML's for a GPU, RAPL's for a processor, rails where there is none.

Pure, but for the integrals of power that it keeps, and for what it has seen of counters: one that cannot be read for a moment is
waited for, since it goes on counting and tells afterwards what was used meanwhile.
"""

from __future__ import annotations

import re

from appliance.core import quantities as q
from appliance.core.energy import BOARD, HOST, UJ_PER_J, Counter, EnergyReading, Integrator, Source, container
from appliance.core.readings import Snapshot

RAPL = re.compile(r"^host\.rapl\.(?P<zone>package[^.]*)\.energy$")
BOARD_RAILS = (
    ("VDD_IN",),
    ("POM_5V_IN",),
    ("VIN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
"""What a Jetson's board takes as a whole, by generation: one rail that feeds everything, or on the AGX those that together do
(Jetson Linux developer guide, "Power and performance"). The GPU is in it.
"""
PATIENCE_S = 60.0
"""So long a counter that cannot be read is waited for; then the device goes on without it."""


class EnergySources:
    """`readings` is given each snapshot in turn."""

    def __init__(self) -> None:
        self._integrals: dict[str, Integrator] = {}
        self._seen: dict[str, float] = {}
        self._host_source = ""

    def readings(self, snapshot: Snapshot) -> dict[str, EnergyReading]:
        """By device ("gpu:0", "host"); none of a device while a counter of it is waited for.

        A GPU without a counter is integrated from its power, which is called an estimate.
        """
        found: dict[str, EnergyReading] = {}
        host = self._host(snapshot)
        if host is not None:
            found[HOST] = host
            self._host_source = host.source
        for gpu in snapshot.gpus:
            name = q.GPU_ENERGY.name(gpu.index)
            counter = snapshot.value(name)
            power = snapshot.value(q.GPU_POWER.name(gpu.index))
            device = f"gpu:{gpu.index}"
            within = container(device, self._host_source)
            if counter is not None:
                self._seen[name] = snapshot.monotonic_s
                found[device] = EnergyReading({name: Counter(round(counter * UJ_PER_J))}, "nvml", within=within)
            elif power is not None and not self._waited_for(name, snapshot.monotonic_s):
                found[device] = self._integrated(device, snapshot, power, "estimate", within)
        return found

    def _waited_for(self, name: str, now_s: float) -> bool:
        return now_s - self._seen.get(name, -PATIENCE_S) < PATIENCE_S

    def _host(self, snapshot: Snapshot) -> EnergyReading | None:
        counters = {}
        for name, reading in snapshot.readings.items():
            if not RAPL.match(name):
                continue
            if reading.value is not None:
                wrap = snapshot.value(name.replace(".energy", ".range")) or 0.0
                counters[name] = Counter(round(reading.value * UJ_PER_J), round(wrap * UJ_PER_J))
                self._seen[name] = snapshot.monotonic_s
            elif self._waited_for(name, snapshot.monotonic_s):
                return None
        if counters:
            return EnergyReading(counters, "rapl")
        for rails in BOARD_RAILS:
            powers = [snapshot.value(q.RAIL_POWER.name(rail)) for rail in rails]
            known = [power for power in powers if power is not None]
            if len(known) == len(rails):
                return self._integrated(HOST, snapshot, sum(known), BOARD)
        return None

    def _integrated(
        self, device: str, snapshot: Snapshot, watts: float, source: Source, within: str = ""
    ) -> EnergyReading:
        integral = self._integrals.setdefault(device, Integrator())
        counter_uj = integral.add(snapshot.monotonic_s, watts)
        counter = Counter(counter_uj, epoch=integral.epoch)
        return EnergyReading({device: counter}, source, estimated=source == "estimate", within=within)
