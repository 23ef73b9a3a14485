"""What the service says, as the administrator finds it: fields, explanations, and floods that are cut."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from appliance.observability.journal import MESSAGE_IDS
from tests.systemd.box import LONG_S, Box
from tests.systemd.test_life import ask

pytestmark = [pytest.mark.slow]

UNIT = Path(__file__).parents[2] / "systemd/appliance.service"
FLOOD_LINES = 40_000
NEARLY_ALL = FLOOD_LINES - 100
"""journald may not know any more whose the last lines were."""


def _flood(box: Box, name: str, *properties: str, after: str = "true") -> str:
    """What the journal has of a service that says one line so many times, and then does what is in `after`."""
    given = [f"--property={text}" for text in properties]
    script = f"yes flood | head -n {FLOOD_LINES}; {after}"
    box.run("systemd-run", "--quiet", "--wait", f"--unit={name}", *given, "sh", "-c", script)
    box.run("journalctl", "--sync")
    return box.run("journalctl", "--no-pager", "-o", "cat", "-u", f"{name}.service").stdout


def test_a_flood_is_cut_by_journald_and_says_so(machine: Box) -> None:
    interval, burst = "LogRateLimitIntervalSec=30s", "LogRateLimitBurst=5000"
    assert {interval, burst} <= set(UNIT.read_text().splitlines())
    assert _flood(machine, "cut", interval, burst).count("flood\n") < FLOOD_LINES
    # with another interval, or another burst, it would not be: both are needed
    assert _flood(machine, "uncut", "LogRateLimitIntervalSec=1ms", burst).count("flood\n") > NEARLY_ALL
    assert _flood(machine, "large", interval, f"LogRateLimitBurst={FLOOD_LINES}").count("flood\n") > NEARLY_ALL
    # journald says so with the next line after an interval, by its own clock, which lags when the machine is busy
    later = "for _ in 1 2 3 4; do sleep 1.1; echo after; done"
    told = _flood(machine, "told", "LogRateLimitIntervalSec=1s", "LogRateLimitBurst=50", after=later)
    assert "Suppressed" in told or machine.journal("SYSLOG_IDENTIFIER=systemd-journald", "--grep=Suppressed")


FLOOD = """
import http.client, json, sys
body = {"id": "order-1", "inputs": [{"name": "data", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
codes = set()
for number in range(int(sys.argv[2])):
    body["id"] = f"order-{number}"
    connection.request("POST", f"/v2/models/{sys.argv[1]}/infer", json.dumps(body) if sys.argv[3:] != ["broken"] else "{")
    answer = connection.getresponse()
    answer.read()
    codes.add(answer.status)
print(sorted(codes))
"""


def test_entries_carry_the_fields_that_they_are_looked_for_by(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    pid = f"_PID={box.show('MainPID')}"
    (ready,) = box.journal("-t", "appliance", "EVENT=daemon.ready", pid)
    assert ready["SYSLOG_IDENTIFIER"] == "appliance"
    assert ask(box, "echo", "fail").startswith("500")
    assert ask(box, "echo", "crash").startswith("500")
    (failed,) = box.journal(
        "MODEL=echo", "CODE=ENGINE_FAULT", "REASON=the engine refused this request: loopback was told to fail", pid
    )
    assert failed["EVENT"] == "request.failed"
    lost = box.journal("MODEL=echo", "EVENT=worker.lost", pid)
    assert {"WORKER_PID", "REASON", "MESSAGE_ID"} <= set(lost[-1])


def test_a_flood_of_bad_requests_is_one_entry_with_its_number_and_then_a_sum(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    pid = f"_PID={box.show('MainPID')}"
    assert box.python(FLOOD, "nobody", "1000") == "[404]\n"
    assert box.python(FLOOD, "plain", "1000", "broken") == "[400]\n"
    entries = box.journal("EVENT=request.refused", pid)
    assert {(entry["CODE"], entry["MODEL"]) for entry in entries} == {
        ("NOT_FOUND", "nobody"),
        ("INVALID_ARGUMENT", "plain"),
    }
    assert len(entries) <= 4
    (first, *_) = box.journal("REQUEST_ID=order-0", pid)
    assert first["CODE"] == "NOT_FOUND"
    deadline = time.monotonic() + LONG_S
    while len(summed := box.journal("EVENT=request.refused", "--grep=more within", pid)) < 2:
        assert time.monotonic() < deadline, box.log()
        time.sleep(0.2)
    assert sum(int(entry["APPLIANCE_MORE"]) for entry in summed) == 1998


SEND_EACH = """
import logging, time
from appliance.observability import journal
from appliance.observability.logs import EventFormatter
handler = journal.JournalHandler()
handler.setFormatter(EventFormatter())
for event in journal.MESSAGE_IDS:
    record = logging.LogRecord("x", logging.INFO, "", 1, "model.state" if event == "model.failed" else event, None, None)
    record.fields = {"model": "digits", "code": "ENGINE_FAULT", "reason": "the reason it had", "state": "FAILED", "test": 1}
    handler.emit(record)
    while handler.lost:
        time.sleep(0.01)
        handler.emit(record)
print(handler.lost)
"""


def test_each_event_of_the_catalog_is_explained(machine: Box) -> None:
    assert machine.python(SEND_EACH) == "0\n"
    catalog = (UNIT.parent / "appliance.catalog").read_text()
    for event, number in MESSAGE_IDS.items():
        machine.run("journalctl", "--sync")
        said = machine.run("journalctl", "-x", "--no-pager", f"MESSAGE_ID={number}", "APPLIANCE_TEST=1").stdout
        (subject,) = re.findall(rf"^-- {number}\nSubject: (.*)$", catalog, re.MULTILINE)
        assert "Subject: " + subject.replace("@MODEL@", "digits").replace("@CODE@", "ENGINE_FAULT") in said, event
        assert "@" not in said.split("Subject:")[1].split("-- ")[0], event
