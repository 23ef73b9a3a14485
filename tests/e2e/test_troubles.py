"""Every trouble of the table before a real daemon: level, state, event, metrics, doctor, monitor, and the answer to clients of
each priority, while it lasts and after it.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from typer.testing import CliRunner

from appliance.cli.main import app
from appliance.client import Client
from appliance.core.errors import ApplianceError, ErrorCode
from tests.e2e.house import LONG_S
from tests.e2e.troubles import (
    GIB,
    GPU_MODEL,
    HOST_MODEL,
    PATIENCE_S,
    PRIORITIES,
    TROUBLES,
    Box,
    Line,
    Told,
    Trouble,
    arrived,
    healthy,
    kinds,
    row,
)
from tests.fakes.nvml import StubNvml

pytestmark = pytest.mark.skipif(bool(StubNvml.missing()), reason=StubNvml.missing())

DOCS = Path(__file__).parents[2] / "docs" / "troubles.md"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = Box(tmp_path_factory.mktemp("box"))
    try:
        yield box.start()
    finally:
        box.finish()


@pytest.fixture
def box(played: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    """The box in good health, and our own commands on it."""
    monkeypatch.setenv("APPLIANCE_URL", played.house.http)
    monkeypatch.setenv("APPLIANCE_CONFIG", str(played.house.config))
    for name, value in played.nvml.environment().items():
        monkeypatch.setenv(name, value)
    try:
        played.until(healthy)
    except AssertionError:  # what one test left behind must not fail the next
        played.heal()
    return played


def command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout


Lines: TypeAlias = dict[tuple[str, str], dict[str, str]]


def doctor() -> Lines:
    """The lines about hardware, by check and text."""
    _, said = command("doctor", "--json", "--only", "running", "--only", "gpus")
    lines = [line for line in json.loads(said) if line["check"] not in ("configuration", "appliance", "models")]
    return {(line["check"], line["text"]): line for line in lines}


@pytest.fixture(scope="module")
def well() -> Lines:
    """What doctor says of the box in good health, once it was asked."""
    return {}


@pytest.fixture
def lines(box: Box, well: Lines) -> Lines:
    if not well:
        well.update(doctor())
    return well


def expect_doctor(before: Lines, expected: tuple[Line, ...]) -> None:
    """Exactly these lines are new."""
    told = [line for key, line in doctor().items() if key not in before]
    assert len(told) == len(expected), told
    for line in expected:
        (found,) = [one for one in told if one["check"] == line.check and line.words in one["text"]]
        assert found["grade"] == line.grade
        assert line.fix in found["fix"]


def expect_series(box: Box, expected: Mapping[str, float | None]) -> dict[str, float]:
    """`/metrics` says exactly that, once what is read every second has been read again."""
    end = time.monotonic() + PATIENCE_S
    while True:
        series = box.series()
        found = {name: series.get(name) for name in expected}
        if found == expected:
            return series
        assert time.monotonic() < end, f"{found} is not {expected}"
        time.sleep(0.05)


def newest(box: Box) -> int:
    events = box.get("/v2/appliance/events?since=0&limit=1")["events"]
    return events[-1]["id"] if events else 0


def expect_event(box: Box, after: int, told: Told) -> None:
    """`appliance events` has it. The recorder commits once a second."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        code, said = command("events", "--json", "--since", "1h", "--kind", told.kind)
        assert code == 0
        for event in json.loads(said)["events"]:
            fields = {key: event["fields"].get(key) for key in told.fields}
            if event["id"] > after and event["severity"] == told.severity and fields == told.fields:
                return
        time.sleep(0.05)
    raise AssertionError(f"no {told} among {box.get('/v2/appliance/events?since=0&limit=50')}")


def expect_no_other_event(box: Box, after: int, trouble: Trouble) -> None:
    """Of hardware: exactly the kinds that the trouble is told by."""
    end = time.monotonic() + PATIENCE_S
    while True:
        events = box.get("/v2/appliance/events?since=0&limit=200")["events"]
        new = [event for event in events if event["id"] > after and not an_end(event)]
        told = {event["kind"] for event in new if event["kind"].startswith(("finding.", "gpu.", "governor."))}
        if told == kinds(trouble):
            return
        assert time.monotonic() < end, f"{told} is not {kinds(trouble)}"
        time.sleep(0.05)


def an_end(event: dict[str, Any]) -> bool:
    """Of the trouble before, perhaps: the recorder commits once a second."""
    fields = event["fields"]
    return event["kind"] == "finding.cleared" or fields.get("level") == "NOMINAL" or fields.get("reasons") == []


def infer_over_http(box: Box, model: str, priority: int) -> tuple[int, str, str]:
    """Status, Retry-After and error."""
    body = {
        "inputs": [{"name": "data", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}],
        "parameters": {"priority": priority},
    }
    request = urllib.request.Request(f"{box.house.http}/v2/models/{model}/infer", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as answer:
            return answer.status, "", ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get("Retry-After", ""), json.loads(error.read())["error"]


def expect_answers(box: Box, trouble: Trouble | None) -> None:
    """What clients of each priority get, of a model on the host and of one on the GPU, over HTTP and ZeroMQ."""
    with Client(box.house.ipc, timeout_s=LONG_S) as client:
        for model in (HOST_MODEL, GPU_MODEL):
            for priority in PRIORITIES:
                refusal = _refusal(trouble, model, priority)
                status, retry_after, message = infer_over_http(box, model, priority)
                if not refusal:
                    assert status == 200, message
                    data = np.arange(4, dtype=np.float32).reshape(1, 4)
                    client.infer(model, {"data": data}, priority=priority)
                    continue
                assert trouble is not None
                assert (status, retry_after) == (503, str(trouble.retry_after_s))
                assert refusal in message
                with pytest.raises(ApplianceError, match=re.escape(refusal)) as refused:
                    client.infer(model, {"data": np.zeros((1, 4), np.float32)}, priority=priority, timeout_s=0.1)
                assert refused.value.code is ErrorCode.UNAVAILABLE


def _refusal(trouble: Trouble | None, model: str, priority: int) -> str:
    """The words of the refusal; empty: it is served."""
    if trouble is None:
        return ""
    if trouble.gpu_refusal and model == GPU_MODEL:
        return trouble.gpu_refusal
    return f"priority {priority} {trouble.refusal}" if priority >= trouble.refused_from else ""


def ready(box: Box, model: str) -> bool:
    try:
        with urllib.request.urlopen(f"{box.house.http}/v2/models/{model}/ready", timeout=LONG_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_a_trouble_is_told_to_everybody_and_is_over_when_it_is_mended(box: Box, lines: Lines, trouble: Trouble) -> None:
    series, last = box.series(), newest(box)
    expect_series(box, trouble.healthy)
    box.begin(trouble)
    document = box.until(arrived(trouble))
    grown = {name: series.get(name, 0) + more for name, more in trouble.grown.items()}
    during = expect_series(box, trouble.metrics | grown)
    assert {name: during[name] > value for name, value in trouble.above.items()} == dict.fromkeys(trouble.above, True)
    assert {name: document["readings"].get(name) for name in trouble.missing} == dict.fromkeys(trouble.missing)
    assert document["readings"]["host.memory.available"] is not None, "a GPU's trouble costs nobody else's readings"
    expect_doctor(lines, trouble.doctor)
    code, said = command("check")
    assert code == trouble.check, said
    expect_answers(box, trouble)
    assert (ready(box, HOST_MODEL), ready(box, GPU_MODEL)) == (True, not trouble.gpu_refusal)
    expect_event(box, last, trouble.event)
    expect_no_other_event(box, last, trouble)
    last = newest(box)
    if trouble.state == "LOST":
        expect_lost_until_a_start_finds_it_well(box, trouble)
    box.end(trouble)
    box.until(healthy)
    expect_series(box, trouble.healthy)
    assert doctor().keys() == lines.keys()
    assert command("check")[0] == 0
    expect_answers(box, None)
    if trouble.over is not None:
        expect_event(box, last, trouble.over)
    if trouble.ends == "restart":
        expect_event(box, last, Told("daemon.start", "info"))


def expect_lost_until_a_start_finds_it_well(box: Box, trouble: Trouble) -> None:
    """Answering again is not enough while the daemon runs; a start asks anew, and finds it lost while it does not answer.

    That a start finds it well when it answers is how the trouble ends: nothing is remembered from run to run.
    """
    box.nvml.put(dict.fromkeys(trouble.values))
    uptime_s = box.series()["appliance_uptime_seconds"]
    box.until(lambda document: document["status"]["uptime_s"] > uptime_s + 0.3)
    assert box.status()["gpus"][0]["state"] == "LOST"
    box.nvml.put(trouble.values)
    box.restart()
    document = box.until(lambda found: bool(found["gpus"]))
    assert document["gpus"][0]["state"] == "LOST"
    assert any(found["code"] == "gpu-lost" for found in document["findings"])
    assert "GPU 0 cannot be used" in infer_over_http(box, GPU_MODEL, 1)[2]


def test_a_model_that_does_not_fit_into_its_mig_instance_is_refused_with_numbers(box: Box) -> None:
    mig = next(trouble for trouble in TROUBLES if trouble.name == "mig")
    (peaks,) = box.house.folder.rglob("memory-peaks.json")
    measured = json.loads(peaks.read_text())
    (key,) = [key for key in measured if key.startswith(GPU_MODEL)]
    box.nvml.put(mig.values)
    try:
        box.restart(lambda: peaks.write_text(json.dumps({**measured, key: {"gpu:0": 11 * GIB}})))
        document = box.until(lambda found: all(model["detail"] != "LOADING" for model in found["models"]))
        (model,) = [model for model in document["models"] if model["name"] == GPU_MODEL]
        # 20 GB are free on the card, and 11.8 GB on the instance less the reserve
        assert model["detail"] == "FAILED"
        assert "it needs 13.0 GB on gpu:0" in model["reason"]
        assert infer_over_http(box, GPU_MODEL, 1)[0] == 503
        assert infer_over_http(box, HOST_MODEL, 12)[0] == 200
    finally:
        box.end(mig)
        box.restart(lambda: peaks.write_text(json.dumps(measured)))


def test_the_page_of_the_documentation_has_every_trouble_and_nothing_else() -> None:
    lines = DOCS.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    told = [line for line in lines[begin + 1 :] if line.startswith("|")]
    wanted: Any = [row(trouble) for trouble in TROUBLES]
    assert told == wanted, "docs/troubles.md should say:\n" + "\n".join(wanted)
