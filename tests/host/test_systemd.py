"""sd_notify, over a real datagram socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.host import banner, systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        address = str(tmp_path / "notify") if request.param == "path" else f"\0appliance-test-{tmp_path.name}"
        receiver.bind(address)
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        yield receiver


def test_the_manager_hears_everything(manager: socket.socket) -> None:
    systemd.ready("1 model ready")
    systemd.status("busy")
    systemd.extend_timeout(30)
    systemd.watchdog()
    systemd.reloading()
    systemd.stopping()
    heard = [manager.recv(4096).decode() for _ in range(6)]
    assert heard[:4] == ["READY=1\nSTATUS=1 model ready", "STATUS=busy", "EXTEND_TIMEOUT_USEC=30000000", "WATCHDOG=1"]
    assert heard[4].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert heard[5].startswith("STOPPING=1")


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.ready("x")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    systemd.ready("x")


def test_the_greeting_says_where_and_what_next() -> None:
    text = banner.render(
        ["http://127.0.0.1:8000", "ipc:///run/x"], [("digits", "1", "READY"), ("bad", "1", "UNAVAILABLE")]
    )
    for words in ("http://127.0.0.1:8000", "ipc:///run/x", "digits 1  READY", "appliance infer digits", "Ctrl-C"):
        assert words in text
    assert "infer digits" not in banner.render(["ipc:///x"], [])


def test_children_do_not_speak_to_the_manager() -> None:
    given = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/x"}
    assert systemd.for_children(given) == {"HOME": "/x"}
