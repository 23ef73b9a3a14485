"""What a tuning found, as a page and a picture of latency against throughput: no script, nothing fetched, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 760, 420, 64, 24, 20, 46
STYLE = """
svg { color: #1f2328; background: #fff; --grid: #8883; --other: #8a9099; --now: #2f6fb7; --best: #1a7f37; --limit: #c62828;
  font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { color: #e6edf3; background: #0d1117; --other: #767e88; --now: #6ea8e5;
  --best: #4cc36b; --limit: #ff7b72; } }
svg text { fill: currentColor; }
.other { --ink: var(--other); } .now { --ink: var(--now); } .best { --ink: var(--best); }
circle { fill: var(--ink); } polyline { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.other polyline { stroke-opacity: .35; stroke-width: 1; }
.grid { stroke: var(--grid); } .limit { stroke: var(--limit); stroke-dasharray: 6 4; } .quiet { opacity: .7; }
"""
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 500; opacity: .75; } .wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; } .chosen td { font-weight: 600; }
"""


class Scale:
    """A logarithmic axis from `low` to `high` onto pixels."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        self.low, self.high = min(values) / 1.25, max(values) * 1.25
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each decade that lies within."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [
            step * 10.0**decade
            for decade in decades
            for step in (1, 2, 5)
            if self.low <= step * 10.0**decade <= self.high
        ]


def picture(document: Mapping[str, Any]) -> str:
    """Tail latency against throughput, a line for each setting through its loads; as SVG. Both axes are logarithmic."""
    rows = [row for row in document["rows"] if row["points"]]
    points = [point for row in rows for point in row["points"]]
    limit = document["limit_ms"]
    across = Scale([point["items_s"] for point in points], LEFT, WIDTH - RIGHT)
    up = Scale([point["tail_ms"] for point in points] + [limit] * (limit > 0), HEIGHT - FOOT, TOP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
            f"<title>{escape(document['model'])}: latency against throughput</title><style>{STYLE}</style>"
        )
    ]
    for value in across.ticks():
        x = across(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - FOOT}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - FOOT + 16}" text-anchor="middle">{value:,g}</text>')
    for value in up.ticks():
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(
        f'<text class="quiet" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">answers per second →</text>'
    )
    parts.append(
        f'<text class="quiet" x="{LEFT + 6}" y="{TOP + 12}">p{document["percentile"]:g} latency, ms (lower is better)</text>'
    )
    if limit:
        parts.append(
            f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(limit):.1f}" y2="{up(limit):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT + 6}" y="{up(limit) - 5:.1f}">limit {limit:g} ms</text>')
    ranked = sorted(rows, key=_rank)
    parts += [_line(row, across, up) for row in ranked]
    parts += _legend(ranked)
    return "\n".join([*parts, "</svg>\n"])


def _rank(row: Mapping[str, Any]) -> int:
    """0: one of many, 1: the present settings, 2: chosen. Drawn in this order."""
    if not row["changes"]:
        return 1
    return 2 if row["chosen"] else 0


def _line(row: Mapping[str, Any], across: Scale, up: Scale) -> str:
    places = [(across(point["items_s"]), up(point["tail_ms"]), point) for point in row["points"]]
    kind = ("other", "now", "best")[_rank(row)]
    radius = 3 if kind == "other" else 5
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(row["name"])}, {point["concurrency"]} in flight: '
        f"{point['items_s']:,.0f}/s, {point['tail_ms']:.3g} ms</title></circle>"
        for x, y, point in places
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    return f'<g class="{kind}"><polyline points="{path}"/>{dots}</g>'


def _legend(rows: list[Mapping[str, Any]]) -> list[str]:
    """At the upper right, where hardly anything lies: settings that answer much answer soon."""
    named = [(("other", "now", "best")[_rank(row)], row["name"]) for row in rows if _rank(row)]
    entries = [*named, ("other", "other settings")]
    parts = []
    for index, (kind, name) in enumerate(entries):
        y = 40 + 18 * index
        words = {"now": f"{name} (present)", "best": f"{name} (chosen)"}.get(kind, name)
        x = WIDTH - RIGHT - 10
        parts.append(f'<g class="{kind}"><circle cx="{x}" cy="{y - 4}" r="5"/></g>')
        parts.append(f'<text x="{x - 10}" y="{y}" text-anchor="end">{escape(words)}</text>')
    return parts


def page(document: Mapping[str, Any]) -> str:
    """Picture and table as HTML."""
    from appliance.cli.tune import table_row

    title = f"{document['model']} version {document['version']}: tuned for {document['goal']}"
    loads = " / ".join(map(str, document["loads"]))
    tail = f"p{document['percentile']:g} ms"
    head = ("Settings", f"answers/s at {loads}", "p50 ms", tail, "ratio", "at least", "rounds", "verified", "")
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in document["rows"]:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in table_row(row))
        lines.append(f'<tr class="{"chosen" if row["chosen"] else ""}">{cells}</tr>')
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{PAGE_STYLE}</style></head><body>',
            f"<h1>{escape(title)}</h1>",
            (
                f"<p>{escape(document['when'])}, {document['cores']} cores. "
                f"<strong>{escape(str(document['chosen']))}</strong>: {escape(document['reason'])}.</p>"
            ),
            picture(document),
            f'<div class="wide"><table>{"".join(lines)}</table></div>',
            (
                "<p>Ratios are taken within rounds, beside the present settings measured a moment before or after; "
                "“at least” is the lower end of a one-sided 95 % interval.</p>"
            ),
            "</body></html>\n",
        ]
    )
