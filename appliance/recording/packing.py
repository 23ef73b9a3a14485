"""Rows of readings as bytes: doubles in the order of a layout, NaN where a series has no value.

One row holds all series of a moment, so that a second costs one insert however many series there are. Pure.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from appliance.core.history import Bucket, reading


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
        low, mean, high = numbers[3 * index : 3 * index + 3]
        count = int(numbers[3 * size + index])
        if count and low <= mean <= high and math.isfinite(high - low):
            found[name] = Bucket(count, low, mean, high)
    return found
