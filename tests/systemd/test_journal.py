"""What the service says, as the administrator finds it: fields, explanations, and floods that are cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.systemd.box import Box

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
    told = _flood(machine, "told", "LogRateLimitIntervalSec=1s", burst, after="sleep 1.1; echo after")
    assert "Suppressed" in told or machine.journal("SYSLOG_IDENTIFIER=systemd-journald", "--grep=Suppressed")


def test_entries_carry_the_fields_that_they_are_looked_for_by(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    said = box.journal("-t", "appliance", "EVENT=daemon.ready")
    assert said
    assert all(entry["SYSLOG_IDENTIFIER"] == "appliance" for entry in said)
