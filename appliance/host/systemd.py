"""Talking to systemd: sd_notify over a datagram socket. Outside systemd every call does nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def _notify(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
    ):
        channel.connect(address)
        channel.send(message.encode())


def ready(status_line: str) -> None:
    """We serve."""
    _notify(f"READY=1\nSTATUS={status_line}")


def status(line: str) -> None:
    """One line for `systemctl status`."""
    _notify(f"STATUS={line}")


def stopping() -> None:
    """We drain."""
    _notify("STOPPING=1\nSTATUS=draining")


def reloading() -> None:
    """We reread the configuration; `ready` ends it."""
    _notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def extend_timeout(seconds: int) -> None:
    """We are alive and need so much longer to start or stop."""
    _notify(f"EXTEND_TIMEOUT_USEC={seconds * 1_000_000}")


def watchdog() -> None:
    """The loop turns."""
    _notify("WATCHDOG=1")
