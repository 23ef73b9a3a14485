"""The picture of `thermal_sim`: temperature, clock, p99 by priority and goodput over time, two runs over one another, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thermal_sim import Moment, Run

WIDTH, LEFT, RIGHT, TOP, PANEL, GAP = 960, 64, 20, 84, 128, 44
COLOURS = ("#c2410c", "#1d4ed8")
LEVELS = ((1, "WARM", "#fef3c7"), (2, "HOT", "#fed7aa"), (3, "CRITICAL", "#fca5a5"))

STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#334155}.title{font-weight:600}.number{text-anchor:end;fill:#64748b}"
    ".note{text-anchor:end;paint-order:stroke;stroke:#fff;stroke-width:5px}.middle{text-anchor:middle;fill:#64748b}.grid{stroke:#e2e8f0}"
    ".limit{stroke:#64748b;stroke-dasharray:5 4}.head{font-size:16px;font-weight:600}</style>"
)


class Panel:
    """One panel: its place, its scale, its lines."""

    def __init__(self, index: int, title: str, low: float, high: float, seconds: float, unit: str) -> None:
        self.top = TOP + index * (PANEL + GAP)
        self.low, self.high, self.seconds = low, high, seconds
        self.parts = [f'<text x="{LEFT}" y="{self.top - 8}" class="title">{title}</text>']
        for step in range(5):
            value = low + (high - low) * step / 4
            y = self.y(value)
            self.parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            self.parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="number">{value:.4g}{unit}</text>')

    def x(self, time_s: float) -> float:
        """Where that time is."""
        return LEFT + (WIDTH - LEFT - RIGHT) * time_s / self.seconds

    def y(self, value: float) -> float:
        """Where that value is; beyond the scale, its edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.top + PANEL * (1 - share)

    def line(self, moments: Sequence[Moment], value: Callable[[Moment], float], style: str) -> None:
        """A line, interrupted where there is nothing to show."""
        path, pen = [], "M"
        for moment in moments:
            shown = value(moment)
            if math.isnan(shown):
                pen = "M"
                continue
            path.append(f"{pen}{self.x(moment.time_s):.1f} {self.y(shown):.1f}")
            pen = "L"
        self.parts.append(f'<path d="{"".join(path)}" fill="none" {style}/>')

    def limit(self, value: float, text: str) -> None:
        """A dashed line with its name."""
        y = self.y(value)
        self.parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="limit"/>')
        self.parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{y - 4:.1f}" class="note">{text}</text>')

    def bands(self, moments: Sequence[Moment]) -> None:
        """The governor's level behind the lines."""
        width = self.x(moments[1].time_s) - self.x(moments[0].time_s)
        found = []
        for moment in moments:
            for level, _, colour in LEVELS:
                if moment.level == level:
                    found.append(
                        f'<rect x="{self.x(moment.time_s):.1f}" y="{self.top}" width="{width + 0.3:.1f}" '
                        f'height="{PANEL}" fill="{colour}"/>'
                    )
        self.parts[0:0] = found


def draw(runs: Sequence[Run], slowdown_c: float, cool_p99_ms: float) -> str:
    """An SVG of two runs, the first without and the second with the governor."""
    seconds = max(run.moments[-1].time_s for run in runs)
    every = [moment for run in runs for moment in run.moments]
    coolest = 10 * math.floor(min(moment.temperature_c for moment in every) / 10)
    slowest = max((ms for moment in every for ms in moment.p99_ms.values() if not math.isnan(ms)), default=1.0)
    most = max(moment.goodput for moment in every)
    panels = [
        Panel(0, "temperature, and the governor's level", coolest, 100, seconds, " °C"),
        Panel(1, "clock", 0, 100, seconds, " %"),
        Panel(2, "p99 of high priority", 0, 200 * math.ceil(slowest / 200), seconds, " ms"),
        Panel(3, "p99 of low priority (no line: refused)", 0, 200 * math.ceil(slowest / 200), seconds, " ms"),
        Panel(4, "answers in time, a second", 0, 8 * math.ceil(most / 8), seconds, ""),
    ]
    panels[0].bands(runs[-1].moments)
    values: tuple[Callable[[Moment], float], ...] = (
        lambda moment: moment.temperature_c,
        lambda moment: 100 * moment.clock,
        lambda moment: moment.p99_ms["high"],
        lambda moment: moment.p99_ms["low"],
        lambda moment: moment.goodput,
    )
    for panel, value in zip(panels, values, strict=True):
        for run, colour in zip(runs, COLOURS, strict=True):
            panel.line(run.moments, value, f'stroke="{colour}" stroke-width="1.6"')
    panels[0].limit(slowdown_c, f"slowdown, {slowdown_c:g} °C")
    panels[2].limit(1.5 * cool_p99_ms, "1.5 × of cool")
    height = TOP + len(panels) * (PANEL + GAP)
    return "\n".join(
        [
            *_head(height, runs),
            *(part for panel in panels for part in panel.parts),
            *_times(seconds, height),
            "</svg>\n",
        ]
    )


def _head(height: int, runs: Sequence[Run]) -> list[str]:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        STYLE,
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="26" class="head">A GPU in a hot cabinet, simulated</text>',
    ]
    x = float(LEFT)
    for run, colour in zip(runs, COLOURS, strict=True):
        text = f"{run.name}: p99 {run.p99_ms['high']:.0f} ms, throttled {run.throttled_share:.0%} of the time"
        parts.append(f'<line x1="{x}" x2="{x + 22}" y1="46" y2="46" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 28}" y="50">{text}</text>')
        x += 380
    x = WIDTH - RIGHT - 230.0
    for _, name, colour in LEVELS:
        parts.append(f'<rect x="{x}" y="15" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 19}" y="27">{name}</text>')
        x += 74
    return parts


def _times(seconds: float, height: int) -> list[str]:
    found = []
    for step in range(7):
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / 6
        found.append(f'<text x="{x:.0f}" y="{height - 22}" class="middle">{seconds / 60 * step / 6:.0f} min</text>')
    return found
