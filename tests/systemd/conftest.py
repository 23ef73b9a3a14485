"""A booted box for each module, and a fresh appliance in it for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.box import Box, why_not


@pytest.fixture(scope="module")
def machine() -> Iterator[Box]:
    """One boot for a module."""
    if reason := why_not():
        pytest.skip(reason)
    made = Box()
    try:
        yield made.start()
    finally:
        made.remove()


@pytest.fixture
def box(machine: Box) -> Iterator[Box]:
    """The machine with nothing of the appliance's running or configured but one model, `echo`."""
    machine.configure("")
    machine.loopback("echo", "[worker]\nrun_budget_ms = 500\nload_budget_ms = 2000\n", shape="2", commands="true")
    machine.loopback("plain", shape="2")
    yield machine
    machine.run("systemctl", "kill", "-s", "KILL", "appliance.service", check=False)
    machine.run("systemctl", "stop", "appliance.service", "appliance.socket", check=False)
    machine.run("systemctl", "reset-failed", check=False)
    machine.run(
        "sh",
        "-c",
        "rm -rf /etc/systemd/system/appliance.service.d /var/lib/appliance/models/* /var/lib/appliance/engines",
    )
    machine.run("systemctl", "daemon-reload")
