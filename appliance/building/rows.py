"""Rows that differ, for the check that a row alone is answered as it is among others: real ones, and variations where they lack.

Pure arithmetic on arrays, rows first; `verification` says how many it wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feeds = dict[str, "NDArray[Any]"]


def row_count(feed: Feeds) -> int:
    """How many rows a run's inputs have."""
    first = next(iter(feed.values()))
    return int(first.shape[0]) if first.ndim else 1


def differing(feeds: Sequence[Feeds], most: int) -> list[Feeds]:
    """At most so many rows of the runs that differ from each other, shaped as those of the largest run."""
    found: list[Feeds] = []
    shape = _shapes(max(feeds, key=row_count))
    for row in _rows(feeds):
        if len(found) == most:
            break
        if _shapes(row) == shape and not any(same(row, other) for other in found):
            found.append(row)
    return found


def _rows(feeds: Sequence[Feeds]) -> Iterator[Feeds]:
    for feed in sorted(feeds, key=row_count, reverse=True):
        for row in range(row_count(feed)):
            yield {name: array[row : row + 1] for name, array in feed.items()}


def _shapes(feed: Feeds) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in feed.items()}


def same(one: Feeds, other: Feeds) -> bool:
    """Whether all inputs are equal; NaN equals NaN."""
    return all(np.array_equal(array, other[name], equal_nan=array.dtype.kind == "f") for name, array in one.items())


def joined(rows: Sequence[Feeds]) -> Feeds:
    """The rows as one run."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def variations(row: Feeds, names: Sequence[str], ranges: Mapping[str, tuple[float, float]], most: int) -> list[Feeds]:
    """The row, and up to `most` in all that differ in the inputs of those names; fewer where there are no more.

    Their values stand in other places: what is valid for each element stays so. Where all are equal there are no other places:
    numbers come from their range, or else floats become smaller, and integers lie between 0 and what they were; strings stay.
    """
    found = [row]
    for number in range(1, 2 * most):
        other = row | {name: _vary(row[name], number, ranges.get(name)) for name in names}
        if not any(same(other, one) for one in found):
            found.append(other)
    return found[:most]


def _vary(array: NDArray[Any], number: int, bounds: tuple[float, float] | None) -> NDArray[Any]:
    flat = array.reshape(-1)
    if not flat.size:
        return array
    kind = flat.dtype.kind
    if not np.array_equal(flat, flat[:1].repeat(flat.size), equal_nan=kind == "f"):
        return np.roll(flat, number).reshape(array.shape)
    if kind == "b":
        flipped: NDArray[Any] = np.logical_xor(array, number % 2 == 1)
        return flipped
    if kind not in "iuf":
        return array
    low, high = bounds or (min(0, flat[0]), max(1, flat[0]))
    random = np.random.default_rng(number)
    if kind in "iu":
        return random.integers(int(low), int(high), array.shape, array.dtype, endpoint=True)
    if bounds:
        share = random.random(array.shape)
        return np.asarray(low * (1 - share) + high * share, array.dtype)
    return np.asarray(array * (1 - number / 32) if flat[0] else array + number, array.dtype)
