"""Talking to systemd: sd_notify over a datagram socket, the descriptor store, the watchdog. Outside systemd nothing happens.

It knows the protocol (sd_notify(3), sd_watchdog_enabled(3)) and nothing of what is told or kept. `daemon` drives it.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from collections.abc import Mapping

LONGEST_STATUS = 200
"""Characters of a status line: it is one line of `systemctl status`."""

OURS_ALONE = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})

BARRIER_S = 1.0
"""How long a barrier is waited for: systemd answers within a millisecond, if it lives."""


def _notify(message: str, descriptor: int | None = None) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    ancillary = []
    if descriptor is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
    ):
        channel.connect(address)
        channel.sendmsg([message.encode()], ancillary)


def _line(text: str) -> str:
    """One line, whatever was in it: a newline would begin another assignment."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST_STATUS else words[: LONGEST_STATUS - 1] + "…"


def supervised() -> bool:
    """Whether a service manager listens to us."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the way to the service manager: nobody but us speaks in our name, or tries to."""
    return {name: value for name, value in environment.items() if name not in OURS_ALONE}


def ready(status_line: str) -> None:
    """We serve."""
    _notify(f"READY=1\nSTATUS={_line(status_line)}")


def status(line: str) -> None:
    """One line for `systemctl status`."""
    _notify(f"STATUS={_line(line)}")


def stopping() -> None:
    """We drain."""
    _notify("STOPPING=1\nSTATUS=draining")


def failed(reason: str, errno: int = 0) -> None:
    """We end because of this. `systemctl status` shows it after we are gone, so we wait until systemd has taken it."""
    _notify(f"STATUS={_line(reason)}" + (f"\nERRNO={errno}" if errno else ""))
    barrier()


def barrier() -> None:
    """Return when systemd has processed what was sent before, or after BARRIER_S."""
    if not supervised():
        return
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        _notify("BARRIER=1", theirs)
    finally:
        os.close(theirs)
    # systemd closes its end when it comes to it; a pipe whose last writer is gone is readable
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    poll.poll(BARRIER_S * 1000)
    os.close(ours)


def reloading() -> None:
    """We reread the configuration; `ready` ends it."""
    _notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def extend_timeout(seconds: int) -> None:
    """We are alive and need so much longer to start, reload or stop."""
    _notify(f"EXTEND_TIMEOUT_USEC={seconds * 1_000_000}")


def watchdog() -> None:
    """The loop turns."""
    _notify("WATCHDOG=1")


def watchdog_s() -> float:
    """How long systemd waits for `watchdog` before it ends us; 0 if it does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0


def store(name: str, descriptor: int) -> None:
    """Have systemd keep a descriptor of ours for the next process: it comes with LISTEN_FDS then, under this name."""
    _notify(f"FDSTORE=1\nFDNAME={name}", descriptor)


def unstore(name: str) -> None:
    """Have systemd close what it keeps under this name."""
    _notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def take_descriptors() -> list[tuple[str, int]]:
    """What systemd passed (sd_listen_fds(3)), as (name, descriptor), once: children inherit neither them nor the variables."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for index in range(int(count)):
        descriptor = 3 + index
        os.set_inheritable(descriptor, False)
        found.append((names[index] if index < len(names) else "", descriptor))
    return found
