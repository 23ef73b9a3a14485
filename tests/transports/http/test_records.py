"""Questions to the recorder over HTTP: checked, bounded, and answered from a thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.config import HttpConfig
from appliance.recording.reader import RecordReader
from appliance.recording.recorder import Recorder
from appliance.transports.http import HttpTransport
from tests.transports.http.conftest import House

WALL = 1_800_000_000.0


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    found = Recorder(tmp_path / "r.sqlite3", max_bytes=64 << 20)
    found.start()
    found.record_sample(WALL, 10.0, {"gpu.temperature": 50.0})
    found.record_event("model.state", "info", {"model": "m"})
    found.record_action("anna", "load", {"model": "m"})
    assert found.flush()
    yield found
    found.close()


async def listening(house: House, recorder: Recorder) -> None:
    transport = HttpTransport(
        house.service, HttpConfig(port=0), unix_socket=None, metrics=bytes, records=RecordReader(recorder.path)
    )
    house.transports.append(transport)
    await transport.start()


async def test_events_history_energy_and_actions_are_documents(bare: House, recorder: Recorder) -> None:
    await listening(bare, recorder)
    events = (await bare.ask("GET", "/v2/appliance/events?since=0&kind=model")).json["events"]
    assert [event["kind"] for event in events] == ["model.state"]
    either = (await bare.ask("GET", f"/v2/appliance/events?until={2 * WALL}&kind=model,operator")).json["events"]
    assert [event["kind"] for event in either] == ["model.state", "operator.action"]
    many = await bare.ask("GET", "/v2/appliance/events?kind=" + ",".join(f"k{number}" for number in range(33)))
    assert (many.status, many.error) == (400, "at most 32 kinds of events at a time, 33 came")
    history = (await bare.ask("GET", f"/v2/appliance/history?names=gpu.temperature&since={WALL - 5}&until={WALL}")).json
    assert history["series"]["gpu.temperature"]["max"] == [50.0]
    assert (await bare.ask("GET", "/v2/appliance/history")).json == {"series": ["gpu.temperature"]}
    assert (await bare.ask("GET", "/v2/appliance/energy?since=0")).json == {"energy": []}
    audit = (await bare.ask("GET", "/v2/appliance/audit")).json
    assert audit["verdict"]["ok"]
    assert audit["entries"][0]["actor"] == "anna"


async def test_a_query_that_means_nothing_is_refused(bare: House, recorder: Recorder) -> None:
    await listening(bare, recorder)
    for query in ("events?since=yesterday", "history?names=a&points=nan", "energy?since=-1", "audit?limit=inf"):
        reply = await bare.ask("GET", f"/v2/appliance/{query}")
        assert reply.status == 400, query
        assert "must be a number" in reply.error


async def test_without_a_recorder_the_answer_says_so(house: House) -> None:
    reply = await house.ask("GET", "/v2/appliance/history?names=a")
    assert reply.status == 503
    assert "the recorder is off" in reply.error
