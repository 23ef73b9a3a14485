"""What a monitor is told, from status documents as the appliance writes them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from appliance.cli.check import Limits, judge
from appliance.cli.main import app


def document(**changes: Any) -> dict[str, Any]:
    model = {"name": "digits", "version": "1", "detail": "READY", "reason": "", "p99_us": 1500}
    status = {"draining": False, "ready": True, "requests_per_s": 12.5, "line": "1 model ready, 12 req/s"}
    return {
        "status": status | changes.pop("status", {}),
        "models": [model | changes.pop("model", {})],
    } | changes


def test_all_is_well_in_one_line_with_performance_data() -> None:
    readings = {"gpu.0.temperature": 61.0, "gpu.0.power": None, "gpu.1.power": 72.25, "gpu.0.memory.used": 3221225472.0}
    verdict = judge(document(readings=readings, recorder={"problem": ""}), Limits())
    assert (verdict.severity, verdict.text) == ("OK", "1 model ready, 12 req/s")
    assert verdict.performance == (
        "requests_per_s=12.5;;;0 'digits:1_p99'=1.5ms;;;0"
        " 'gpu.0.memory.used'=3221225472B 'gpu.0.temperature'=61 'gpu.1.power'=72.25"
    )


DATUM = re.compile(
    r"(?:[^\s'=]+|'(?:[^'=]|'')+')=(?:U|-?[0-9]+(?:\.[0-9]+)?(?:s|us|ms|%|B|KB|MB|TB|c)?)"
    r"(?:;(?:-?[0-9.]+)?(?:;(?:-?[0-9.]+)?(?:;-?[0-9.]+)?)?)?"
)


@given(
    st.floats(0, 1e12),
    st.floats(0, 1e9),
    st.dictionaries(
        st.sampled_from(["gpu.0.temperature", "host.power", "host.temperature.x=y'z", "gpu.0.memory.used"]),
        st.floats() | st.none(),
    ),
    st.sampled_from([0.0, 0.5, 1e7]),
)
def test_performance_data_is_in_the_plugins_format(
    rate: float, p99_us: float, readings: dict[str, float | None], limit: float
) -> None:
    told = judge(
        document(status={"requests_per_s": rate}, model={"p99_us": p99_us}, readings=readings), Limits(limit, limit)
    ).performance
    # one that no model takes: labels may hold blanks
    while told:
        datum = DATUM.match(told)
        assert datum, told
        told = told[datum.end() :].removeprefix(" ")


def test_who_answers_nobody_has_no_percentile() -> None:
    verdict = judge(document(model={"detail": "FAILED", "reason": "x", "p99_us": 0.0}), Limits(200, 500))
    assert "'digits:1_p99'=U;200;500;0" in verdict.performance


def test_reasons_of_many_lines_stay_on_the_plugin_s_one_line() -> None:
    verdict = judge(document(model={"detail": "FAILED", "reason": "first\nsecond | third"}), Limits())
    assert verdict.text == "digits version 1 does not serve: first second / third"


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        (
            {"model": {"detail": "FAILED", "reason": "no such operator"}},
            "CRITICAL",
            "digits version 1 does not serve: no such operator",
        ),
        ({"status": {"ready": False}}, "CRITICAL", "a model that should answer does not"),
        ({"status": {"ready": False, "draining": True}}, "WARNING", "shutting down"),
        ({"governor": {"level": "WARM", "reason": "GPU 0 at 80 °C"}}, "WARNING", "WARM: GPU 0 at 80 °C"),
        ({"governor": {"level": "CRITICAL", "reason": "GPU 0 at 95 °C"}}, "CRITICAL", "95 °C"),
        ({"governor": {"level": "NOMINAL", "reason": ""}}, "OK", "1 model ready"),
        (
            {"findings": [{"severity": "warning", "text": "reboot pending | driver"}]},
            "WARNING",
            "reboot pending / driver",
        ),
        ({"findings": [{"severity": "error", "text": "GPU 0 is lost"}]}, "CRITICAL", "GPU 0 is lost"),
        ({"recorder": {"problem": "no room"}}, "WARNING", "the flight recorder does not record: no room"),
        ({"recorder": {"problem": ""}}, "OK", "1 model ready"),
    ],
)
def test_the_worst_thing_decides(changes: dict[str, Any], severity: str, words: str) -> None:
    verdict = judge(document(**changes), Limits())
    assert verdict.severity == severity
    assert words in verdict.text


@pytest.mark.parametrize(
    ("limits", "severity"),
    [
        (Limits(1.0, 2.0), "WARNING"),
        (Limits(1.0, 1.4), "CRITICAL"),
        (Limits(2.0, 3.0), "OK"),
        (Limits(0, 1), "CRITICAL"),
    ],
)
def test_a_slow_model_is_held_against_the_limits(limits: Limits, severity: str) -> None:
    assert judge(document(), limits).severity == severity


def test_worse_things_come_first_in_the_text() -> None:
    verdict = judge(
        document(model={"detail": "FAILED", "reason": "x"}, findings=[{"severity": "warning", "text": "y"}]), Limits()
    )
    assert verdict.text.index("does not serve") < verdict.text.index("y")


def test_nobody_answering_is_critical() -> None:
    done = CliRunner().invoke(app, ["check", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 2
    assert done.stdout.startswith("APPLIANCE CRITICAL: no appliance answers")


@pytest.mark.parametrize(
    "arguments",
    [["--url", "bogus"], ["--no-such-option"], ["--p99-warning-ms", "fast"], ["--p99-warning-ms", "-1"], ["surplus"]],
)
def test_a_question_that_is_wrong_is_unknown_and_not_critical(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["check", *arguments]).exit_code == 3


def test_a_wrong_url_is_said_in_the_plugin_s_one_line() -> None:
    done = CliRunner().invoke(app, ["check", "--url", "bogus"])
    assert done.stdout == "APPLIANCE UNKNOWN: 'bogus' is no URL of an appliance\n"


def test_other_commands_keep_their_exit_status_for_usage() -> None:
    assert CliRunner().invoke(app, ["status", "--no-such-option"]).exit_code == 2
