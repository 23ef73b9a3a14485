"""The journal's own protocol, over a real datagram socket, and the catalog that explains what is sent."""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.observability import journal
from appliance.observability.logs import EventFormatter

ROOT = Path(__file__).parents[2]


def decode(data: bytes) -> dict[str, str]:
    """As journald reads it."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        if b"=" in line:
            key, _, value = line.partition(b"=")
        else:
            key, size = line, struct.unpack("<Q", data[:8])[0]
            value, data = data[8 : 8 + size], data[8 + size + 1 :]
        fields[key.decode()] = value.decode()
    return fields


class Journald:
    """The receiving end."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/socket"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(5)

    def entry(self) -> dict[str, str]:
        data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 20, 1)
        for descriptor in descriptors:
            with os.fdopen(descriptor, "rb") as file:
                file.seek(0)
                data = file.read()
        return decode(data)


@pytest.fixture
def journald() -> Iterator[Journald]:
    with tempfile.TemporaryDirectory() as folder:
        made = Journald(folder)
        yield made
        made.socket.close()


@pytest.fixture
def handler(journald: Journald) -> Iterator[journal.JournalHandler]:
    made = journal.JournalHandler(journald.path)
    made.setFormatter(EventFormatter())
    yield made
    made.close()


def record(event: str, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("x", level, __file__, 1, event, None, None)
    made.fields = fields
    return made


def test_an_event_arrives_with_its_fields_and_its_message_id(
    journald: Journald, handler: journal.JournalHandler
) -> None:
    handler.emit(record("worker.lost", logging.ERROR, model="digits", pid=42, reason="SIGKILL", device_fault=False))
    entry = journald.entry()
    assert entry["MODEL"] == "digits"
    assert entry["WORKER_PID"] == "42"
    assert entry["REASON"] == "SIGKILL"
    assert entry["APPLIANCE_DEVICE_FAULT"] == "False"
    assert entry["PRIORITY"] == "3"
    assert entry["MESSAGE_ID"] == journal.MESSAGE_IDS["worker.lost"]
    assert entry["MESSAGE"] == "worker.lost model=digits pid=42 reason=SIGKILL device_fault=False"


def test_a_model_that_failed_has_another_message_id_than_one_that_changes_its_state(
    journald: Journald, handler: journal.JournalHandler
) -> None:
    handler.emit(record("model.state", model="a", state="READY"))
    assert "MESSAGE_ID" not in journald.entry()
    handler.emit(record("model.state", model="a", state="FAILED"))
    assert journald.entry()["MESSAGE_ID"] == journal.MESSAGE_IDS["model.failed"]


def test_a_large_entry_goes_by_a_sealed_file(journald: Journald, handler: journal.JournalHandler) -> None:
    handler._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    handler.emit(record("x", text="ä" * 300_000))
    assert journald.entry()["APPLIANCE_TEXT"] == "ä" * 300_000


def test_a_field_of_a_peer_cannot_forge_another_one(journald: Journald, handler: journal.JournalHandler) -> None:
    handler.emit(record("http.malformed", peer="x\nMESSAGE_ID=forged\n_UID=0"))
    entry = journald.entry()
    assert entry["APPLIANCE_PEER"] == "x\nMESSAGE_ID=forged\n_UID=0"
    assert "_UID" not in entry
    assert "MESSAGE_ID" not in entry


def test_a_journald_that_does_not_read_stops_nobody_and_is_told_what_it_missed(
    journald: Journald, handler: journal.JournalHandler
) -> None:
    while not handler.lost:
        handler.emit(record("x"))
    handler.emit(record("x"))
    assert handler.lost == 2
    journald.entry()
    handler.emit(record("y"))
    while (entry := journald.entry())["EVENT"] != "y":
        pass
    assert entry["APPLIANCE_LOST"] == "2"
    assert handler.lost == 0


def test_a_journald_that_is_gone_is_no_error(handler: journal.JournalHandler, journald: Journald) -> None:
    journald.socket.close()
    Path(journald.path).unlink()
    handler.emit(record("x"))
    assert handler.lost == 1


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,20}", fullmatch=True), st.text()))
def test_whatever_is_encoded_is_decoded(fields: dict[str, str]) -> None:
    expected = {key: value.encode(errors="replace").decode() for key, value in fields.items()}
    assert decode(journal.encode(fields)) == expected


def test_stderr_is_the_journal_only_if_systemd_says_so_of_this_very_file(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert journal.stderr_is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not journal.stderr_is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", "nonsense")
    assert not journal.stderr_is_journal()


def test_the_catalog_explains_every_message_id_and_no_other() -> None:
    text = (ROOT / "systemd" / "appliance.catalog").read_text()
    assert set(re.findall(r"^-- ([0-9a-f]{32})$", text, re.MULTILINE)) == set(journal.MESSAGE_IDS.values())
