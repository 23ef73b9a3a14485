from hypothesis import given
from hypothesis import strategies as st

from appliance.core.histogram import BUCKETS, LONGEST_US, Histogram, RecentTimes, bound_us, bucket

times = st.integers(0, LONGEST_US)


@given(times)
def test_a_time_lies_below_its_buckets_bound_and_not_below_the_one_before(us: int) -> None:
    index = bucket(us)
    assert us < bound_us(index)
    assert index == 0 or us >= bound_us(index - 1)


@given(times)
def test_a_bucket_is_at_most_an_eighth_wide(us: int) -> None:
    index = bucket(us)
    lower = bound_us(index - 1) if index else 0
    assert bound_us(index) - lower <= max(1, lower / 8)


def test_every_bucket_is_reached_and_the_last_takes_what_is_longer() -> None:
    assert {bucket(bound_us(index) - 1) for index in range(BUCKETS)} == set(range(BUCKETS))
    assert bucket(LONGEST_US) == bucket(10**12) == BUCKETS - 1
    assert bucket(-5) == 0


@given(st.lists(times, min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_the_exact_one_rounded_up_by_at_most_an_eighth(values: list[int], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    exact = next(value for rank, value in enumerate(ordered, 1) if rank >= share * len(ordered))
    found = histogram.percentile(share)
    assert exact <= found <= exact * 1.125 + 1
    assert histogram.count == len(values)


def test_nothing_counted_has_no_percentile() -> None:
    assert Histogram().percentile(0.99) == 0


@given(st.lists(times))
def test_cumulative_counts_rise_to_the_number_of_all(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    found = list(histogram.cumulative())
    assert found[-1] == (LONGEST_US + 1, len(values))
    for bound, count in found:
        assert count == sum(value < bound for value in values)


def test_recent_times_forget_the_window_before_the_last() -> None:
    recent = RecentTimes()
    recent.add(1000)
    recent.turn()
    assert recent.percentile(0.5) >= 1000
    recent.turn()
    assert recent.percentile(0.5) == 0
