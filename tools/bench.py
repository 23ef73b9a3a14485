"""Measures the appliance against what cannot be beaten, in one run.

The limits are the engine alone in a process and a bare echo over the same transport with the same client. They are measured in
the same rounds as the cells, since these machines are noisy, and every ratio is a median over rounds. Loopback only.

    python tools/bench.py --quick
    python tools/bench.py --cells digits:zmq-ipc:1,16,64 --rounds 5 --json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from appliance.cli.load import Plan, Result  # noqa: E402
from tools.benchmark.networks import write_repository  # noqa: E402
from tools.benchmark.server import Appliance, Echo, Watch, await_quiet, free_port  # noqa: E402
from tools.benchmark.targets import Target, targets  # noqa: E402

INPUTS: dict[str, tuple[str, str, list[int], int]] = {
    "digits": ("image", "FP32", [1, 28, 28, 1], 40),
    "identity": ("input", "FP32", [1, 256], 1024),
    "detector": ("input", "UINT8", [1, 640, 640, 3], 336),
    "resnet18": ("input", "FP32", [1, 3, 224, 224], 4000),
}
"""Input name, datatype, shape of one row, and bytes of the answer."""

TRANSPORTS = ("zmq-ipc", "zmq-tcp", "http-binary", "http-json")
CONCURRENCIES = {"digits": (1, 4, 16, 64), "identity": (16, 64), "detector": (1, 4, 16), "resnet18": (1, 4, 16)}
NOISE_CORES = 0.35
"""A round in which other processes used more than this is left out; a cell without any other round is marked."""
RAW_SECONDS = 0.15
"""Per batch size and thread count of the raw limit; there are twelve."""


class Cell(msgspec.Struct):
    """One measurement: a model, a transport, so many in flight (or a rate), and what each round found."""

    model: str
    transport: str
    concurrency: int
    rate_per_s: float = 0.0
    rounds: list[dict[str, float]] = msgspec.field(default_factory=list)

    @property
    def name(self) -> str:
        """As `--cells` names it."""
        load = f"{self.rate_per_s:g}/s" if self.rate_per_s else str(self.concurrency)
        return f"{self.model}:{self.transport}:{load}"

    @property
    def noisy(self) -> bool:
        """Whether there was no round without others."""
        return all(found["others_cores"] > NOISE_CORES for found in self.rounds)

    def median(self, key: str) -> float:
        """Over the rounds in which others were quiet, or over all if there was none; NaN if nothing was measured."""
        rounds = [found for found in self.rounds if self.noisy or found["others_cores"] <= NOISE_CORES]
        values = [found[key] for found in rounds if key in found and not math.isnan(found[key])]
        return statistics.median(values) if values else math.nan


def payload(model: str) -> bytes:
    """One row of seeded noise."""
    _, datatype, shape, _ = INPUTS[model]
    source = np.random.default_rng(7)
    if datatype == "UINT8":
        return source.integers(0, 256, shape, dtype=np.uint8).tobytes()
    return source.random(shape, dtype=np.float32).tobytes()


def plan(cell: Cell, address: str, seconds: float) -> Plan:
    """What the load generator sends for a cell."""
    name, datatype, shape, _ = INPUTS[cell.model]
    data = payload(cell.model)
    if cell.transport.startswith("zmq"):
        tensor = {"name": name, "datatype": datatype, "shape": shape, "frame": 0}
        header = json.dumps({"op": "infer", "id": "1", "model": cell.model, "inputs": [tensor]}).encode()
        return Plan(address, cell.concurrency, seconds, rate_per_s=cell.rate_per_s, frames=(b"AIP1", header, data))
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    head = f"POST /v2/models/{cell.model}/infer HTTP/1.1\r\nHost: bench\r\n"
    if cell.transport == "http-json":
        values = np.frombuffer(data, np.uint8 if datatype == "UINT8" else np.float32)
        tensor["data"] = [round(float(value), 4) for value in values]
        body = json.dumps({"inputs": [tensor]}).encode()
    else:
        tensor["parameters"] = {"binary_data_size": len(data)}
        text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        head += f"Inference-Header-Content-Length: {len(text)}\r\n"
        body = text + data
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    return Plan(address, cell.concurrency, seconds, rate_per_s=cell.rate_per_s, request=request)


def generate(what: Plan) -> Result:
    """Run a load generator in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "appliance.cli.load"],
        input=msgspec.msgpack.encode(what),
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
        timeout=what.seconds + what.warm_up_s + 60,
    )
    return msgspec.msgpack.decode(done.stdout, type=Result)


def truth(models: Path, model: str) -> np.ndarray[Any, Any]:
    """What the engine alone answers to the payload."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(models / model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    name, datatype, shape, _ = INPUTS[model]
    data = np.frombuffer(payload(model), np.uint8 if datatype == "UINT8" else np.float32).reshape(shape)
    return session.run(None, {name: data})[0].reshape(-1)  # type: ignore[no-any-return]


def verify(result: Result, expected: np.ndarray[Any, Any], what: Cell) -> None:
    """Every reply was good, and those kept hold the right numbers. An open loop may be refused: that is counted instead."""
    if (result.errors or result.unanswered) and not what.rate_per_s:
        raise RuntimeError(f"{what.name}: {result.errors} errors, {result.unanswered} unanswered: {result.first_error}")
    for kept in result.kept:
        if what.transport == "http-json":
            found = np.array(json.loads(kept)["outputs"][0]["data"], np.float32)
            np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-2)  # its inputs were rounded to four digits
        else:
            found = np.frombuffer(kept[-expected.nbytes :], np.float32)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def percentile(values: list[float], share: float) -> float:
    """Of ascending values, by nearest rank."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else math.nan


def measure(cell: Cell, server: Appliance, seconds: float, expected: np.ndarray[Any, Any]) -> dict[str, float]:
    """One round of one cell against the appliance."""
    address = {"zmq-ipc": server.ipc, "zmq-tcp": server.tcp}.get(cell.transport, server.http)
    what = plan(cell, address, seconds)
    watch, before, begun = Watch(), server.cpu_s(), time.perf_counter()
    result = generate(what)
    cpu, wall = server.cpu_s() - before, time.perf_counter() - begun
    others = watch.others_cores(cpu)
    verify(result, expected, cell)
    return {
        "items_s": result.replies / result.seconds,
        "p50_ms": percentile(result.latencies, 0.5) * 1e3,
        "p90_ms": percentile(result.latencies, 0.9) * 1e3,
        "p99_ms": percentile(result.latencies, 0.99) * 1e3,
        "p999_ms": percentile(result.latencies, 0.999) * 1e3,
        "cpu_s_per_1000": cpu / result.total * 1000 if result.total else math.nan,
        "client_cores": result.client_cpu_s / wall,
        "others_cores": others,
        "failures": result.errors + result.unanswered,
    }


def measure_echo(cell: Cell, seconds: float) -> dict[str, float]:
    """The same message and client against a bare echo."""
    reply, watch = INPUTS[cell.model][3], Watch()
    with tempfile.TemporaryDirectory() as folder:
        if cell.transport.startswith("zmq"):
            address = f"ipc://{folder}/e" if cell.transport == "zmq-ipc" else f"tcp://127.0.0.1:{free_port()}"
            server = Echo("echo-zmq", address, reply)
        else:
            port = free_port()
            address, server = f"http://127.0.0.1:{port}", Echo("echo-http", str(port), reply)
        with server:
            result = generate(plan(cell, address, seconds))
    if result.errors or result.unanswered:
        raise RuntimeError(f"the echo beside {cell.name}: {result.errors} errors, {result.unanswered} unanswered")
    return {
        "echo_items_s": result.replies / result.seconds,
        "echo_p50_ms": percentile(result.latencies, 0.5) * 1e3,
        "echo_others_cores": watch.others_cores(),
    }


def measure_raw(models: Path, model: str) -> dict[str, Any]:
    """The engine alone."""
    watch = Watch()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.benchmark.limits",
            "raw",
            str(models / model / "1" / "model.onnx"),
            str(RAW_SECONDS),
        ],
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout) | {"others_cores": watch.others_cores()}  # type: ignore[no-any-return]


def quiet(raws: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those limits that were measured without others; all, if there are none."""
    return [raw for raw in raws if raw["others_cores"] <= NOISE_CORES] or raws


def machine() -> dict[str, str | int | None]:
    """What a reader has to know to read the numbers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }


def choose(arguments: argparse.Namespace) -> list[Cell]:
    """The cells to measure."""
    if arguments.cells:
        cells = []
        for text in arguments.cells:
            model, transport, loads = text.split(":")
            for load in loads.split(","):
                rate = float(load.removesuffix("/s")) if load.endswith("/s") else 0.0
                cells.append(Cell(model, transport, 64 if rate else int(load), rate))
        return cells
    models = arguments.model or list(INPUTS)
    cells = []
    for model in models:
        for transport in ("zmq-ipc", "http-binary"):
            cells += [Cell(model, transport, concurrency) for concurrency in CONCURRENCIES[model]]
    if "digits" in models and not arguments.quick:
        cells += [Cell("digits", transport, load) for transport in ("zmq-tcp", "http-json") for load in (1, 16)]
        cells += [
            Cell("digits", transport, 64, rate) for transport in ("zmq-ipc", "http-binary") for rate in (500.0, 2000.0)
        ]
    return cells


def run(cells: list[Cell], arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every round: for each model the raw limit, then each cell beside its echo."""
    names = list(dict.fromkeys(cell.model for cell in cells))
    report: dict[str, Any] = {"raw": {name: [] for name in names}, "server": {name: [] for name in names}}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_repository(models, ROOT / "models" / "digits", names)
        expected = {name: truth(models, name) for name in names}
        for number in range(arguments.rounds):
            for name in names:
                if console.is_terminal:
                    console.print(f"[dim]round {number + 1} of {arguments.rounds}: {name}[/dim]")
                chosen = [cell for cell in cells if cell.model == name]
                run_model(name, chosen, models, expected[name], arguments, report)
    return report


def run_model(
    name: str,
    cells: list[Cell],
    models: Path,
    expected: np.ndarray[Any, Any],
    arguments: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    """One round of one model, on an appliance that has only this one; results go into the cells and the report."""
    await_quiet(arguments.patience, NOISE_CORES)
    raw = measure_raw(models, name)
    report["raw"][name].append(raw)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).symlink_to(models / name)
        with Appliance(Path(folder)) as server:
            for cell in cells:
                await_quiet(arguments.patience, NOISE_CORES)
                found = measure(cell, server, arguments.seconds, expected)
                if not cell.rate_per_s:
                    found |= measure_echo(cell, max(0.5, arguments.seconds / 2))
                cell.rounds.append(found | ratios(found, raw))
            rss, pss = server.memory_bytes()
            report["server"][name].append({"ready_s": server.ready_s, "rss_mb": rss / 1e6, "pss_mb": pss / 1e6})


def ratios(found: dict[str, float], raw: dict[str, Any]) -> dict[str, float]:
    """A cell's numbers beside this round's limits; others count in whichever of the three they disturbed most."""
    made = {
        "others_cores": max(found["others_cores"], found.get("echo_others_cores", 0.0), raw["others_cores"]),
        "share_of_raw_best": found["items_s"] / raw["best_items_s"],
        "share_of_raw_batch_1": found["items_s"] / raw["batch_1_items_s"],
    }
    if "echo_items_s" in found:
        made["share_of_echo"] = found["items_s"] / found["echo_items_s"]
        # how far the median is from 1.2 times the echo's plus the engine's, in ms: at most 0.05 is wanted
        made["over_limit_ms"] = found["p50_ms"] - 1.2 * found["echo_p50_ms"] - raw["batch_1_p50_s"] * 1e3
    return made


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
    ("over limit ms", "over_limit_ms", "{:+.3f}"),
    ("client", "client_cores", "{:.2f}"),
    ("others", "others_cores", "{:.2f}"),
    ("failed", "failures", "{:.0f}"),
)


def rows(cells: list[Cell]) -> list[list[str]]:
    """The table's rows; a noisy cell is marked by †."""
    made = []
    for cell in cells:
        noisy = "†" if cell.noisy else ""
        made.append(
            [cell.name + noisy]
            + ["–" if math.isnan(cell.median(key)) else form.format(cell.median(key)) for _, key, form in COLUMNS]
        )
    return made


def judge(cells: list[Cell], report: dict[str, Any]) -> list[tuple[Target, float, str]]:
    """Each target with what was found and the verdict: aim, floor, missed, or not measured; † as for its cell."""
    by_name = {cell.name: cell for cell in cells}
    verdicts = []
    for target in targets():
        value = target.value(by_name, report)
        noisy = "†" if target.cell in by_name and by_name[target.cell].noisy else ""
        verdicts.append((target, value, target.verdict(value) + noisy))
    return verdicts


def print_tables(cells: list[Cell], report: dict[str, Any], console: Console, *, markdown: bool) -> None:
    """The machine, the cells, the limits, the targets."""
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    console.print(f"{facts}\n† others used more than {NOISE_CORES} cores in every round", highlight=False)
    tables: list[tuple[str, list[str], list[list[str]]]] = [
        ("Cells (medians over rounds)", ["cell", *(title for title, _, _ in COLUMNS)], rows(cells)),
        (
            "Limits",
            ["model", "raw batch 1 items/s", "p50 ms", "raw best items/s", "at"],
            [
                [
                    name,
                    f"{statistics.median(found['batch_1_items_s'] for found in quiet(raws)):,.0f}",
                    f"{statistics.median(found['batch_1_p50_s'] for found in quiet(raws)) * 1e3:.3f}",
                    f"{statistics.median(found['best_items_s'] for found in quiet(raws)):,.0f}",
                    raws[-1]["best"],
                ]
                for name, raws in report["raw"].items()
            ],
        ),
        (
            "Targets",
            ["target", "found", "at least", "aim", "verdict"],
            [
                [target.name, target.show(value), target.show(target.floor), target.show(target.aim), verdict]
                for target, value, verdict in judge(cells, report)
                if verdict != "not measured"
            ],
        ),
    ]
    for title, head, body in tables:
        if markdown:
            print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
            print("\n".join(f"| {' | '.join(row)} |" for row in body))
        else:
            table = Table(*head, title=title)
            for row in body:
                table.add_row(*row)
            console.print(table)


def main() -> int:
    """Measure, print, and say by the exit status whether every floor was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of the main cells")
    parser.add_argument("--cells", nargs="*", help="model:transport:concurrency[,…] or :RATE/s")
    parser.add_argument("--model", action="append", choices=list(INPUTS))
    parser.add_argument("--seconds", type=float, help="per cell and round")
    parser.add_argument("--rounds", type=int, help="medians are taken over these")
    parser.add_argument("--patience", type=float, help="seconds to wait before each measurement for others to be quiet")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or (1.0 if arguments.quick else 1.5)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    if arguments.patience is None:
        arguments.patience = 1.0 if arguments.quick else 10.0
    console = Console(stderr=arguments.json or arguments.markdown, width=None if sys.stdout.isatty() else 170)
    cells = choose(arguments)
    report = run(cells, arguments, console)
    verdicts = judge(cells, report)
    if arguments.json:
        document = report | {
            "machine": machine(),
            "cells": [{"name": cell.name, "rounds": cell.rounds} for cell in cells],
            "targets": [
                {"target": target.name, "found": value, "floor": target.floor, "aim": target.aim, "verdict": verdict}
                for target, value, verdict in verdicts
            ],
        }
        print(json.dumps(document, indent=1, default=str))
    else:
        print_tables(cells, report, console if not arguments.markdown else Console(), markdown=arguments.markdown)
    return 1 if any(verdict.startswith("missed") for _, _, verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
