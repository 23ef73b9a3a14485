"""How an event of the house looks in the record."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.recording.bridge import as_recorded


@pytest.mark.parametrize(
    ("topic", "data", "severity"),
    [
        ("model.state", {"state": "READY"}, "info"),
        ("model.state", {"state": "FAILED"}, "error"),
        ("worker.lost", {}, "error"),
        ("memory.leak", {"process": "front"}, "warning"),
        ("memory.refused", {}, "warning"),
        ("engine.gave_out", {}, "warning"),
        ("worker.recycled", {}, "warning"),
        ("gpu.xid", {"severity": "critical"}, "critical"),
    ],
)
def test_an_event_has_its_gravity(topic: str, data: dict[str, Any], severity: str) -> None:
    assert as_recorded(topic, data) == (topic, severity, data)


def test_what_an_operator_did_has_one_kind_and_who_did_it() -> None:
    assert as_recorded("operator.load", {"model": "m"}) == (
        "operator.action",
        "info",
        {"actor": "local", "action": "load", "model": "m"},
    )
