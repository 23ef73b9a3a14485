"""Energy since the start, by device and part and by model: the sums behind the energy counters.

Windows go in as the meter makes them, in whole microjoules, so that nothing is lost to rounding in a year. Models whose names are
gone stay: a counter must not vanish and come back smaller. `daemon` hands every window to this and to the recorder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from appliance.observability.sources import EnergyWindow

UJ_PER_J = 1_000_000


class Total(msgspec.Struct, frozen=True):
    """`part` is idle, unattributed or active; `model` ("name:version") is empty but in the parts of models.

    `within`: the device whose energy has this in it already; what the box took is the sum without such.
    """

    device: str
    source: str
    estimated: bool
    part: str
    model: str
    joules: float
    within: str = ""


class EnergyTotals:
    """See the module."""

    def __init__(self) -> None:
        self._uj: Counter[tuple[str, str, bool, str, str, str]] = Counter()

    def add(self, window: EnergyWindow) -> None:
        """Count one window."""
        kind = (window.device, window.source, window.estimated, window.within)
        self._uj[*kind, "idle", ""] += window.idle_uj
        self._uj[*kind, "unattributed", ""] += window.unattributed_uj
        self._uj[*kind, "active", ""] += sum(share.active_uj for share in window.models)
        for share in window.models:
            self._uj[*kind, "active", share.model] += share.active_uj

    def __iter__(self) -> Iterator[Total]:
        for (device, source, estimated, within, part, model), uj in self._uj.items():
            yield Total(device, source, estimated, part, model, uj / UJ_PER_J, within)
