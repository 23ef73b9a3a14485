"""`bench MODEL`: how fast a running appliance answers, from this machine, for one of its models."""

from __future__ import annotations

import subprocess
import sys
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
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Throughput and latency of one model, with noise as input. It is real load: not for a line that is running."""
    try:
        loads = [int(text) for text in concurrency.split(",")]
    except ValueError as error:
        raise CommandError(
            Exit.USAGE, "USAGE", f"--concurrency {concurrency!r} is no list of numbers", "e.g. 1,4,16"
        ) from error
    appliance = Appliance(url)
    metadata = appliance.get(model_path(model))
    rows = []
    for load in loads:
        note(f"{load} in flight, {seconds:g} s …")
        rows.append(
            _measure(_plan(model, metadata, endpoint or appliance.url, load, seconds, rate)) | {"concurrency": load}
        )
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("IN FLIGHT", "ITEMS/S", "P50 MS", "P90", "P99", "P99.9", "ERRORS"),
            [
                (
                    row["concurrency"],
                    f"{row['items_s']:,.0f}",
                    *(f"{row[key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms", "p999_ms")),
                    row["errors"],
                )
                for row in rows
            ],
        )


def _plan(model: str, metadata: dict[str, Any], address: str, load: int, seconds: float, rate: float) -> Plan:
    import json

    import numpy as np

    from appliance.cli.load import Plan
    from appliance.core.tensor import datatype_of

    source = np.random.default_rng(7)
    inputs, blobs = [], []
    for index, spec in enumerate(metadata["inputs"]):
        datatype = datatype_of(spec["datatype"])
        shape = [size if size >= 0 else UNKNOWN_SIZE for size in spec["shape"]]
        count = int(np.prod(shape))
        if datatype.numpy is None:
            data = bytes(4 * count) if not datatype.itemsize else bytes(datatype.itemsize * count)
        elif spec["datatype"].startswith("FP"):
            data = source.random(count).astype(datatype.numpy).tobytes()
        else:
            data = source.integers(0, 2, count).astype(datatype.numpy).tobytes()
        inputs.append({"name": spec["name"], "datatype": spec["datatype"], "shape": shape})
        inputs[-1] |= {"frame": index} if "://" in address and not address.startswith("http") else {}
        blobs.append(data)
    if address.startswith(("ipc://", "tcp://")):
        header = json.dumps({"op": "infer", "id": "1", "model": model, "inputs": inputs}).encode()
        return Plan(address, load, seconds, rate_per_s=rate, frames=(b"AIP1", header, *blobs))
    for spec, data in zip(inputs, blobs, strict=True):
        spec["parameters"] = {"binary_data_size": len(data)}
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = b"".join((text, *blobs))
    head = (
        f"POST {model_path(model, 'infer')} HTTP/1.1\r\nHost: bench\r\nInference-Header-Content-Length: {len(text)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return Plan(address, load, seconds, rate_per_s=rate, request=head.encode() + body)


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
            Exit.FAILED, "BENCH", f"{result.errors} requests were refused; the first: {result.first_error}"
        )
    latencies = result.latencies or [float("nan")]

    def at(share: float) -> float:
        return latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1000

    return {
        "items_s": result.replies / result.seconds,
        "p50_ms": at(0.5),
        "p90_ms": at(0.9),
        "p99_ms": at(0.99),
        "p999_ms": at(0.999),
        "errors": result.errors,
        "unanswered": result.unanswered,
        "rate_per_s": plan.rate_per_s,
    }
