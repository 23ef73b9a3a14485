"""`bench MODEL`: how fast a running appliance answers, from this machine, for one of its models.

Inputs are noise, made from the model's metadata. The requests are sent by `load`, in a process of its own.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.cli.connection import Appliance, model_path
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, note, print_json, print_table

if TYPE_CHECKING:
    from appliance.cli.load import Plan, Result

UNKNOWN_SIZE = 1
"""What an open size is set to, unless --shape says otherwise."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


@command
def bench(
    model: Annotated[str, typer.Argument(help="The model to measure.")],
    concurrency: Annotated[str, typer.Option(help="Requests in flight, one row each.")] = "1,4,16",
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Per row.")] = 2.0,
    rate: Annotated[
        float, typer.Option(min=0, max=1e6, help="Open loop at so many requests per second (0: closed loop).")
    ] = 0.0,
    endpoint: Annotated[str | None, typer.Option(help="A ZeroMQ endpoint to measure instead of HTTP.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="An input's shape, where the model leaves it open: NAME=1,640,640,3.")
    ] = None,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Throughput and latency of one model, with noise as input. It is real load: not for a line that is running."""
    loads = _numbers(concurrency, "--concurrency", "1,4,16")
    appliance = Appliance(url)
    inputs = _inputs(appliance.get(model_path(model))["inputs"], _shapes(shape or ()))
    rows = []
    for load in loads:
        note(f"{load} in flight, {seconds:g} s …")
        plan = _plan(model, inputs, endpoint or appliance.url, load, seconds, rate)
        rows.append(_measure(plan) | {"concurrency": load})
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("IN FLIGHT", "REQUESTS/S", "P50 MS", "P90", "P99", "P99.9", "ERRORS"),
            [
                (
                    row["concurrency"],
                    f"{row['requests_s']:,.0f}",
                    *(f"{row[key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms", "p999_ms")),
                    row["errors"],
                )
                for row in rows
            ],
        )


def _numbers(text: str, option: str, example: str) -> list[int]:
    """Comma-separated numbers from 1 up; CommandError for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise CommandError(Exit.USAGE, "USAGE", f"{option} {text!r} is no list of numbers from 1 up", f"e.g. {example}")
    return numbers


def _shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        if not name:
            raise CommandError(Exit.USAGE, "USAGE", f"--shape {text!r} names no input", "e.g. image=1,640,640,3")
        shapes[name] = _numbers(sizes, "--shape", f"{name}=1,640,640,3")
    return shapes


def _inputs(specs: Sequence[dict[str, Any]], shapes: dict[str, list[int]]) -> list[tuple[dict[str, Any], bytes]]:
    """A description and data for each input of the metadata: noise, seeded."""
    import numpy as np

    from appliance.core.tensor import datatype_of

    if unknown := set(shapes) - {spec["name"] for spec in specs}:
        known = ", ".join(spec["name"] for spec in specs)
        raise CommandError(Exit.USAGE, "USAGE", f"the model has no input {min(unknown)!r}", f"its inputs: {known}")
    source = np.random.default_rng(7)
    made = []
    for spec in specs:
        datatype = datatype_of(spec["datatype"])
        shape = shapes.get(spec["name"]) or [size if size >= 0 else UNKNOWN_SIZE for size in spec["shape"]]
        count = math.prod(shape)
        if datatype.numpy is None:
            # strings are empty ones: four bytes of length each
            data = bytes(count * (datatype.itemsize or 4))
        elif spec["datatype"].startswith("FP"):
            data = source.random(count).astype(datatype.numpy).tobytes()
        else:
            data = source.integers(0, 2, count).astype(datatype.numpy).tobytes()
        made.append(({"name": spec["name"], "datatype": spec["datatype"], "shape": shape}, data))
    return made


def _plan(
    model: str, inputs: Sequence[tuple[dict[str, Any], bytes]], address: str, load: int, seconds: float, rate: float
) -> Plan:
    """The request as it goes over the address: an AIP1 message, or an HTTP request with binary tensors."""
    import json

    from appliance.cli.load import Plan

    blobs = [data for _, data in inputs]
    if address.startswith(("ipc://", "tcp://")):
        tensors = [tensor | {"frame": index} for index, (tensor, _) in enumerate(inputs)]
        header = json.dumps({"op": "infer", "id": "1", "model": model, "inputs": tensors}).encode()
        return Plan(address, load, seconds, rate_per_s=rate, frames=(b"AIP1", header, *blobs))
    tensors = [tensor | {"parameters": {"binary_data_size": len(data)}} for tensor, data in inputs]
    text = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    head = (
        f"POST {model_path(model, 'infer')} HTTP/1.1\r\nHost: bench\r\nInference-Header-Content-Length: {len(text)}\r\n"
        f"Content-Length: {len(text) + sum(map(len, blobs))}\r\n\r\n"
    )
    return Plan(address, load, seconds, rate_per_s=rate, request=b"".join((head.encode(), text, *blobs)))


def _measure(plan: Plan) -> dict[str, Any]:
    """Run the generator in a process of its own; what it found."""
    import msgspec

    from appliance.cli.load import Result

    done = subprocess.run(
        [sys.executable, "-m", "appliance.cli.load"],
        input=msgspec.msgpack.encode(plan),
        capture_output=True,
        check=False,
        timeout=plan.seconds + plan.warm_up_s + 60,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise CommandError(Exit.FAILED, "BENCH", f"the load generator ended: {' '.join(last)}")
    result: Result = msgspec.msgpack.decode(done.stdout, type=Result)
    if result.errors:
        raise CommandError(
            Exit.FAILED,
            "BENCH",
            f"{result.errors} requests were refused; the first: {result.first_error.strip().splitlines()[-1]}",
        )
    latencies = result.latencies or [float("nan")]

    def at(share: float) -> float:
        return latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1000

    return {
        "requests_s": result.replies / result.seconds,
        "p50_ms": at(0.5),
        "p90_ms": at(0.9),
        "p99_ms": at(0.99),
        "p999_ms": at(0.999),
        "errors": result.errors,
        "unanswered": result.unanswered,
        "rate_per_s": plan.rate_per_s,
    }
