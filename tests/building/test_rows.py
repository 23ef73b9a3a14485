"""Rows for the check of batch invariance: real ones first, each once, and variations that stay within what is valid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from appliance.building.rows import Feeds, differing, joined, same, variations


def _feed(*rows: list[float], dtype: str = "f4") -> Feeds:
    return {"x": np.array(rows, dtype)}


def test_rows_that_differ_are_gathered_from_all_runs_of_one_shape() -> None:
    feeds = [_feed([1, 2], [1, 2], [3, np.nan]), _feed([3, np.nan]), _feed([1, 2, 3]), _feed([5, 6])]
    found = differing(feeds, 8)
    assert [row["x"].tolist() for row in found] == [[[1, 2]], [[3, pytest.approx(np.nan, nan_ok=True)]], [[5, 6]]]
    assert len(differing(feeds, 2)) == 2


@pytest.mark.parametrize("dtype", ["f2", "f4", "i1", "i8", "u1", "u8", "?"])
@pytest.mark.parametrize("values", [[0, 1, 1], [0, 0, 0], [1, 1, 1], [1]])
def test_every_row_of_numbers_has_variations_of_the_same_kind(dtype: str, values: list[float]) -> None:
    row = _feed(values, dtype=dtype)
    found = variations(row, ["x"], {}, 8)
    assert 2 <= len(found) <= 8
    assert found[0] is row
    assert not any(same(one, other) for one, other in itertools.combinations(found, 2))
    assert joined(found)["x"].shape == (len(found), len(values))
    assert joined(found)["x"].dtype == row["x"].dtype


def test_variations_keep_the_values_of_a_row_or_its_range() -> None:
    ids = _feed([5, 9, 7], dtype="i8")
    assert all(sorted(row["x"][0]) == [5, 7, 9] for row in variations(ids, ["x"], {}, 8))
    for dtype in ("i8", "f4"):
        found = joined(variations(_feed([7, 7, 7], dtype=dtype), ["x"], {"x": (5, 9)}, 8))["x"]
        assert (len(found), found.min() >= 5, found.max() <= 9) == (8, True, True)


def test_only_the_named_inputs_vary() -> None:
    row = {"x": np.array([[1.0, 2.0]]), "length": np.array([[2]])}
    assert {int(one["length"][0, 0]) for one in variations(row, ["x"], {}, 8)} == {2}


def test_strings_change_their_places_only() -> None:
    assert [one["s"].tolist() for one in variations({"s": np.array([["a", "b"]])}, ["s"], {}, 8)] == [
        [["a", "b"]], [["b", "a"]]
    ]  # fmt: skip
    assert len(variations({"s": np.array([["a", "a"]])}, ["s"], {}, 8)) == 1
