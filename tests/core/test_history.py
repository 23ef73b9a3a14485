"""Buckets: merged in any grouping they say the same, and a bucket's place does not depend on when it is asked."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.history import (
    TIERS,
    Bucket,
    Held,
    bucket_start,
    choose_tier,
    merge,
    merge_rows,
    reading,
    rows_to_drop,
)
from appliance.recording.packing import pack_buckets, pack_readings, unpack

NUMBERS = st.floats(-1e9, 1e9)
READINGS = st.lists(NUMBERS, min_size=1, max_size=60)


@given(READINGS, st.integers(1, 10))
def test_merging_merged_groups_is_merging_everything(values: list[float], size: int) -> None:
    whole = merge(map(reading, values))
    groups = [merge(map(reading, values[begin : begin + size])) for begin in range(0, len(values), size)]
    again = merge(group for group in groups if group is not None)
    assert whole is not None
    assert again is not None
    assert (again.count, again.minimum, again.maximum) == (len(values), min(values), max(values))
    assert again.mean == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-3)
    assert again.minimum <= again.mean <= again.maximum
    assert whole.mean == pytest.approx(again.mean, rel=1e-9, abs=1e-3)


@given(READINGS)
def test_one_bucket_merged_alone_is_itself(values: list[float]) -> None:
    bucket = merge(map(reading, values))
    assert bucket is not None
    assert merge([bucket]) == bucket
    assert merge([]) is None


def test_the_mean_of_unequal_buckets_is_weighted() -> None:
    assert merge([Bucket(1, 0, 0, 0), Bucket(3, 4, 4, 4)]) == Bucket(4, 0, 3.0, 4)


@given(st.lists(st.floats(-1e308, 1e308), min_size=1, max_size=9))
def test_huge_readings_do_not_overflow_the_mean(values: list[float]) -> None:
    bucket = reduce(lambda a, b: merge([a, b]) or a, map(reading, values))
    assert bucket.minimum <= bucket.mean <= bucket.maximum


@given(st.floats(0, 1e9), st.sampled_from([tier.step_s for tier in TIERS]))
def test_a_bucket_begins_at_its_step_and_holds_its_moment(moment: float, step: int) -> None:
    start = bucket_start(moment, step)
    assert start % step == 0
    assert start <= moment < start + step


def test_a_series_that_is_missing_in_a_row_is_a_gap() -> None:
    merged = merge_rows([{"a": reading(1.0)}, {"a": reading(3.0), "b": reading(9.0)}])
    assert merged == {"a": Bucket(2, 1.0, 2.0, 3.0), "b": reading(9.0)}


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(NUMBERS, min_size=1, max_size=4)))
def test_rows_come_back_as_they_were_packed(columns: dict[str, list[float]]) -> None:
    names = tuple("abcdef")
    buckets = {name: merged for name, values in columns.items() if (merged := merge(map(reading, values)))}
    assert unpack(names, pack_buckets(names, buckets)) == buckets
    firsts = {name: values[0] for name, values in columns.items()}
    assert unpack(names, pack_readings(names, firsts)) == {name: reading(value) for name, value in firsts.items()}


@given(st.binary(max_size=200))
def test_any_bytes_unpack_to_sound_buckets_or_none(data: bytes) -> None:
    for bucket in unpack(("a", "b"), data).values():
        assert bucket.minimum <= bucket.mean <= bucket.maximum


@pytest.mark.parametrize(
    ("step", "held", "tier"),
    [
        (1.0, (Held((1, 8_000), (1, 9_000), 1_000), Held((1, 0), (1, 9_000), 17), Held((1, 0), (1, 9_000), 2)), 0),
        (1.0, (Held((1, 8_000), (1, 8_000), 2_000), Held((1, 0), (1, 5_040), 80), Held((1, 0), (1, 5_400), 5)), 1),
        (60.0, (Held((1, 8_000), (1, 9_000), 1_000), Held((1, 0), (1, 9_000), 17), Held((1, 0), (1, 9_000), 1)), 1),
        (3_600.0, (Held((1, 8_000), (1, 9_000), 1_000), Held((1, 0), (1, 9_000), 17), Held((1, 0), (1, 9_000), 1)), 2),
        (3_600.0, (Held((1, 8_000), (1, 9_000), 1_000), Held((1, 0), (1, 9_000), 17), Held((1, 0))), 1),
        (1.0, (Held((2, 8_000), (2, 8_000), 9), Held((1, 9_000), (1, 9_000), 9), Held((1, 0), (1, 0), 9)), 2),
        (1.0, (Held(None), Held(None), Held(None)), 0),
        (900.0, (Held((1, 9_000), (1, 9_000), 9), Held(None), Held(None)), 0),
        (1.0, (Held((1, 9_000)), Held((1, 0), (1, 600), 9), Held((1, 0))), 1),
    ],
)
def test_the_tier_is_the_finest_that_reaches_back(step: float, held: tuple[Held, ...], tier: int) -> None:
    assert choose_tier(step, held) == tier


@given(st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 20_000)), min_size=3, max_size=3), st.floats(0, 5_000))
def test_a_tier_is_never_chosen_that_lacks_what_a_coarser_one_has(tiers: list[tuple[int, int]], step: float) -> None:
    held = [Held((1, begin), (1, max(begin, asked)), 10) for begin, asked in tiers]
    chosen = choose_tier(step, held)
    for coarser, tier in zip(held[chosen + 1 :], TIERS[chosen + 1 :], strict=False):
        assert coarser.first_asked is not None
        assert coarser.first_asked[1] + tier.step_s > tiers[chosen][0]


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_pruning_ends_at_the_floor(rows: int, floor: int) -> None:
    dropped = rows_to_drop(rows, floor)
    assert rows - dropped >= min(rows, floor)
    assert dropped > 0 or rows <= floor
