"""Logs: one line a record, whatever a peer put into it."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from appliance.observability.logs import HumanFormatter, JsonFormatter, RateLimit, configure


def record(message: str, fields: dict[str, object], *, error: bool = False) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.WARNING, __file__, 1, message, (), sys.exc_info() if error else None)
    made.fields = fields
    return made


def test_json_is_one_object_a_line_even_for_forged_input() -> None:
    line = JsonFormatter().format(record("http.malformed", {"peer": 'x\n{"level":"info","event":"forged"}', "n": 3}))
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["n"]) == ("http.malformed", "warning", 3)


def test_people_get_one_line_with_control_characters_escaped() -> None:
    line = HumanFormatter().format(record("model.state", {"model": "a\x1b[31m\nb", "state": "READY"}))
    assert "\n" not in line
    assert "\x1b" not in line
    assert "state=READY" in line


def test_long_values_are_cut() -> None:
    assert len(JsonFormatter().format(record("e", {"v": "x" * 100_000}))) < 3000


def test_a_traceback_is_part_of_the_record() -> None:
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        assert "boom" in json.loads(JsonFormatter().format(record("e", {}, error=True)))["traceback"]


def test_configure_writes_to_stderr_in_the_asked_form(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure("json", "warning")
        logging.getLogger("t").info("quiet")
        logging.getLogger("t").warning("loud", extra={"fields": {"a": 1}})
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    [line] = capsys.readouterr().err.splitlines()
    assert json.loads(line)["a"] == 1


def test_one_line_per_key_and_interval_and_the_rest_counted() -> None:
    limit = RateLimit(1.0, max_keys=2)
    assert [limit.allow("a", now) for now in (0.0, 0.1, 0.2, 1.1)] == [0, None, None, 2]
    assert limit.allow("b", 1.1) == 0
    assert limit.allow("c", 1.1) == 0
    assert len(limit._last) <= 2
