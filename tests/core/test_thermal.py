"""The governor's judgement: what the level promises, under any readings that a sensor may give."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.robust import theil_sen
from appliance.core.thermal import (
    DeviceSample,
    Gates,
    Judgement,
    Level,
    Step,
    ThermalCore,
    ThermalPolicy,
    ThermalSample,
    Throttle,
    gates_for,
)

LIMIT_C = 90.0
STILL = ThermalPolicy(lookahead_s=0.0)
"""Without a forecast, thresholds can be named to the degree."""


def gpu(temperature: float | None, *throttle: Throttle, **changes: object) -> DeviceSample:
    base = DeviceSample(device="gpu:0", temperature_c=temperature, slowdown_c=LIMIT_C, throttle=frozenset(throttle))
    return msgspec.structs.replace(base, **changes)


def play(core: ThermalCore, readings: Iterable[DeviceSample | None], start: float = 0.0) -> list[Judgement]:
    """One reading a second; None: the device is not in the sample."""
    return [
        core.observe(ThermalSample(start + second, () if reading is None else (reading,)))
        for second, reading in enumerate(readings)
    ]


def levels(core: ThermalCore, temperatures: Iterable[float]) -> list[Level]:
    return [judged.gates.level for judged in play(core, (gpu(temperature) for temperature in temperatures))]


def changes(found: list[Level]) -> int:
    return sum(before is not after for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("temperature", "level"),
    [(77, Level.NOMINAL), (78, Level.WARM), (82, Level.WARM), (83, Level.HOT), (87, Level.HOT), (88, Level.CRITICAL)],
)
def test_the_margins_are_the_levels(temperature: float, level: Level) -> None:
    assert levels(ThermalCore(STILL), [temperature] * 10)[-1] is level


def test_the_reason_is_a_sentence_for_people() -> None:
    gates = play(ThermalCore(STILL), [gpu(85.0)] * 5)[-1].gates
    assert gates.reason == "GPU 0 is at 85 °C, 5 °C below its slowdown: priorities 9 and lower are refused"
    assert (gates.max_priority, gates.builds, gates.explanations, gates.concurrency) == (8, False, False, 1.0)
    tighter = play(ThermalCore(STILL), [gpu(86.0)] * 5)[-1].gates
    assert (tighter.level, tighter.max_priority, tighter.concurrency, tighter.batch_growth) == (Level.HOT, 8, 0.5, 0.5)
    assert tighter.retry_after_s >= 1


def test_critical_serves_the_highest_class_or_nobody_as_configured() -> None:
    for stop, most in ((False, 1), (True, 0)):
        policy = ThermalPolicy(stop_when_critical=stop)
        gates = play(ThermalCore(policy), [gpu(89.0)] * 5)[-1].gates
        assert gates.level is Level.CRITICAL
        assert [priority for priority in range(1, 17) if gates.admits(priority)] == list(range(1, most + 1))


@given(st.floats(30, 100), st.one_of(st.floats(), st.none()), st.integers(0, 59), st.sets(st.sampled_from(Throttle)))
def test_one_lying_sample_never_changes_the_level(
    truth: float, lie: float | None, at: int, reasons: set[Throttle]
) -> None:
    core = ThermalCore(ThermalPolicy())
    told = [gpu(truth)] * 60
    told[at] = gpu(lie, *reasons, clock_mhz=100.0, max_clock_mhz=2000.0)
    honest = levels(ThermalCore(ThermalPolicy()), [truth] * 60)[-1]
    found = [judged.gates.level for judged in play(core, told)]
    assert set(found) <= {Level.NOMINAL, honest}
    assert changes(found) <= 1


@given(st.lists(st.floats(40, 100), min_size=5, max_size=80), st.floats(0, 20))
def test_hotter_never_means_a_lower_level(temperatures: list[float], hotter: float) -> None:
    """All along the way; the growing dwell is left out, which answers to what happened before."""
    policy = ThermalPolicy(relapse=1.0, dwell_s=5.0)
    cool = levels(ThermalCore(policy), temperatures)
    warm = levels(ThermalCore(policy), [temperature + hotter for temperature in temperatures])
    assert all(high >= low for high, low in zip(warm, cool, strict=True))


@given(st.lists(st.floats(60, 100), min_size=5, max_size=80), st.floats(40, 100), st.floats(0, 20))
def test_after_any_past_a_hotter_reading_means_no_lower_level(past: list[float], last: float, hotter: float) -> None:
    policy = ThermalPolicy(dwell_s=4.0)
    assert levels(ThermalCore(policy), [*past, last + hotter])[-1] >= levels(ThermalCore(policy), [*past, last])[-1]


@given(st.sampled_from([12.0, 7.0, 2.0]), st.lists(st.floats(0.01, 2.99), min_size=50, max_size=200))
def test_noise_within_the_hysteresis_never_changes_the_level(margin: float, noise: list[float]) -> None:
    """From above the threshold it does not go on, and once on it does not go off."""
    inside = [LIMIT_C - margin - above for above in noise]
    off = ThermalCore(STILL)
    assert changes(levels(off, [*[inside[0]] * 5, *inside])[5:]) == 0
    on = ThermalCore(STILL)
    assert changes(levels(on, [*[LIMIT_C - margin] * 5, *inside])[5:]) == 0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from([60.0, 79.0, 84.0, 89.0, 95.0]), min_size=300, max_size=900), st.integers(1, 40))
def test_whatever_the_temperature_does_changes_are_bounded(steps: list[float], hold: int) -> None:
    """Each of four triggers goes on and off at most once a dwell."""
    policy = ThermalPolicy(dwell_s=20.0)
    temperatures = [temperature for temperature in steps for _ in range(hold)][:3000]
    bound = sum(2 * (len(temperatures) / policy.first_dwell_s(step) + 1) for step in Step)
    assert changes(levels(ThermalCore(policy), temperatures)) <= bound


def test_a_load_too_much_for_the_cooling_is_tried_ever_more_rarely() -> None:
    """Hot while it is let in, cool while it is not: in a day this ends in rare attempts, not in an oscillation."""
    core = ThermalCore(STILL)
    temperature = 70.0
    found = []
    for second in range(24 * 3600):
        judged = core.observe(ThermalSample(float(second), (gpu(temperature),)))
        found.append(judged.gates.level)
        target = 100.0 if judged.gates.level < Level.HOT else 70.0
        temperature += (target - temperature) / 60
    first, last = found[:3600], found[-3600:]
    assert changes(last) <= 16 < 2 * changes(first)
    assert max(found) is Level.HOT


def test_a_sensor_that_vanished_is_not_cool() -> None:
    core = ThermalCore(ThermalPolicy())
    play(core, [gpu(84.0)] * 10)
    blind = play(core, [gpu(None, missing="GPU is lost")] * 3600, start=10)
    assert {judged.gates.level for judged in blind} == {Level.HOT}
    assert "cannot be read (GPU is lost); it was at 84 °C" in blind[-1].gates.reason
    cool = ThermalCore(ThermalPolicy())
    play(cool, [gpu(40.0)] * 10)
    found = [judged.gates.level for judged in play(cool, [None] * 60, start=10)]
    assert found[0] is Level.NOMINAL
    assert found[-1] is Level.WARM
    assert changes(found) == 1
    back = [judged.gates.level for judged in play(cool, [gpu(40.0)] * 10, start=70)]
    assert back[-1] is Level.NOMINAL


@given(st.lists(st.floats(40, 100), min_size=1, max_size=40), st.integers(1, 200), st.booleans())
def test_vanishing_never_lowers_the_level(temperatures: list[float], seconds: int, named: bool) -> None:
    core = ThermalCore(ThermalPolicy(dwell_s=3.0))
    before = levels(core, temperatures)[-1]
    gone = play(core, [gpu(None, missing="no answer") if named else None] * seconds, start=len(temperatures))
    assert all(judged.gates.level >= before for judged in gone)


@given(st.lists(st.floats(60, 110), min_size=1, max_size=100))
def test_what_cooled_down_is_nominal_again(temperatures: list[float]) -> None:
    core = ThermalCore(ThermalPolicy(max_dwell_s=120.0))
    levels(core, temperatures)
    assert play(core, [gpu(50.0)] * 200, start=len(temperatures))[-1].gates.level is Level.NOMINAL


def test_a_box_without_sensors_is_nominal_and_says_so() -> None:
    core = ThermalCore(ThermalPolicy())
    judged = play(core, [DeviceSample(device="host", missing="no thermal zone")] * 600)[-1]
    assert judged.gates.level is Level.NOMINAL
    assert judged.devices[0].note == "the host has no temperature sensor that can be read (no thermal zone)"
    assert play(ThermalCore(ThermalPolicy()), [None] * 10)[-1].gates == Gates()


@pytest.mark.parametrize("nonsense", [255.0, 65.535e3, -273.0, float("nan"), float("inf")])
def test_nonsense_is_no_reading(nonsense: float) -> None:
    core = ThermalCore(ThermalPolicy())
    play(core, [gpu(50.0)] * 10)
    assert play(core, [gpu(nonsense)] * 10, start=10)[-1].gates.level is Level.NOMINAL
    assert play(core, [gpu(nonsense)] * 60, start=20)[-1].gates.level is Level.WARM


def test_a_trend_raises_the_level_early_but_never_to_critical() -> None:
    rising = [60 + 0.8 * second for second in range(35)]
    ahead = levels(ThermalCore(ThermalPolicy()), rising)
    behind = levels(ThermalCore(STILL), rising)
    assert ahead.index(Level.HOT) < behind.index(Level.HOT) - 5
    steep = ThermalCore(ThermalPolicy(lookahead_s=1000.0))
    assert levels(steep, [40 + 0.5 * second for second in range(60)])[-1] is Level.HOT
    judged = steep.judgement.devices[0]
    assert judged.limit_in_s == pytest.approx((90 - judged.temperature_c) / 0.5, rel=0.01)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("reason", "clock", "level"),
    [
        (Throttle.THERMAL_HARDWARE, 1900.0, Level.CRITICAL),
        (Throttle.THERMAL_SOFTWARE, 1900.0, Level.HOT),
        (Throttle.POWER_BRAKE, 1900.0, Level.HOT),
        (Throttle.POWER_CAP, 1900.0, Level.NOMINAL),
        (Throttle.POWER_CAP, 900.0, Level.WARM),
    ],
)
def test_throttle_reasons_weigh_differently(reason: Throttle, clock: float, level: Level) -> None:
    core = ThermalCore(ThermalPolicy())
    judged = play(core, [gpu(50.0, reason, clock_mhz=clock, max_clock_mhz=2000.0)] * 5)[-1]
    assert judged.gates.level is level


def test_a_margin_counts_before_the_temperature_and_the_worst_device_decides() -> None:
    core = ThermalCore(STILL)
    for second in range(5):
        judged = core.observe(
            ThermalSample(
                float(second),
                (
                    DeviceSample(device="gpu:0", temperature_c=40.0, margin_c=5.0),
                    DeviceSample(device="host", temperature_c=70.0, limit_c=100.0),
                ),
            )
        )
    assert [device.level for device in judged.devices] == [Level.HOT, Level.NOMINAL]
    assert judged.gates.level is Level.HOT


def test_an_old_sample_changes_nothing() -> None:
    core = ThermalCore(STILL)
    play(core, [gpu(50.0)] * 10)
    for _ in range(10):
        assert core.observe(ThermalSample(3.0, (gpu(99.0),))).gates.level is Level.NOMINAL


@given(st.integers(1, 16), st.integers(1, 16), st.floats(0.1, 1.0), st.booleans())
def test_gates_are_monotone_in_the_level(low: int, critical: int, share: float, stop: bool) -> None:
    policy = ThermalPolicy(low_priority=low, critical_priority=critical, squeezed_share=share, stop_when_critical=stop)
    steps = [(Level.NOMINAL, False), (Level.WARM, False), (Level.HOT, False), (Level.HOT, True), (Level.CRITICAL, True)]
    found = [gates_for(policy, level, squeezed=squeezed, note="", dwell_s=1.0) for level, squeezed in steps]
    for wide, narrow in pairwise(found):
        assert narrow.max_priority <= wide.max_priority
        assert narrow.builds <= wide.builds
        assert narrow.explanations <= wide.explanations
        assert narrow.concurrency <= wide.concurrency
        assert narrow.batch_growth <= wide.batch_growth


def test_the_slope_is_what_most_points_say() -> None:
    line = [(float(x), 3.0 * x) for x in range(20)]
    assert theil_sen(line) == pytest.approx(3.0)
    line[4], line[15] = (4.0, 1e6), (15.0, -1e6)
    assert theil_sen(line) == pytest.approx(3.0)
    assert theil_sen([(1.0, 2.0), (1.0, 9.0)]) == 0.0
