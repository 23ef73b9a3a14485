"""Readings over time: buckets with minimum, mean and maximum, three tiers of them, and which one answers a question.

Pure: values in, values out. Buckets are cut on the monotonic clock, so that a stepped wall clock neither tears nor merges one;
`recording` stores them and knows the wall time. Retention is counted in rows, which no clock can empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec


class Bucket(msgspec.Struct, frozen=True):
    """`count` readings between `minimum` and `maximum`, in the reading's own unit."""

    count: int
    minimum: float
    mean: float
    maximum: float


class Tier(msgspec.Struct, frozen=True):
    """A resolution: the length of a bucket, how many are kept, and how many a full disk may not take (a small budget may)."""

    step_s: int
    rows: int
    floor_rows: int

    @property
    def span_s(self) -> int:
        """What it remembers."""
        return self.step_s * self.rows


TIERS = (Tier(1, 3_600, 600), Tier(60, 7 * 1_440, 1_440), Tier(900, 365 * 96, 2_880))
"""One second for an hour, one minute for a week, fifteen minutes for a year."""

ROW_OVERHEAD_BYTES = 96
"""Of a stored row: its key, times, layout, and its entries in two indexes."""


def reading(value: float) -> Bucket:
    """One reading as a bucket."""
    return Bucket(1, value, value, value)


def merge(buckets: Iterable[Bucket]) -> Bucket | None:
    """One bucket for several, the mean weighted by count; None for none.

    Merging in any grouping gives the same minimum, maximum and count, and the same mean up to rounding.
    """
    found = list(buckets)
    if not found:
        return None
    count = sum(bucket.count for bucket in found)
    low = min(bucket.minimum for bucket in found)
    high = max(bucket.maximum for bucket in found)
    # weights first: a sum of large readings could overflow where their mean does not
    mean = math.fsum(bucket.mean * (bucket.count / count) for bucket in found)
    return Bucket(count, low, min(max(mean, low), high), high)


def merge_rows(rows: Iterable[Mapping[str, Bucket]]) -> dict[str, Bucket]:
    """Rows of buckets by series, merged series by series; one that is missing in a row is a gap, not a zero."""
    columns: dict[str, list[Bucket]] = {}
    for row in rows:
        for name, bucket in row.items():
            columns.setdefault(name, []).append(bucket)
    return {name: merged for name, buckets in columns.items() if (merged := merge(buckets)) is not None}


def bucket_start(monotonic: float, step_s: int) -> int:
    """Where the bucket of that moment begins, in whole seconds of the monotonic clock."""
    return math.floor(monotonic / step_s) * step_s


Place = tuple[int, int]
"""Of a row: its segment (numbered in the order in which they were) and the start of its bucket on the monotonic clock there."""


class Held(msgspec.Struct, frozen=True):
    """What a tier holds: its first row at all, and of the asked time the first row and how many there are; None: no row."""

    first: Place | None
    first_asked: Place | None = None
    asked_rows: int = 0


def choose_tier(step_s: float, held: Sequence[Held]) -> int:
    """The index of the finest tier that is no finer than asked for and goes back as far as is asked; 0 where nothing is recorded.

    A tier goes back far enough if no coarser one has a bucket of the asked time from before its first row. That is told by the
    order of rows, never by their wall times: a clock that was wrong once makes no tier look older than it is.
    """
    best = 0
    for index, tier in enumerate(held):
        if tier.first is None or tier.first_asked is None:
            continue
        earlier = [
            coarser.first_asked
            for coarser, its in zip(held[index + 1 :], TIERS[index + 1 :], strict=False)
            if coarser.first_asked is not None and _ends(coarser.first_asked, its) <= tier.first
        ]
        best = index
        coarse_enough = any(
            coarser.first_asked is not None and its.step_s <= max(step_s, 1.0)
            for coarser, its in zip(held[index + 1 :], TIERS[index + 1 :], strict=False)
        )
        if not earlier and not coarse_enough:
            break
    return best


def _ends(place: Place, tier: Tier) -> Place:
    return place[0], place[1] + tier.step_s


def recorded_s(held: Sequence[Held]) -> float:
    """How much of the asked time was recorded, in seconds: what the tier that has most of it has."""
    return float(max((one.asked_rows * tier.step_s for one, tier in zip(held, TIERS, strict=True)), default=0))


def row_bytes(tier: Tier, series: int) -> int:
    """About what one row takes on the disk: doubles for a reading, three doubles and a count for a bucket."""
    return ROW_OVERHEAD_BYTES + series * (8 if tier.step_s == 1 else 28)


def full_bytes(series: int) -> int:
    """About what all tiers take together when they are full, a year after the start."""
    return sum(tier.rows * row_bytes(tier, series) for tier in TIERS)


def rows_to_drop(rows: int, floor_rows: int, share: float = 0.1) -> int:
    """How many of the oldest rows to give up now: a tenth, at least one, and none below the floor."""
    return max(0, min(rows - floor_rows, max(1, int(rows * share))))
