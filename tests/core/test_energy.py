"""Energy: the parts sum to what the counter counted, exactly, whatever the inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.energy import (
    Counter,
    EnergyMeter,
    EnergyReading,
    EnergySum,
    Integrator,
    Usage,
    attribute,
    box_total,
    contained,
    counter_delta,
    price_list,
    split,
)


def nvml(counter_uj: int) -> EnergyReading:
    return EnergyReading({"gpu.0.energy": Counter(counter_uj)}, "nvml")


USAGE = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.builds(Usage, st.floats(0, 1e6), st.integers(0, 1_000_000))
)


@given(st.integers(0, 10**15), st.floats(0.001, 3600), st.none() | st.floats(0, 2000), USAGE)
def test_idle_active_and_unattributed_sum_to_the_counter(
    total: int, window: float, idle_w: float | None, usage: dict[str, Usage]
) -> None:
    idle, unattributed, models = attribute(total, window, idle_w, usage)
    assert idle + unattributed + sum(share.active_uj for share in models) == total
    assert (
        min(idle, unattributed, *(share.active_uj for share in models)) >= 0 if models else idle + unattributed == total
    )


@given(st.integers(0, 10**15), st.lists(st.floats(0, 1e300), max_size=8))
def test_a_split_is_whole_and_in_proportion(amount: int, weights: list[float]) -> None:
    parts = split(amount, weights)
    if any(weights):
        assert sum(parts) == amount
        assert all(part == 0 or weight > 0 for part, weight in zip(parts, weights, strict=True)) or amount < len(
            weights
        )
    else:
        assert parts == [0] * len(weights)


def test_energy_follows_busy_time() -> None:
    idle, unattributed, models = attribute(100_000_000, 1.0, 20.0, {"a": Usage(0.6, 10), "b": Usage(0.2, 99)})
    assert (idle, unattributed) == (20_000_000, 0)
    assert [share.active_uj for share in models] == [60_000_000, 20_000_000]


def test_without_a_busy_model_somebody_else_used_it_and_without_idle_power_only_the_busy_share_counts() -> None:
    assert attribute(50_000_000, 1.0, 20.0, {"a": Usage(0.0, 0)})[:2] == (20_000_000, 30_000_000)
    idle, unattributed, [share] = attribute(100, 10.0, None, {"a": Usage(2.5, 1)})
    assert (idle, unattributed, share.active_uj) == (0, 75, 25)


@pytest.mark.parametrize(
    ("before", "after", "wrap", "delta"),
    [(5, 9, 0, 4), (90, 10, 100, 20), (90, 10, 0, 10), (5, 5, 100, 0), (0, 9_000, 0, None), (10, 9, 5_000, 9)],
)
def test_counters_wrap_or_are_reset_and_one_that_says_what_cannot_be_is_not_believed(
    before: int, after: int, wrap: int, delta: int | None
) -> None:
    assert counter_delta(Counter(before), Counter(after, wrap), 1_000) == delta
    assert counter_delta(Counter(before, wrap), Counter(after), 1_000) == delta, "the range cannot be read now"


@given(st.lists(st.integers(0, 2_000_000_000), min_size=1, max_size=30), st.integers(0, 262_143_999_999))
def test_packages_that_start_over_one_by_one_sum_to_what_they_used(steps: list[int], begin: int) -> None:
    wrap, meter, used, booked = 262_144_000_000, EnergyMeter(), [begin, 100_000_000_000], 0
    for second, step in enumerate([0, *steps]):
        used = [used[0] + step, used[1] + step // 3]
        counters = {str(index): Counter(one % wrap, wrap) for index, one in enumerate(used)}
        window = meter.observe(float(second), "host", EnergyReading(counters, "rapl"), {})
        booked += window.total_uj if window else 0
    assert booked == sum(step + step // 3 for step in steps)


@pytest.mark.parametrize(
    "other",
    [
        EnergyReading({"n": Counter(5)}, "estimate", estimated=True),
        EnergyReading({"n": Counter(5), "m": Counter(5)}, "nvml"),
        EnergyReading({"n": Counter(5, epoch=1)}, "nvml"),
        EnergyReading({"n": Counter(123_457 * 10**6)}, "nvml"),
    ],
)
def test_a_reading_that_does_not_follow_from_the_last_books_nothing(other: EnergyReading) -> None:
    meter = EnergyMeter()
    steady = [EnergyReading({"n": Counter(number * 10_000_000)}, "nvml") for number in range(4)]
    windows = [
        meter.observe(float(second), "gpu:0", reading, {})
        for second, reading in enumerate([steady[0], steady[1], other])
    ]
    windows += [meter.observe(3.0 + second, "gpu:0", reading, {}) for second, reading in enumerate(steady[2:])]
    assert [window.total_uj if window else None for window in windows][:3] == [None, 10_000_000, None]
    assert all(window.total_uj <= 10_000_000 * 2 for window in windows if window)
    assert meter.idle_w("gpu:0") == pytest.approx(10.0), "and nobody learns from it"


@given(st.lists(st.tuples(st.floats(0.01, 2.0), st.floats(0, 500)), min_size=2, max_size=50))
def test_the_integral_is_the_trapezoid(steps: list[tuple[float, float]]) -> None:
    integrator, now, expected, last = Integrator(), 0.0, 0.0, None
    for gap, watts in steps:
        now += gap
        if last is not None:
            expected += (watts + last[1]) / 2 * (now - last[0])
        integrator.add(now, watts)
        last = (now, watts)
    assert integrator.counter_uj == pytest.approx(expected * 1e6, abs=len(steps) + 1)


def test_a_gap_and_a_late_sample_count_nothing() -> None:
    integrator = Integrator(max_gap_s=10.0)
    integrator.add(0.0, 100.0)
    assert integrator.add(60.0, 100.0) == 0
    assert integrator.add(59.0, 100.0) == 0
    assert integrator.epoch == 1, "what came before does not count with what comes after"
    assert integrator.add(61.0, 100.0) == 100_000_000
    assert integrator.epoch == 1


@given(st.lists(st.tuples(st.integers(0, 10**9), USAGE), min_size=1, max_size=20))
def test_the_windows_of_a_meter_sum_to_the_counter_s_way(steps: list[tuple[int, dict[str, Usage]]]) -> None:
    meter, counter, seen = EnergyMeter(), 0, 0
    for number, (more, usage) in enumerate(steps):
        counter += more
        window = meter.observe(float(number), "gpu0", nvml(counter), usage)
        if window is not None:
            parts = window.idle_uj + window.unattributed_uj + sum(share.active_uj for share in window.models)
            assert parts == window.total_uj
            seen += parts
    assert seen == counter - steps[0][0]


def test_idle_power_is_learned_when_nothing_runs() -> None:
    meter = EnergyMeter()
    for second in range(4):
        meter.observe(float(second), "gpu0", nvml(second * 15_000_000), {"m": Usage(0.0, 0)})
    assert meter.idle_w("gpu0") == 15.0
    window = meter.observe(4.0, "gpu0", nvml(145_000_000), {"m": Usage(1.0, 10)})
    assert window is not None
    assert (window.idle_uj, window.models[0].active_uj, window.unattributed_uj) == (15_000_000, 85_000_000, 0)


def test_what_is_within_something_else_counts_once() -> None:
    host = EnergySum("host", "ina3221", False, "total", "", 720, 60.0, 0)
    gpu = EnergySum("gpu:0", "estimate", True, "total", "", 240, 60.0, 0)
    sums = contained([gpu, host])
    assert [one.within for one in sums] == ["host", ""]
    assert box_total(sums) == 720
    beside = contained([gpu, EnergySum("host", "rapl", False, "total", "", 720, 60.0, 0)])
    assert ([one.within for one in beside], box_total(beside)) == (["", ""], 960)
    assert contained([gpu]) == [gpu]


def test_prices_are_per_kilowatt_hour() -> None:
    [row] = price_list([EnergySum("gpu0", "nvml", False, "model", "m", 3_600_000 * 10**6, 1.0, 2_000)], 0.30, 380.0)
    assert (row["kwh"], row["cost"], row["gco2"], row["joules_per_1000"]) == (1.0, 0.30, 380.0, 1_800_000.0)
