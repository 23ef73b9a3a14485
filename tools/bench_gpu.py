#!/usr/bin/env python3
"""What the engine costs on top of the library: one plan, run four ways in turn, in one process on one GPU.

`raw` is the library alone, from and to memory that is on the device already; `copies` adds the bare copies from and to pinned
memory, which every answer needs; `engine` is the appliance's engine, with its graphs; `eager` the same without them. The rounds
alternate, so that clocks and temperature are the same for all. For a person at a GPU box; data on stdout, JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import appliance  # noqa: F401  before any engine's library
from appliance.core.manifest import OnnxRuntimeManifest
from appliance.core.tensor import Shape, TensorSpec
from appliance.engines import cuda
from appliance.engines import tensorrt_library as library
from appliance.engines.base import EngineBatch, EngineOptions, EngineTensor
from appliance.engines.tensorrt import TensorRtEngine

Runner = Callable[[], object]


class Raw:
    """The library as its samples use it: one context, addresses set once, one stream."""

    def __init__(self, engine: TensorRtEngine, options: EngineOptions, rows: int) -> None:
        self.device = cuda.Device(int(options.device.partition(":")[2] or 0))
        self.device.open()
        messages = library.Messages()
        self._runtime = library.trt.Runtime(messages.logger)
        plan = self._runtime.deserialize_cuda_engine(Path(options.model_file).read_bytes())
        self._context = plan.create_execution_context()
        self._uploads, self._downloads = [], []
        for specs, copies in ((engine.traits.inputs, self._uploads), (engine.traits.outputs, self._downloads)):
            for spec in specs:
                shape = shape_of(spec, rows)
                size = int(np.prod(shape)) * spec.datatype.itemsize
                address, host = self.device.allocate(size), self.device.allocate_pinned(size)
                copies.append((address, host.address, size))
                self._context.set_tensor_address(spec.name, address)
                if specs is engine.traits.inputs:
                    self._context.set_input_shape(spec.name, shape)

    def run(self) -> None:
        """Run on what is on the device."""
        self._context.execute_async_v3(self.device.stream_handle)
        self.device.synchronize()

    def run_with_copies(self) -> None:
        """Copy in, run, copy out."""
        for address, host, size in self._uploads:
            self.device.upload(address, host, size)
        self._context.execute_async_v3(self.device.stream_handle)
        for address, host, size in self._downloads:
            self.device.download(host, address, size)
        self.device.synchronize()

    def close(self) -> None:
        """Give everything back."""
        self._context = self._runtime = None
        self.device.close()


def shape_of(spec: TensorSpec, rows: int) -> Shape:
    """That tensor's shape in a batch; an error where more than the batch is free."""
    sizes = spec.shape[1:] if spec.shape and spec.shape[0] < 0 else spec.shape
    if any(size < 0 for size in sizes):
        raise SystemExit(f"{spec.name!r} has the shape {list(spec.shape)}: only the batch axis may be free here")
    return (rows, *sizes) if len(sizes) < len(spec.shape) else spec.shape


def batch_for(engine: TensorRtEngine, rows: int) -> tuple[EngineBatch, Any]:
    """A batch in one block of memory, which is attached to the engine as a worker's arena is; and the block."""
    specs = (*engine.traits.inputs, *engine.traits.outputs)
    sizes = [int(np.prod(shape_of(spec, rows))) * spec.datatype.itemsize for spec in specs]
    memory = np.zeros(sum(-(-size // 64) * 64 for size in sizes), np.uint8)
    base = memory.__array_interface__["data"][0]
    engine.attach_memory(base, memory.nbytes)
    tensors, offset = [], 0
    for spec, size in zip(specs, sizes, strict=True):
        view = memoryview(memory)[offset : offset + size]
        tensors.append(EngineTensor(spec.name, spec.datatype, shape_of(spec, rows), view, base + offset))
        offset += -(-size // 64) * 64
    count = len(engine.traits.inputs)
    return EngineBatch(("bench", rows), rows, tuple(tensors[:count]), tuple(tensors[count:])), memory


def timed(run: Runner, seconds: float) -> list[float]:
    """Seconds of each run, for so long."""
    found, end = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        run()
        found.append(time.perf_counter() - started)
    return found


def measure(options: EngineOptions, rows: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Microseconds at the median and the 99th percentile, and rows per second, by way of running."""
    without = EngineOptions(**{**_fields(options), "parameters": {"cuda_graphs": "false"}})
    engine, eager = TensorRtEngine(options), TensorRtEngine(without)
    raw = Raw(engine, options, rows)
    try:
        batch, kept = batch_for(engine, rows)
        plain, also_kept = batch_for(eager, rows)
        ways: dict[str, Runner] = {
            "raw": raw.run,
            "copies": raw.run_with_copies,
            "engine": lambda: engine.run(batch),
            "eager": lambda: eager.run(plain),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            timed(run, seconds / 4)
        for _ in range(rounds):
            for name, run in ways.items():
                times[name] += timed(run, seconds)
        del kept, also_kept
        details = {"provider": engine.traits.provider, **engine.traits.details}
    finally:
        raw.close()
        eager.close()
        engine.close()
    return {"rows": rows, "details": details, **{name: _summary(found, rows) for name, found in times.items()}}


def _fields(options: EngineOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__struct_fields__}


def _summary(seconds: list[float], rows: int) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_us": round(statistics.median(ordered) * 1e6, 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
        "rows_per_s": round(rows * len(ordered) / sum(ordered), 1),
        "runs": len(ordered),
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", type=Path, help="a plan file, as `appliance engines list` names its folder")
    parser.add_argument("--engine", choices=("tensorrt", "tensorrt_rtx"), default="tensorrt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per way and round")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    options = EngineOptions(
        chosen.engine, str(chosen.plan), chosen.device, max(chosen.rows), 1, OnnxRuntimeManifest(), {}
    )
    results = [measure(options, rows, rounds=chosen.rounds, seconds=chosen.seconds) for rows in chosen.rows]
    if chosen.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{results[0]['details']['provider']} on {results[0]['details']['device']}")
    print(f"{'rows':>5} {'way':<8} {'median us':>10} {'p99 us':>10} {'rows/s':>12}")
    for result in results:
        for way in ("raw", "copies", "engine", "eager"):
            found = result[way]
            print(
                f"{result['rows']:>5} {way:<8} {found['median_us']:>10} {found['p99_us']:>10} {found['rows_per_s']:>12}"
            )


if __name__ == "__main__":
    main()
