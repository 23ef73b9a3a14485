"""Requests that went wrong, in the log: the first of each kind with all that is known of it, the others as a number."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from appliance.core.errors import ApplianceError, ErrorCode, invalid, unavailable
from appliance.observability.requests import LONGEST_ID, ORDINARY, RequestLog


class Waiting(logging.Handler):
    """Sets an event with the next record."""

    def __init__(self, event: asyncio.Event) -> None:
        super().__init__()
        self._event = event

    def emit(self, record: logging.LogRecord) -> None:
        self._event.set()


def said(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.getMessage() == "request.refused"]  # type: ignore[attr-defined]


async def test_an_entry_says_which_request_of_which_model_and_why(caplog: pytest.LogCaptureFixture) -> None:
    RequestLog("request.refused").add(unavailable("it loads"), model="digits", request_id="42", key="digits")
    assert said(caplog) == [{"model": "digits", "code": "UNAVAILABLE", "request_id": "42", "reason": "it loads"}]
    assert caplog.records[0].levelno == logging.WARNING


async def test_a_flood_is_two_entries_and_the_second_says_how_many_more(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog("request.refused", interval_s=0.02)
    for number in range(1000):
        log.add(invalid("no"), model="digits", request_id=str(number))
    second_entry = asyncio.Event()
    waiting = Waiting(second_entry)
    logging.getLogger().addHandler(waiting)
    try:
        async with asyncio.timeout(10):
            await second_entry.wait()
    finally:
        logging.getLogger().removeHandler(waiting)
    first, second = said(caplog)
    assert first["request_id"] == "0"
    assert (second["more"], second["code"], second["model"]) == (999, "INVALID_ARGUMENT", "digits")
    assert second["reason"] == "999 more within 0.02 s"
    assert "request_id" not in second


async def test_each_code_and_each_key_has_an_entry_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog("request.refused")
    for key in ("a", "b", "a"):
        log.add(invalid("no"), key=key)
        log.add(unavailable("no"), key=key)
    assert len(said(caplog)) == 4


async def test_names_that_a_client_invents_make_no_entries_of_their_own_and_are_cut(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = RequestLog("request.refused")
    for number in range(100):
        log.add(invalid("no"), model=f"invented-{number}" * 100, request_id="i" * 10_000)
    (entry,) = said(caplog)
    assert len(entry["model"]) == len(entry["request_id"]) == LONGEST_ID


@pytest.mark.parametrize("code", ORDINARY)
async def test_what_clients_do_every_day_is_not_said(code: ErrorCode, caplog: pytest.LogCaptureFixture) -> None:
    RequestLog("request.refused").add(ApplianceError(code, "as ever"), model="camera")
    assert said(caplog) == []
