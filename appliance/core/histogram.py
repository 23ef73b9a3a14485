"""How long things took, in buckets that are cheap to fill: eight to each doubling, so a percentile is at most 12.5 % too high.

Plain counting without a clock. The scheduler fills one for each served version; metrics, the page and `top` read them. The layout
is that of an HDR histogram with three bits of precision (Tene, "HdrHistogram").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

SUB_BITS = 3
LONGEST_US = (1 << 27) - 1
"""134 s; what takes longer is counted as that."""

BUCKETS = ((LONGEST_US.bit_length() - SUB_BITS - 1) << SUB_BITS) + (2 << SUB_BITS)


def bucket(us: int) -> int:
    """The index of the bucket that a time in microseconds belongs to."""
    us = min(max(us, 0), LONGEST_US)
    exponent = us.bit_length() - SUB_BITS - 1
    return us if exponent <= 0 else (exponent << SUB_BITS) + (us >> exponent)


def bound_us(index: int) -> int:
    """The first time in microseconds that does not belong to that bucket any more, nor to any before it."""
    exponent = max(0, (index >> SUB_BITS) - 1)
    return (index - (exponent << SUB_BITS) + 1) << exponent


class Histogram(msgspec.Struct):
    """Counts by bucket; whoever fills it keeps the sum, if that is wanted."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * BUCKETS)

    def add(self, us: int) -> None:
        """Count one."""
        self.counts[bucket(us)] += 1

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    def percentile(self, share: float) -> int:
        """The time in microseconds that this share (0 to 1) of all did not exceed, rounded up to its bucket; 0 for none."""
        return percentile([self], share)

    def cumulative(self) -> Iterator[tuple[int, int]]:
        """(bound in microseconds, how many were below it) at each doubling from 64 us on."""
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            bound = bound_us(index)
            if bound >= 64 and bound & (bound - 1) == 0:
                yield bound, seen


def percentile(histograms: Iterable[Histogram], share: float) -> int:
    """The same over several histograms together."""
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in histograms), strict=True)]
    wanted = share * sum(counts)
    seen = 0
    for index, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            return bound_us(index) - 1
    return 0


class RecentTimes(msgspec.Struct):
    """The times of the last one to two windows: `turn` begins a new one, what is older than the one before is forgotten."""

    current: Histogram = msgspec.field(default_factory=Histogram)
    before: Histogram = msgspec.field(default_factory=Histogram)

    def add(self, us: int) -> None:
        """Count one."""
        self.current.add(us)

    def turn(self) -> None:
        """A window is over."""
        self.before, self.current = self.current, Histogram()

    def percentile(self, share: float) -> int:
        """See `Histogram.percentile`."""
        return percentile((self.before, self.current), share)
