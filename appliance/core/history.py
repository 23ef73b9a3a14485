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


def choose_tier(since: float, until: float, step_s: float, oldest: Sequence[float | None]) -> int:
    """The index of the finest tier that is no finer than asked for and goes back to `since`; else the one that goes furthest.

    `oldest`: wall time of each tier's first row, None for an empty tier.
    """
    best: int | None = None
    for index, tier in enumerate(TIERS):
        first = oldest[index]
        if first is None:
            continue
        if best is None or first < (oldest[best] or 0.0) - tier.step_s:
            best = index
        wanted = max(step_s, 1.0)
        coarser_exists = index + 1 < len(TIERS) and oldest[index + 1] is not None and TIERS[index + 1].step_s <= wanted
        if first <= max(since, 0.0) + tier.step_s and not coarser_exists:
            return index
    return best if best is not None else 0


def row_bytes(tier: Tier, series: int) -> int:
    """About what one row takes on the disk: doubles for a reading, three doubles and a count for a bucket."""
    return ROW_OVERHEAD_BYTES + series * (8 if tier.step_s == 1 else 28)


def full_bytes(series: int) -> int:
    """About what all tiers take together when they are full, a year after the start."""
    return sum(tier.rows * row_bytes(tier, series) for tier in TIERS)


def rows_to_drop(rows: int, floor_rows: int, share: float = 0.1) -> int:
    """How many of the oldest rows to give up now: a tenth, at least one, and none below the floor."""
    return max(0, min(rows - floor_rows, max(1, int(rows * share))))
