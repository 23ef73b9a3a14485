"""`top`: what the box is doing, live in a terminal: a line of health, GPUs and host, models, and what happened last.

Draws the status document that everybody can have; decides nothing. With --json, one document a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.cli.connection import Appliance
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit

if TYPE_CHECKING:
    from rich.console import RenderableType

BLOCKS = "▁▂▃▄▅▆▇█"
KEPT = 40
LEVEL_STYLES = {"NOMINAL": "green", "WARM": "yellow", "HOT": "red", "CRITICAL": "bold white on red"}
STATE_STYLES = {"READY": "green", "FAILED": "bold red"}
GPU_READINGS: tuple[tuple[str, str, float], ...] = (
    ("TEMP °C", "temperature", 1),
    ("POWER W", "power", 1),
    ("CLOCK MHz", "clock.graphics", 1),
    ("GPU %", "utilization", 1),
    ("MEM GB", "memory.used", 1e-9),
    ("FAN %", "fan.", 1),
)
"""Title, name after the GPU's number, scale; a name that ends in a dot is the highest of all that begin so."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("top")(top)


@command
def top(
    interval: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Stop after so many looks; 0: go on until Ctrl-C.")] = 0,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Models, GPUs and host, live. Ctrl-C ends it."""
    appliance = Appliance(url)
    if as_json or not sys.stdout.isatty():
        for look in _looks(count, interval):
            del look
            document = appliance.get("/v2/appliance/status")
            typer.echo(json.dumps(document, ensure_ascii=False) if as_json else document["status"]["line"])
        return
    _live(appliance, count, interval)


def _looks(count: int, interval_s: float) -> Any:
    number = 0
    while True:
        yield number
        number += 1
        if count and number >= count:
            return
        time.sleep(interval_s)


def _live(appliance: Appliance, count: int, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    screen = Screen()
    with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        for _ in _looks(count, interval_s):
            try:
                screen.take(appliance.get("/v2/appliance/status"), time.monotonic())
            except CommandError as error:
                if error.code not in (Exit.UNREACHABLE, Exit.TIMEOUT):
                    raise
                screen.lost(error.message)
            live.update(screen.draw(), refresh=True)


class Screen:
    """What is drawn: the last status, and what the ones before it add (rates, short trails)."""

    def __init__(self) -> None:
        self._status: dict[str, Any] | None = None
        self._problem = ""
        self._before: dict[str, tuple[float, int]] = {}
        self._rates: dict[str, float] = {}
        self._trails: dict[str, deque[float]] = {}

    def take(self, status: dict[str, Any], now: float) -> None:
        """A new status document, at that monotonic time."""
        self._status, self._problem = status, ""
        for model in status["models"]:
            key, answered = f"{model['name']}:{model['version']}", model["success"] + model["fail"]
            if (before := self._before.get(key)) is not None and now > before[0]:
                self._rates[key] = max(0.0, (answered - before[1]) / (now - before[0]))
            self._before[key] = (now, answered)
            self._trail(key, self._rates.get(key, 0.0))
        for name, value in (status.get("readings") or {}).items():
            if value is not None:
                self._trail(name, value)

    def lost(self, problem: str) -> None:
        """Nobody answers; what was seen last stays, marked as such."""
        self._problem = problem

    def _trail(self, name: str, value: float) -> None:
        self._trails.setdefault(name, deque(maxlen=KEPT)).append(value)

    def draw(self) -> RenderableType:
        """Everything, one part below the other."""
        from rich.console import Group
        from rich.text import Text

        if self._status is None:
            return Text(self._problem or "…", "bold red" if self._problem else "")
        parts: list[RenderableType] = [self._head(self._status)]
        if gpus := self._status.get("gpus"):
            parts += [Text(), self._gpus(gpus, self._status["readings"])]
        if host := self._host(self._status):
            parts += [Text(), Text(host)]
        parts += [Text(), self._models(self._status["models"])]
        parts += [Text(f"! {finding['text']}", "yellow") for finding in self._status.get("findings") or ()]
        return Group(*parts)

    def _head(self, status: dict[str, Any]) -> RenderableType:
        from rich.text import Text

        line = Text.assemble(("appliance ", "bold"), status["status"]["version"], "  ", status["status"]["line"])
        if governor := status.get("governor"):
            line.append(f"  {governor['level']}", LEVEL_STYLES.get(governor["level"], ""))
            if governor["reason"]:
                line.append(f" {governor['reason']}")
        if self._problem:
            line.append(f"  no answer: {self._problem}", "bold red")
        return line

    def _gpus(self, gpus: list[dict[str, Any]], readings: dict[str, float | None]) -> RenderableType:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("GPU")
        for title, _, _ in GPU_READINGS:
            table.add_column(title, justify="right")
        table.add_column("TEMPERATURE")
        for gpu in gpus:
            base = f"gpu.{gpu['index']}."
            values = [_value(_reading(readings, base + name), scale) for _, name, scale in GPU_READINGS]
            trouble = "" if gpu["state"] == "OK" else f" {gpu['state']}: {gpu['action']}"
            kind = " (host's memory)" if gpu.get("integrated") else ""
            if gpu.get("mig_mode"):
                kind = f" (MIG: {len(gpu['mig'])} instances)"
            name = Text(f"{gpu['index']} {gpu['name']}{kind}{trouble}", "red" if trouble else "")
            table.add_row(name, *values, sparkline(self._trails.get(base + "temperature", ())))
        return table

    def _host(self, status: dict[str, Any]) -> str:
        readings = status.get("readings") or {}
        known = (
            ("CPU", readings.get("host.cpu.load"), 1, "%"),
            ("", status.get("processor_temperature"), 1, "°C"),
            ("memory available", readings.get("host.memory.available"), 1e-9, "GB"),
            ("front", readings.get("process.front.rss"), 1e-6, "MB"),
        )
        found = []
        for title, value, scale, unit in known:
            if value is not None:
                found.append(f"{title} {value * scale:.3g} {unit}".strip())
        return "   ".join(found)

    def _models(self, models: list[dict[str, Any]]) -> RenderableType:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("MODEL", "VERSION", "STATE", "ENGINE"):
            table.add_column(title)
        for title in ("REQ/S", "P50 ms", "P95 ms", "P99 ms", "WAITING", "FAILED"):
            table.add_column(title, justify="right")
        table.add_column("REQUESTS")
        for model in models:
            key = f"{model['name']}:{model['version']}"
            table.add_row(
                model["name"],
                model["version"],
                Text(f"{model['detail']} {model['reason']}".strip(), STATE_STYLES.get(model["detail"], "yellow")),
                model["engine"] or model["provider"],
                f"{self._rates.get(key, 0):.0f}",
                *(f"{model[name] / 1000:.2f}" if model[name] else "–" for name in ("p50_us", "p95_us", "p99_us")),
                str(model["pending"]),
                str(model["fail"]),
                sparkline(self._trails.get(key, ())),
            )
        return table


def _reading(readings: dict[str, float | None], name: str) -> float | None:
    if not name.endswith("."):
        return readings.get(name)
    return max((value for key, value in readings.items() if key.startswith(name) and value is not None), default=None)


def _value(value: float | None, scale: float) -> str:
    return "–" if value is None else f"{value * scale:.4g}"


def sparkline(values: Any) -> str:
    """Values as blocks, from the lowest of them to the highest."""
    shown = list(values)
    if not shown:
        return ""
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((value - low) / span * len(BLOCKS)))] for value in shown)
