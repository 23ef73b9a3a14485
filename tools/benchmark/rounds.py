"""The rounds of a run. In each, every cell is measured right beside its limits, so that the machine's noise hits all alike.

A cell's ratios are made from what was measured in the same few seconds; medians over rounds come later.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from appliance.cli.load import generate
from tools.benchmark.cells import SUBJECTS, Cell, plan, truth, verify
from tools.benchmark.networks import write_model
from tools.benchmark.server import ROOT, Appliance, Echo, Noise, Raw

Truth = list[np.ndarray[Any, Any]]
Progress = Callable[[str], None]

PERCENTILES = (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99), ("p999_ms", 0.999))
IDLE_S = 1.0

NOISE_CORES = 0.35
"""A cell during which other processes used more than this is tried again, and marked in the end: its numbers are theirs too."""


class Settings(msgspec.Struct, frozen=True):
    """How often, and how long in seconds: a cell, each point of the engine's sweep, the engine beside each cell."""

    rounds: int
    tries: int
    cell_s: float
    sweep_s: float
    beside_s: float


def measure_all(cells: list[Cell], settings: Settings, progress: Progress) -> dict[str, Any]:
    """Fill the cells' rounds. What is not of a cell, by model and round: `raw` (the engine alone) and `server`."""
    names = list(dict.fromkeys(cell.model for cell in cells))
    report: dict[str, Any] = {"raw": {name: [] for name in names}, "server": {name: [] for name in names}}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        repositories = {name: Path(folder) / name for name in names}
        expected: dict[str, Truth] = {}
        for name, repository in repositories.items():
            repository.mkdir()
            model_file = write_model(repository, name, ROOT / "models" / "digits") / "1" / "model.onnx"
            expected[name] = truth(name, model_file)
        for number in range(1, settings.rounds + 1):
            for name, repository in repositories.items():
                chosen = [cell for cell in cells if cell.model == name]
                progress(f"round {number}/{settings.rounds} {name}: {len(chosen)} cells")
                raw, server = _measure_model(name, repository, chosen, settings, expected[name])
                report["raw"][name].append(raw)
                report["server"][name].append(server)
    return report


def _measure_model(
    name: str, repository: Path, cells: list[Cell], settings: Settings, expected: Truth
) -> tuple[dict[str, Any], dict[str, float]]:
    """One round of one model: its limits and its server's own numbers; the cells get theirs."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(Raw(repository / name / "1" / "model.onnx"))
        points = raw.sweep(settings.sweep_s)
        server = stack.enter_context(Appliance(repository))
        idle_cores = _idle_cores(server)
        echoes = {
            transport: stack.enter_context(Echo(transport, 4 * SUBJECTS[name].answers))
            for transport in dict.fromkeys(cell.transport for cell in cells if _has_echo(cell))
        }
        bench = Bench(settings, server, raw, points, echoes, expected)
        for cell in cells:
            cell.rounds.append(bench.quietest(cell))
        rss, pss = server.memory_bytes()
    limits = {"threads_batch_1": points[0][0], "threads_best": points[1][0], "batch_best": points[1][1]}
    return limits, {"ready_s": server.ready_s, "rss_mb": rss / 1e6, "pss_mb": pss / 1e6, "idle_cores": idle_cores}


def _has_echo(cell: Cell) -> bool:
    return not cell.rate_per_s and cell.transport != "http-json"


def _idle_cores(server: Appliance) -> float:
    """What the appliance uses when nobody asks."""
    begun, used = time.perf_counter(), server.cpu_s()
    time.sleep(IDLE_S)
    return (server.cpu_s() - used) / (time.perf_counter() - begun)


class Bench:
    """One model's processes, all running; those that are not measured sleep."""

    def __init__(
        self,
        settings: Settings,
        server: Appliance,
        raw: Raw,
        points: tuple[tuple[int, int], tuple[int, int]],
        echoes: Mapping[str, Echo],
        expected: Truth,
    ) -> None:
        self._settings = settings
        self._server = server
        self._raw = raw
        self._points = points
        self._echoes = echoes
        self._expected = expected
        self._pids = [server.pid, raw.pid, *(echo.pid for echo in echoes.values())]

    def quietest(self, cell: Cell) -> dict[str, float]:
        """The first try that others did not disturb, or the one that they disturbed least."""
        tries: list[dict[str, float]] = []
        while len(tries) < self._settings.tries and not any(one["others_cores"] <= NOISE_CORES for one in tries):
            tries.append(self._measure(cell))
        return min(tries, key=lambda one: one["others_cores"]) | {"tries": len(tries)}

    def _measure(self, cell: Cell) -> dict[str, float]:
        """The cell and its limits, one right after the other; `others_cores` is the worst of them."""
        parts: list[Callable[[Cell], dict[str, float]]] = [self._appliance]
        if not cell.rate_per_s:
            parts.append(self._engine)
        if _has_echo(cell):
            parts.append(self._echo)
        found: dict[str, float] = {}
        others = []
        for part in parts:
            noise = Noise(self._pids)
            found |= part(cell)
            others.append(noise.cores())
        return found | ratios(found) | {"others_cores": max(others)}

    def _appliance(self, cell: Cell) -> dict[str, float]:
        server = self._server
        address = {"zmq-ipc": server.ipc, "zmq-tcp": server.tcp}.get(cell.transport, server.http)
        used = server.cpu_s()
        result = generate(plan(cell, address, self._settings.cell_s))
        used = server.cpu_s() - used
        verify(result, cell, self._expected)
        return {
            "items_s": result.per_second,
            **{key: result.latency_ms(share) for key, share in PERCENTILES},
            "cpu_s_per_1000": used / result.answered * 1000,
        }

    def _engine(self, _: Cell) -> dict[str, float]:
        alone, best = self._raw.measure(self._points, self._settings.beside_s)
        return {
            "raw_items_s": alone["items_s"],
            "raw_p50_ms": alone["p50_s"] * 1e3,
            "raw_best_items_s": max(best["items_s"], alone["items_s"]),
        }

    def _echo(self, cell: Cell) -> dict[str, float]:
        address = self._echoes[cell.transport].address
        result = generate(plan(cell, address, max(0.5, self._settings.cell_s / 2), echo=True))
        verify(result, cell, None)
        return {"echo_items_s": result.per_second, "echo_p50_ms": result.latency_ms(0.5)}


def ratios(found: dict[str, float]) -> dict[str, float]:
    """A cell's numbers beside the limits that were measured with it; none for a limit that was not."""
    made = {}
    if "raw_items_s" in found:
        made["share_of_raw_best"] = found["items_s"] / found["raw_best_items_s"]
        made["share_of_raw_batch_1"] = found["items_s"] / found["raw_items_s"]
    if "echo_items_s" in found:
        made["share_of_echo"] = found["items_s"] / found["echo_items_s"]
    if "raw_items_s" in found and "echo_items_s" in found:
        # how far the median is above 1.2 times the echo's plus the engine's, in ms: at most 0.05 is wanted
        made["over_limit_ms"] = found["p50_ms"] - 1.2 * found["echo_p50_ms"] - found["raw_p50_ms"]
    return {key: value for key, value in made.items() if math.isfinite(value)}
