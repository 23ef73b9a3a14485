"""Rows of readings as bytes: doubles in the order of a layout, NaN where a series has no value.

One row holds all series of a moment, so that a second costs one insert however many series there are. Pure.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import le, mul

from appliance.core.history import Bucket, merge, merge_rows, reading


def pack_readings(names: Sequence[str], values: Mapping[str, float]) -> bytes:
    """A row of single readings: 8 bytes each."""
    return struct.pack(f"<{len(names)}d", *(values.get(name, math.nan) for name in names))


def pack_buckets(names: Sequence[str], values: Mapping[str, Bucket]) -> bytes:
    """A row of buckets: minimum, mean and maximum of each, then the counts; 28 bytes each."""
    numbers: list[float] = []
    counts: list[int] = []
    for name in names:
        bucket = values.get(name)
        numbers += (bucket.minimum, bucket.mean, bucket.maximum) if bucket else (math.nan, math.nan, math.nan)
        counts.append(min(bucket.count, 2**32 - 1) if bucket else 0)
    return struct.pack(f"<{3 * len(names)}d{len(names)}I", *numbers, *counts)


def unpack(names: Sequence[str], data: bytes) -> dict[str, Bucket]:
    """The buckets of a row of either kind; empty for one whose length fits neither, or whose numbers make no sense."""
    size = len(names)
    if len(data) == 8 * size:
        values = struct.unpack(f"<{size}d", data)
        return {name: reading(value) for name, value in zip(names, values, strict=True) if math.isfinite(value)}
    if len(data) != 28 * size:
        return {}
    numbers = struct.unpack(f"<{3 * size}d{size}I", data)
    found = {}
    for index, name in enumerate(names):
        bucket = _bucket(int(numbers[3 * size + index]), *numbers[3 * index : 3 * index + 3])
        if bucket is not None:
            found[name] = bucket
    return found


class Selection:
    """Some series of one layout: read out of its rows without looking at the others, and merged column by column.

    An hour of 200 series is 720,000 numbers; the loops over them run in C, and only what is returned becomes a bucket.
    """

    def __init__(self, names: Sequence[str], wanted: Collection[str]) -> None:
        places = [index for index, name in enumerate(names) if name in wanted]
        size = len(names)
        self._names = [names[index] for index in places]
        self._readings = _picking([(8 * index, "d", 8) for index in places], 8 * size)
        counts = [(24 * size + 4 * index, "I", 4) for index in places]
        self._buckets = _picking([(24 * index, "3d", 24) for index in places] + counts, 28 * size)

    def merged(self, rows: Sequence[bytes]) -> dict[str, Bucket]:
        """What `merge_rows` makes of the rows' wanted series, the mean up to rounding. Rows of no known length are left out."""
        readings = [row for row in rows if len(row) == self._readings.size]
        buckets = [row for row in rows if len(row) == self._buckets.size != self._readings.size]
        parts = [self._merged_readings(readings)] if readings else []
        parts += [self._merged_buckets(buckets)] if buckets else []
        return parts[0] if len(parts) == 1 else merge_rows(parts)

    def _merged_readings(self, rows: Sequence[bytes]) -> dict[str, Bucket]:
        columns = zip(*map(self._readings.unpack, rows), strict=True)
        merged = ((name, _merged_values(column)) for name, column in zip(self._names, columns, strict=True))
        return {name: bucket for name, bucket in merged if bucket is not None}

    def _merged_buckets(self, rows: Sequence[bytes]) -> dict[str, Bucket]:
        columns = list(zip(*map(self._buckets.unpack, rows), strict=True))
        size = len(self._names)
        merged = (
            (name, _merged_columns(columns[3 * size + index], *columns[3 * index : 3 * index + 3]))
            for index, name in enumerate(self._names)
        )
        return {name: bucket for name, bucket in merged if bucket is not None}


def _merged_values(values: Sequence[float]) -> Bucket | None:
    total = sum(values)
    if not math.isfinite(total):  # a gap, or too large to be summed
        return merge(reading(value) for value in values if math.isfinite(value))
    low, high = min(values), max(values)
    return Bucket(len(values), low, min(max(total / len(values), low), high), high)


def _merged_columns(
    counts: Sequence[int], lows: Sequence[float], means: Sequence[float], highs: Sequence[float]
) -> Bucket | None:
    low, high, total = min(lows), max(highs), sum(map(mul, means, counts))
    sound = all(counts) and all(map(le, lows, means)) and all(map(le, means, highs))
    if not sound or not math.isfinite(total) or not math.isfinite(high - low):
        found = (_bucket(*numbers) for numbers in zip(counts, lows, means, highs, strict=True))
        return merge(bucket for bucket in found if bucket is not None)
    count = sum(counts)
    return Bucket(count, low, min(max(total / count, low), high), high)


def _bucket(count: int, low: float, mean: float, high: float) -> Bucket | None:
    """None for no readings, and for numbers that make no sense."""
    return Bucket(count, low, mean, high) if count and low <= mean <= high and math.isfinite(high - low) else None


def _picking(fields: Iterable[tuple[int, str, int]], whole: int) -> struct.Struct:
    """Unpacks the fields (offset, format, size; in order) of `whole` bytes, and skips what lies between."""
    parts, end = ["<"], 0
    for offset, code, size in fields:
        parts.append(f"{offset - end}x{code}")
        end = offset + size
    return struct.Struct("".join(parts) + f"{whole - end}x")
