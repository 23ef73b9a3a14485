"""Metric families and the text that Prometheus reads: names, types, escapes and numbers, and nothing about what is measured.

A `Family` is declared once, at import, by the module that fills it; a `Sheet` takes the samples of one scrape and renders them.
The format is Prometheus' text format 0.0.4. The renderer is our own since a scrape runs on the loop that answers requests, and
since Triton's names break the usual library's rules and would have to be mended afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Literal

import msgspec

Kind = Literal["gauge", "counter", "histogram"]


class Family(msgspec.Struct, frozen=True):
    """One metric: its name, type, what it says, and the names of its labels in the order in which values are given."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


class Sheet:
    """The samples of one scrape. A family without samples is left out; of two samples with the same labels the later stands."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[Family, dict[str, str]]] = {}

    def add(self, family: Family, value: float | None, *labels: str) -> None:
        """One sample. None, and what is no finite number, is not known: then there is no series, never a 0."""
        if value is None or not math.isfinite(value):
            return
        self._samples(family)[family.name + _labels(family.labels, labels)] = plain(value)

    def histogram(self, family: Family, buckets: Iterable[tuple[str, int]], total: float, *labels: str) -> None:
        """One histogram: cumulative counts by upper bound, the last one "+Inf", and the sum of what was observed."""
        samples = self._samples(family)
        count = 0
        for bound, count in buckets:
            samples[f"{family.name}_bucket" + _labels((*family.labels, "le"), (*labels, bound))] = str(count)
        own = _labels(family.labels, labels)
        samples[f"{family.name}_sum{own}"] = plain(total)
        samples[f"{family.name}_count{own}"] = str(count)

    def _samples(self, family: Family) -> dict[str, str]:
        return self._families.setdefault(family.name, (family, {}))[1]

    def render(self) -> bytes:
        """The text, ended by a newline; families in the order in which they came."""
        lines: list[str] = []
        for family, samples in self._families.values():
            text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
            lines += (f"# HELP {family.name} {text}", f"# TYPE {family.name} {family.kind}")
            lines += [f"{series} {value}" for series, value in samples.items()]
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def plain(value: float) -> str:
    """The number without an exponent: perf_analyzer reads digits and a point, and takes 8e+09 for 8."""
    text = str(int(value)) if isinstance(value, int) else repr(value)
    if "e" in text:
        text = format(Decimal(text), "f")
    return text.removesuffix(".0")
