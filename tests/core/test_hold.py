"""An operator's hold: never milder than the sensors, over by itself, and refused in words where it would be neither."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.hold import MOST_S, held, make_hold, strictest
from appliance.core.thermal import OPEN, Gates, Level, ThermalPolicy, gates_for

policies = st.builds(
    ThermalPolicy,
    low_priority=st.integers(2, 16),
    critical_priority=st.integers(1, 16),
    squeezed_share=st.sampled_from([0.25, 0.5, 1.0]),
    stop_when_critical=st.booleans(),
)
levels = st.sampled_from(list(Level))
asked = st.sampled_from(["WARM", "hot", "CRITICAL"])


@st.composite
def judged(draw: st.DrawFn, policy: ThermalPolicy) -> Gates:
    return gates_for(
        policy, draw(levels), squeezed=draw(st.booleans()), note="GPU 0 is hot", dwell_s=draw(st.floats(0, 900))
    )


def as_strict(one: Gates, other: Gates) -> bool:
    """Whether `one` allows nothing that `other` forbids."""
    return (
        one.level >= other.level
        and one.max_priority <= other.max_priority
        and one.builds <= other.builds
        and one.explanations <= other.explanations
        and one.concurrency <= other.concurrency
        and one.batch_growth <= other.batch_growth
        and one.retry_after_s >= other.retry_after_s
    )


@given(st.data(), policies, asked, st.floats(0.1, MOST_S), st.floats(0, 2 * MOST_S))
def test_a_hold_allows_nothing_that_the_sensors_or_the_operator_forbid_and_is_over_by_itself(
    data: st.DataObject, policy: ThermalPolicy, level: str, seconds: float, later_s: float
) -> None:
    gates = data.draw(judged(policy))
    hold = make_hold(level, seconds, "the fan is being changed", 100.0)
    now = 100.0 + later_s
    result = held(policy, gates, hold, now)
    if now >= hold.until_s:
        assert result == gates
        assert hold.left_s(now) == 0
        return
    assert as_strict(result, gates)
    own = gates_for(policy, hold.level, squeezed=False, note="x", dwell_s=hold.left_s(now))
    assert as_strict(result, own)
    assert result.level is max(gates.level, hold.level)
    # what the sensors say at a level at least as high is what people read: CRITICAL is never silenced
    assert ("GPU 0 is hot" in result.reason) == (gates.level >= hold.level)
    assert ("the fan is being changed" in result.reason) == (gates.level < hold.level)


@given(st.data(), policies)
def test_the_stricter_of_two_does_not_depend_on_their_order_but_for_the_words(
    data: st.DataObject, policy: ThermalPolicy
) -> None:
    one, other = data.draw(judged(policy)), data.draw(judged(policy))
    there, back = strictest(one, other), strictest(other, one)
    assert as_strict(there, back)
    assert as_strict(back, there)
    assert strictest(one, one) == one
    assert as_strict(strictest(one, OPEN), one)


@pytest.mark.parametrize(
    ("level", "seconds", "reason", "word"),
    [
        ("NOMINAL", 60, "r", "only be stricter"),
        ("COLD", 60, "r", "WARM, HOT, CRITICAL"),
        ("HOT", 0, "r", "more than 0"),
        ("HOT", -1, "r", "more than 0"),
        ("HOT", MOST_S + 1, "r", "a day"),
        ("HOT", math.nan, "r", "a day"),
        ("HOT", math.inf, "r", "a day"),
        ("HOT", 60, "  \n ", "a reason"),
        ("HOT", 60, "x" * 201, "a reason"),
    ],
)
def test_what_is_no_hold_is_refused_with_what_was_expected(level: str, seconds: float, reason: str, word: str) -> None:
    with pytest.raises(ApplianceError, match=word) as caught:
        make_hold(level, seconds, reason, 0.0)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_a_reason_of_several_lines_becomes_one() -> None:
    assert make_hold("hot", 1, "the\nfan\t is off", 0.0).reason == "the fan is off"
