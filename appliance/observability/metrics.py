"""What `/metrics` answers: everything that is connected, read from live counters at the moment somebody asks.

Nothing is counted here: the scheduler's statistics are the counters, so that a request costs no metric calls. The names stand in
`metrics_models`, `metrics_readings` and `metrics_house`, each once. `daemon` connects what exists; what does not has no series.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from appliance.core.readings import Snapshot
from appliance.observability import metrics_house, metrics_models, metrics_readings
from appliance.observability.energy_totals import Total
from appliance.observability.families import Sheet
from appliance.observability.sources import HttpCounters, Judgement, RecorderState, Source

FAMILIES = (*metrics_models.FAMILIES, *metrics_readings.FAMILIES, *metrics_house.FAMILIES)
"""Every metric there can be, in the order of the page."""


class Metrics:
    """The sources, each optional but the service, and the page made from them."""

    def __init__(self, source: Source, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self.http: HttpCounters | None = None
        self.zmq: Callable[[], Mapping[str, int]] | None = None
        self.readings: Callable[[], Snapshot | None] | None = None
        self.governor: Callable[[], Judgement] | None = None
        self.hold_s: Callable[[], float] | None = None
        self.xids: Mapping[tuple[int, int], int] | None = None
        self.energy: Iterable[Total] | None = None
        self.recorder: Callable[[], RecorderState] | None = None

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        sheet = Sheet()
        now_s = self._clock()
        document = self._source.snapshot()
        metrics_models.collect(self._source, document.get("models", []), sheet)
        snapshot = self.readings() if self.readings is not None else None
        if snapshot is not None:
            metrics_readings.collect(snapshot, now_s, sheet)
        metrics_house.collect_status(document["status"], sheet)
        if self.http is not None:
            metrics_house.collect_http(self.http, sheet)
        if self.zmq is not None:
            metrics_house.collect_zmq(self.zmq(), sheet)
        if self.governor is not None:
            metrics_house.collect_governor(self.governor(), sheet)
        if self.hold_s is not None:
            sheet.add(metrics_house.HOLD, self.hold_s())
        if self.xids is not None:
            metrics_house.collect_xids(self.xids, sheet)
        if self.energy is not None:
            metrics_house.collect_energy(self.energy, sheet)
        if self.recorder is not None:
            metrics_house.collect_recorder(self.recorder(), now_s, sheet)
        return sheet.render()
