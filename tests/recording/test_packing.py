"""Rows of readings: what a selection merges is what is merged number by number, whatever is in the rows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.history import Bucket, merge_rows
from appliance.recording.packing import Selection, pack_buckets, pack_readings, unpack

NAMES = ("a", "b", "c", "d")
VALUES = st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, 1.7e308, -1.7e308])
BUCKETS = st.builds(
    lambda count, numbers: Bucket(count, *numbers), st.integers(0, 5), st.tuples(VALUES, VALUES, VALUES)
) | st.builds(
    lambda count, numbers: Bucket(count, *sorted(numbers)),
    st.integers(1, 2**32 - 1),
    st.tuples(*[st.floats(-1e9, 1e9)] * 3),
)
ROWS = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), VALUES).map(lambda row: pack_readings(NAMES, row)),
    st.dictionaries(st.sampled_from(NAMES), BUCKETS).map(lambda row: pack_buckets(NAMES, row)),
    st.binary(max_size=120),
)


@given(st.lists(ROWS, min_size=1, max_size=6), st.frozensets(st.sampled_from((*NAMES, "elsewhere"))))
def test_a_selection_merges_as_row_by_row(rows: list[bytes], wanted: frozenset[str]) -> None:
    slow = merge_rows(unpack(NAMES, row) for row in rows)
    found = Selection(NAMES, wanted).merged(rows)
    assert set(found) == set(slow) & wanted
    for name, bucket in found.items():
        expected = slow[name]
        assert (bucket.count, bucket.minimum, bucket.maximum) == (expected.count, expected.minimum, expected.maximum)
        scale = max(abs(expected.minimum), abs(expected.maximum))
        assert bucket.mean == pytest.approx(expected.mean, rel=1e-9, abs=1e-9 * min(scale, 1e300))
        assert bucket.minimum <= bucket.mean <= bucket.maximum


def test_a_layout_that_is_damaged_has_no_series() -> None:
    assert Selection((), frozenset({"a"})).merged([pack_readings(NAMES, {"a": 1.0}), b""]) == {}
