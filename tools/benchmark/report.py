"""What a run found, for people (tables, Markdown) and for programs (JSON). Medians over rounds; it measures nothing."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tools.benchmark.cells import Cell
from tools.benchmark.rounds import NOISE_CORES
from tools.benchmark.targets import Target, targets

COLUMNS = (
    ("items/s", "items_s", "{:,.0f}"),
    ("p50 ms", "p50_ms", "{:.3f}"),
    ("p90", "p90_ms", "{:.2f}"),
    ("p99", "p99_ms", "{:.2f}"),
    ("p99.9", "p999_ms", "{:.2f}"),
    ("CPU s/1000", "cpu_s_per_1000", "{:.3f}"),
    ("of raw best", "share_of_raw_best", "{:.0%}"),
    ("of raw b1", "share_of_raw_batch_1", "{:.0%}"),
    ("of echo", "share_of_echo", "{:.0%}"),
    ("echo p50", "echo_p50_ms", "{:.3f}"),
    ("over limit ms", "over_limit_ms", "{:+.3f}"),
    ("others", "others_cores", "{:.2f}"),
)
SERVER_COLUMNS = (
    ("start to ready, s", "ready_s", "{:.2f}"),
    ("RSS MB", "rss_mb", "{:.0f}"),
    ("PSS MB", "pss_mb", "{:.0f}"),
    ("cores when idle", "idle_cores", "{:.3f}"),
)


class Page(NamedTuple):
    """A table: title, head, rows."""

    title: str
    head: list[str]
    rows: list[list[str]]


class Verdict(NamedTuple):
    """A target, what was found, and aim, floor, missed or not measured."""

    target: Target
    value: float
    word: str


def judge(cells: Sequence[Cell], report: dict[str, Any]) -> list[Verdict]:
    """Each target."""
    by_name = {cell.name: cell for cell in cells}
    values = [(target, target.value(by_name, report)) for target in targets()]
    return [Verdict(target, value, target.verdict(value)) for target, value in values]


def pages(cells: Sequence[Cell], report: dict[str, Any]) -> list[Page]:
    """All tables: cells, servers, limits, targets."""
    return [
        Page(
            f"Cells (medians over rounds; † others used more than {NOISE_CORES:g} core)",
            ["cell", *(title for title, _, _ in COLUMNS)],
            [[_marked(cell), *(_show(form, cell.median(key)) for _, key, form in COLUMNS)] for cell in cells],
        ),
        Page(
            "Appliance: front, template and worker together",
            ["model", *(title for title, _, _ in SERVER_COLUMNS)],
            [
                [name, *(_show(form, statistics.median(one[key] for one in found)) for _, key, form in SERVER_COLUMNS)]
                for name, found in report["server"].items()
            ],
        ),
        Page(
            "Limits: the engine alone in a process",
            ["model", "batch 1 items/s", "p50 ms", "best items/s", "best at"],
            [_limits(name, found, cells) for name, found in report["raw"].items()],
        ),
        Page(
            "Targets",
            ["target", "found", "at least", "aim", "verdict"],
            [
                [target.name, target.show(value), target.show(target.floor), target.show(target.aim), word]
                for target, value, word in judge(cells, report)
                if word != "not measured"
            ],
        ),
    ]


def _marked(cell: Cell) -> str:
    return cell.name + ("†" if cell.median("others_cores") > NOISE_CORES else "")


def _show(form: str, value: float) -> str:
    return "–" if math.isnan(value) else form.format(value)


def _limits(name: str, found: list[dict[str, Any]], cells: Sequence[Cell]) -> list[str]:
    """Medians of all that was measured beside the model's cells; the batch of most rounds."""

    def median(key: str) -> float:
        values = [one[key] for cell in cells if cell.model == name for one in cell.rounds if key in one]
        return statistics.median(values) if values else math.nan

    threads, batch = statistics.mode((one["threads_best"], one["batch_best"]) for one in found)
    return [
        name,
        _show("{:,.0f}", median("raw_items_s")),
        _show("{:.3f}", median("raw_p50_ms")),
        _show("{:,.0f}", median("raw_best_items_s")),
        f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}",
    ]


def print_tables(found: Sequence[Page], console: Console) -> None:
    """For a person at a terminal."""
    for page in found:
        table = Table(*page.head, title=page.title, title_justify="left")
        for row in page.rows:
            table.add_row(*row)
        console.print(table)


def markdown(found: Sequence[Page]) -> str:
    """For a document."""
    parts = []
    for page in found:
        lines = [page.head, ["---"] * len(page.head), *page.rows]
        parts.append(f"**{page.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def document(cells: Sequence[Cell], report: dict[str, Any], command: str) -> dict[str, Any]:
    """Everything, for programs; what was not measured is null."""
    return {
        "command": command,
        "machine": machine(),
        "cells": [
            {
                "name": cell.name,
                "median": {key: _number(cell.median(key)) for _, key, _ in COLUMNS},
                "rounds": cell.rounds,
            }
            for cell in cells
        ],
        "server": report["server"],
        "raw": report["raw"],
        "targets": [
            {
                "target": target.name,
                "found": _number(value),
                "floor": target.floor,
                "aim": target.aim,
                "verdict": word,
            }
            for target, value, word in judge(cells, report)
        ],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def machine() -> dict[str, Any]:
    """What it was measured on."""
    processor = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
