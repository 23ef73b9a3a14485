"""What we hold ourselves to, on two cores, as ratios within one run: floors, and what we aim at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec


class Measured(Protocol):
    """A cell with its rounds."""

    def median(self, key: str) -> float:
        """Over the rounds; NaN if nothing was measured."""


class Target(msgspec.Struct, frozen=True):
    """One line of the table: a value found in cells and report, at least (or at most) a floor, better an aim."""

    name: str
    floor: float
    aim: float
    find: Callable[[Mapping[str, Measured], dict[str, Any]], float]
    form: str = "{:.0%}"
    at_most: bool = False

    def value(self, cells: Mapping[str, Measured], report: dict[str, Any]) -> float:
        """What was found; NaN if its cell was not measured."""
        try:
            return self.find(cells, report)
        except KeyError:
            return math.nan

    def verdict(self, value: float) -> str:
        """aim, floor, missed, or not measured."""
        if math.isnan(value):
            return "not measured"
        if value <= self.aim if self.at_most else value >= self.aim:
            return "aim"
        return "floor" if (value <= self.floor if self.at_most else value >= self.floor) else "missed"

    def show(self, value: float) -> str:
        """The value as a person reads it."""
        return self.form.format(value)


def _cell(name: str, key: str) -> Callable[[Mapping[str, Measured], dict[str, Any]], float]:
    return lambda cells, report: cells[name].median(key)


def _server(key: str) -> Callable[[Mapping[str, Measured], dict[str, Any]], float]:
    return lambda cells, report: statistics.median(found[key] for found in report["server"]["digits"])


def targets() -> list[Target]:
    """All of them."""
    share, batch_1, echo, over = "share_of_raw_best", "share_of_raw_batch_1", "share_of_echo", "over_limit_ms"
    made = [
        Target(
            f"digits {transport} 1: p50 − 1.2 × echo − raw, ms",
            0.05,
            0.0,
            _cell(f"digits:{transport}:1", over),
            "{:+.3f}",
            True,
        )
        for transport in ("zmq-ipc", "http-binary")
    ]
    shares = (
        ("digits:zmq-ipc:16", share, 0.22, 0.30),
        ("digits:zmq-ipc:64", share, 0.30, 0.40),
        ("digits:http-binary:16", share, 0.18, 0.26),
        ("digits:http-binary:64", share, 0.22, 0.28),
        ("identity:zmq-ipc:16", echo, 0.50, 0.50),
        ("identity:zmq-ipc:64", echo, 0.50, 0.50),
        ("identity:http-binary:16", echo, 0.50, 0.50),
        ("identity:http-binary:64", echo, 0.50, 0.50),
        ("detector:zmq-ipc:4", batch_1, 0.45, 0.55),
        ("detector:zmq-ipc:16", batch_1, 0.45, 0.55),
        ("detector:http-binary:4", batch_1, 0.30, 0.40),
        ("detector:http-binary:16", batch_1, 0.30, 0.40),
        ("resnet18:zmq-ipc:4", share, 0.88, 0.95),
        ("resnet18:zmq-ipc:16", share, 0.88, 0.95),
        ("resnet18:http-binary:4", share, 0.88, 0.95),
        ("resnet18:http-binary:16", share, 0.88, 0.95),
    )
    words = {share: "of raw best", batch_1: "of raw batch 1", echo: "of the echo"}
    made += [Target(f"{cell} {words[key]}", floor, aim, _cell(cell, key)) for cell, key, floor, aim in shares]
    made += [
        Target(
            f"digits {transport} 16: CPU s per 1,000",
            0.20,
            0.12,
            _cell(f"digits:{transport}:16", "cpu_s_per_1000"),
            "{:.3f}",
            True,
        )
        for transport in ("zmq-ipc", "http-binary")
    ]
    made += [
        Target("digits: PSS of all processes, MB", 150, 150, _server("pss_mb"), "{:.0f}", True),
        Target("digits: start to ready, s", 1.5, 1.5, _server("ready_s"), "{:.2f}", True),
    ]
    return made
