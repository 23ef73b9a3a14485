"""Readings and the table of quantities."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from appliance.core import quantities as q
from appliance.core.readings import Snapshot, measured


@given(
    quantity=st.sampled_from(list(q.QUANTITIES.values())),
    raw=st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.binary()),
    scale=st.sampled_from([1.0, 1e-3, 1e-9, 0.1]),
)
def test_anything_becomes_a_value_in_range_or_a_reason(quantity: q.Quantity, raw: object, scale: float) -> None:
    reading = measured(quantity, raw, 1.0, scale=scale)
    if reading.value is None:
        assert reading.reason
    else:
        assert not reading.reason
        assert math.isfinite(reading.value)
        assert quantity.low <= reading.value <= quantity.high


def test_all_bits_set_is_not_a_number_even_where_it_would_fit() -> None:
    assert [measured(q.GPU_ENERGY, raw, 0.0).value for raw in (2**32 - 1, 2**64 - 1, 2**32)] == [None, None, 2**32]


@given(st.sampled_from(list(q.QUANTITIES.values())), st.lists(st.text(), min_size=2, max_size=2))
def test_every_name_leads_back_to_its_row(quantity: q.Quantity, labels: list[str]) -> None:
    name = quantity.name(*labels)
    found = q.quantity_of(name)
    assert found is not None
    # `host.fan.{fan}` and `host.fan.{fan}.duty` differ by their number of parts, so a name has one row
    assert found[0] is quantity


def test_a_name_that_nobody_reads_says_so() -> None:
    snapshot = Snapshot(1, 0.0, 0.0, 0.0, {})
    assert (snapshot.value("nope"), snapshot.reason("nope")) == (None, "nothing reads this here")
    assert q.quantity_of("nope") is None
