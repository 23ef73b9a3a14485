"""Ten restarts under load: clients wait, none is refused. With the descriptor store, and with the socket unit."""

from __future__ import annotations

import time

import pytest

from tests.systemd.box import Box

pytestmark = [pytest.mark.slow]

RESTARTS = 10


def restarts(box: Box, kind: str, count: int) -> dict[str, object]:
    load = box.start_load(kind, model="plain")
    for _ in range(count):
        box.run("systemctl", "restart", "appliance.service")
        time.sleep(0.2)  # the clients come back to work in between: that is what is measured
    return box.end_load(load)


@pytest.mark.parametrize("kind", ["http", "keep", "zmq", "ipc"])
def test_ten_restarts_under_load_cost_no_request(box: Box, kind: str) -> None:
    box.run("systemctl", "start", "appliance.service")
    result = restarts(box, kind, RESTARTS)
    assert result["failed"] == 0, result


@pytest.mark.parametrize("kind", ["http", "zmq"])
def test_with_the_socket_unit_they_cost_none_either(box: Box, kind: str) -> None:
    box.run("systemctl", "start", "appliance.socket")
    box.run("systemctl", "start", "appliance.service")
    result = restarts(box, kind, RESTARTS)
    assert result["failed"] == 0, result


def test_with_the_socket_unit_a_stopped_appliance_is_started_by_its_next_client(box: Box) -> None:
    box.run("systemctl", "start", "appliance.socket")
    load = box.start_load("http", clients=1, model="plain")
    box.wait_until("ActiveState", "active")
    assert box.end_load(load)["failed"] == 0


def test_the_socket_unit_is_enabled_in_the_order_of_the_books(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    assert box.run("systemctl", "start", "appliance.socket", check=False).returncode == 1
    box.run("systemctl", "stop", "appliance.service")
    box.run("systemctl", "start", "appliance.socket")
    box.run("systemctl", "start", "appliance.service")
    assert (box.show("ActiveState"), box.show("ActiveState", "appliance.socket")) == ("active", "active")


def test_a_socket_that_no_endpoint_has_is_a_configuration_error_and_says_which(box: Box) -> None:
    box.configure("[http]\nport = 9000\n")
    box.run("systemctl", "start", "appliance.socket")
    box.run("systemctl", "start", "appliance.service", check=False)
    assert box.show("ExecMainStatus") == "78"
    assert "systemd listens on 127.0.0.1:8000" in box.show("StatusText")


def test_after_a_change_of_port_the_old_one_is_let_go(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    assert box.show("NFileDescriptorStore") == "6"
    box.configure("[http]\nport = 9000\n")
    box.run("systemctl", "restart", "appliance.service")
    assert box.show("NFileDescriptorStore") == "6"
    assert box.run("sh", "-c", "grep -c ':1F40 .* 0A ' /proc/net/tcp", check=False).stdout.strip() == "0"


def test_an_ipc_file_that_was_removed_is_made_again(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    box.run("rm", "/run/appliance/infer.ipc", "/run/appliance/http.sock")
    box.run("systemctl", "restart", "appliance.service")
    load = box.start_load("ipc", clients=1, model="plain")
    time.sleep(0.3)
    result = box.end_load(load)
    assert result["failed"] == 0
    assert result["requests"] > 0
