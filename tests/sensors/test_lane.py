"""What a lane says of a sampler that fails, as it stands in the log."""

from __future__ import annotations

import asyncio
import logging

import pytest

from appliance.core.readings import Part
from appliance.observability.logs import HumanFormatter
from appliance.sensors.lane import Lane


class Failing:
    """A sampler with a bug."""

    name = "board"
    period_s = 0.0

    def sample(self, now_s: float) -> Part:
        raise ValueError(f"at {now_s:g}")

    def close(self) -> None:
        """Nothing is held."""


async def test_a_sampler_that_fails_all_the_time_is_logged_once_a_minute_with_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lane = Lane(Failing())
    lane.start()
    for now_s in (0.0, 0.1, 0.2, 59.9, 60.0, 60.1, 121.0):
        assert lane.ask(now_s)
        await asyncio.wait_for(lane.answered.wait(), 5)
    await lane.close(5)
    assert lane.failures == 7
    lines = [HumanFormatter().format(record) for record in caplog.records if record.levelno == logging.ERROR]
    assert [line.splitlines()[0].partition("sensors.")[2] for line in lines] == [
        "sampler_failed lane=board times=1",
        "sampler_failed lane=board times=4",
        "sampler_failed lane=board times=2",
    ]
    assert "ValueError: at 60" in lines[1]
