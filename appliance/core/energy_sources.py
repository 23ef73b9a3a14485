"""Which counters of a snapshot tell what a device has used: NVML's for a GPU, RAPL's for a processor, rails where there is none.

Pure, but for the integrals of power that it keeps. A rail that feeds more than the device makes an estimate of it, and is called
one.
"""

from __future__ import annotations

import re

from appliance.core import quantities as q
from appliance.core.energy import UJ_PER_J, EnergyReading, Integrator, Source
from appliance.core.readings import Snapshot

RAPL = re.compile(r"^host\.rapl\.(?P<zone>package[^.]*)\.energy$")
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "VIN")
"""What a Jetson's board takes as a whole, by generation; GPU, CPU and memory share it, so it stands for the box."""

HOST = "host"


class EnergySources:
    """`readings` is given each snapshot in turn."""

    def __init__(self) -> None:
        self._integrals: dict[str, Integrator] = {}

    def readings(self, snapshot: Snapshot) -> dict[str, EnergyReading]:
        """By device ("gpu:0", "host"). A GPU without a counter is integrated from its power."""
        found: dict[str, EnergyReading] = {}
        for gpu in snapshot.gpus:
            counter = snapshot.value(q.GPU_ENERGY.name(gpu.index))
            power = snapshot.value(q.GPU_POWER.name(gpu.index))
            device = f"gpu:{gpu.index}"
            if counter is not None:
                found[device] = EnergyReading(round(counter * UJ_PER_J), "nvml")
            elif power is not None:
                found[device] = self._integrated(device, snapshot.monotonic_s, power, estimated=True)
        host = self._host(snapshot)
        if host is not None:
            found[HOST] = host
        return found

    def _host(self, snapshot: Snapshot) -> EnergyReading | None:
        total = wrap = 0.0
        zones = 0
        for name, reading in snapshot.readings.items():
            if reading.value is not None and RAPL.match(name):
                zones += 1
                total += reading.value
                wrap += snapshot.value(name.replace(".energy", ".range")) or 0.0
        if zones == 1:
            return EnergyReading(round(total * UJ_PER_J), "rapl", wrap_uj=round(wrap * UJ_PER_J))
        if zones:
            # packages wrap one by one, so their sum cannot be told apart from a reset: a lower bound then
            return EnergyReading(round(total * UJ_PER_J), "rapl", estimated=True)
        for rail in TOTAL_RAILS:
            power = snapshot.value(q.RAIL_POWER.name(rail))
            if power is not None:
                return self._integrated(HOST, snapshot.monotonic_s, power, estimated=False)
        return None

    def _integrated(self, device: str, monotonic_s: float, watts: float, *, estimated: bool) -> EnergyReading:
        integral = self._integrals.setdefault(device, Integrator())
        source: Source = "estimate" if estimated else "ina3221"
        return EnergyReading(integral.add(monotonic_s, watts), source, estimated=estimated)
