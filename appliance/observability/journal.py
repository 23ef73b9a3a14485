"""Logs into systemd's journal by its own protocol: every field of an event is one that `journalctl` can be asked for.

`journalctl MODEL=digits`, `REQUEST_ID=…`, `CODE=ENGINE_FAULT`, `WORKER_PID=…`; an event that wants an explanation has a message
id, under which `journalctl -x` finds it in the catalog. The protocol is systemd's JOURNAL_NATIVE_PROTOCOL: one datagram of
KEY=value lines, a value with a newline by its length, and a sealed memfd for what is too large. `logs` chooses this handler; it
knows nothing of our events but their names.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import re
import socket
import struct
from typing import Any

SOCKET = "/run/systemd/journal/socket"
SEND_BUFFER_BYTES = 8 << 20
"""What may wait for a busy journald before entries are lost; the kernel caps it at net.core.wmem_max."""

MESSAGE_IDS = {
    "daemon.ready": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e001",
    "daemon.start_failed": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e002",
    "daemon.failed": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e002",
    "daemon.stopped": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e003",
    "config.reloaded": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e004",
    "config.reload_refused": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e005",
    "config.refused": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e006",
    "worker.lost": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e007",
    "watchdog.stalled": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e008",
    "model.missing": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e009",
    "model.failed": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e00a",
    "engine.gave_out": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e00b",
    "model.drain_timeout": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e00c",
    "request.refused": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e00d",
    "request.failed": "9f1d2c6b4a3e4f0c8a53d8a1b6c7e00e",
}
"""Events that systemd/appliance.catalog explains. An id never changes its meaning."""

NAMES = {
    "model": "MODEL",
    "version": "MODEL_VERSION",
    "request_id": "REQUEST_ID",
    "request": "REQUEST_ID",
    "code": "CODE",
    "reason": "REASON",
    "state": "STATE",
}
"""Fields that keep a short name; every other one is APPLIANCE_NAME, so that it takes no name of somebody else's."""

PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
LOSSES = (errno.EAGAIN, errno.ENOBUFS, errno.ECONNREFUSED, errno.ENOENT, errno.ENOTCONN, errno.ECONNRESET)


def stderr_is_journal() -> bool:
    """Whether systemd connected our stderr to the journal (systemd.exec(5), $JOURNAL_STREAM): then it is there, and wants us."""
    try:
        device, inode = map(int, os.environ.get("JOURNAL_STREAM", "").split(":"))
        status = os.fstat(2)
    except (ValueError, OSError):
        return False
    return (status.st_dev, status.st_ino) == (device, inode)


class JournalHandler(logging.Handler):
    """Sends each record as one entry and never waits: what a stuck journald does not take is counted and told later.

    Its formatter makes the MESSAGE that people read. `path` is the journal's socket.
    """

    def __init__(self, path: str = SOCKET) -> None:
        super().__init__()
        self.lost = 0
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def emit(self, record: logging.LogRecord) -> None:
        """Send it, or count it as lost."""
        try:
            fields = entry(record, self.format(record))
            if self.lost:
                fields["APPLIANCE_LOST"] = str(self.lost)
            self._send(encode(fields))
            self.lost = 0
        except OSError as error:
            self.lost += 1
            if error.errno not in LOSSES:
                self.handleError(record)
        except Exception:
            self.handleError(record)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_large(data)

    def _send_large(self, data: bytes) -> None:
        """journald reads a sealed memfd instead of a datagram that would be too large."""
        descriptor = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            self._socket.sendmsg([b""], rights, 0, self._path)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """No more entries."""
        self._socket.close()
        super().close()


def entry(record: logging.LogRecord, message: str) -> dict[str, str]:
    """The journal's fields of a record whose text for people is `message`."""
    event = record.getMessage()
    given: dict[str, Any] = getattr(record, "fields", {})
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(next((priority for level, priority in PRIORITIES if record.levelno >= level), 7)),
        "SYSLOG_IDENTIFIER": "appliance",
        "EVENT": event,
    }
    explained = "model.failed" if event == "model.state" and given.get("state") == "FAILED" else event
    if explained in MESSAGE_IDS:
        fields["MESSAGE_ID"] = MESSAGE_IDS[explained]
    for key, value in given.items():
        name = NAMES.get(key)
        if name is None:
            name = "WORKER_PID" if key == "pid" and event.startswith("worker.") else "APPLIANCE_" + field_name(key)
        fields[name] = str(value)
    return fields


def field_name(key: str) -> str:
    """Upper-case letters, digits and underscores: everything else is refused by journald without a word."""
    return re.sub(r"[^A-Z0-9_]", "_", key.upper())[:50]


def encode(fields: dict[str, str]) -> bytes:
    """One datagram: KEY=value lines; a value that has lines of its own goes by its length, little-endian, 64 bits."""
    parts = []
    for key, value in fields.items():
        data = value.encode(errors="replace")
        if b"\n" in data:
            parts.append(key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n")
        else:
            parts.append(key.encode() + b"=" + data + b"\n")
    return b"".join(parts)
