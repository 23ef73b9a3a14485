"""Rows for the check of batch invariance: real ones first, each once, and variations that stay within what is valid."""

from __future__ import annotations

import numpy as np
import pytest

from appliance.building.rows import Feeds, differing, same, varied


def _feed(*rows: list[float], dtype: str = "f4") -> Feeds:
    return {"x": np.array(rows, dtype)}


def test_rows_that_differ_are_gathered_from_all_runs_of_one_shape() -> None:
    feeds = [_feed([1, 2], [1, 2], [3, np.nan]), _feed([3, np.nan]), _feed([1, 2, 3]), _feed([5, 6])]
    found = differing(feeds, 8)
    assert [row["x"].tolist() for row in found] == [[[1, 2]], [[3, pytest.approx(np.nan, nan_ok=True)]], [[5, 6]]]
    assert len(differing(feeds, 2)) == 2


@pytest.mark.parametrize("dtype", ["f2", "f4", "i1", "i8", "u1", "u8", "?"])
@pytest.mark.parametrize("values", [[0, 1, 1], [0, 0, 0], [1, 1, 1]])
def test_every_row_of_numbers_has_a_variation_of_the_same_kind(dtype: str, values: list[float]) -> None:
    row = _feed(values, dtype=dtype)
    others = [varied(row, number, {}) for number in range(1, 8)]
    assert any(not same(row, other) for other in others)
    assert all((other["x"].dtype, other["x"].shape) == (row["x"].dtype, row["x"].shape) for other in others)


def test_variations_keep_the_values_of_a_row_or_its_range() -> None:
    ids = _feed([5, 9, 7], dtype="i8")
    assert all(sorted(varied(ids, number, {})["x"][0]) == [5, 7, 9] for number in range(9))
    for dtype in ("i8", "f4"):
        flat = _feed([7, 7, 7], dtype=dtype)
        for number in range(1, 9):
            found = varied(flat, number, {"x": (5, 9)})["x"]
            assert found.min() >= 5
            assert found.max() <= 9


def test_strings_change_their_places_only() -> None:
    words = {"s": np.array([["a", "b"]])}
    assert varied(words, 1, {})["s"].tolist() == [["b", "a"]]
    assert same(varied({"s": np.array([["a", "a"]])}, 1, {}), {"s": np.array([["a", "a"]])})
