"""`bench MODEL`: how fast a running appliance answers, from this machine, for one of its models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.cli.connection import Appliance, model_path
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, note, print_json, print_table

if TYPE_CHECKING:
    from appliance.cli.load import Result
    from appliance.cli.payloads import Input

OPEN_SIZE = 1
"""What an open size is set to, unless --shape says otherwise."""

VARIANTS = 4
"""Different inputs that are sent in turn."""

PERCENTILES = (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99), ("p999_ms", 0.999))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


@command
def bench(
    model: Annotated[str, typer.Argument(help="The model to measure.")],
    concurrency: Annotated[str, typer.Option(help="Requests in flight, one row each.")] = "1,4,16",
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Per row, after half a second of warm-up.")] = 2.0,
    rate: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Open loop: so many requests per second, at random times (0: closed loop)."),
    ] = 0.0,
    endpoint: Annotated[str | None, typer.Option(help="A ZeroMQ endpoint to measure instead of HTTP.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="NAME=1,3,224,224 for an input with open sizes (otherwise 1); may be repeated."),
    ] = None,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Throughput and latency of one model, with noise as input. It is real load: not for a line that is running."""
    from appliance.cli.load import LoadError, Plan, generate

    loads = _numbers("--concurrency", concurrency)
    if endpoint is not None and not endpoint.startswith(("ipc://", "tcp://")):
        raise CommandError(Exit.USAGE, "USAGE", f"{endpoint!r} is no ZeroMQ endpoint", "ipc://PATH or tcp://HOST:PORT")
    appliance = Appliance(url)
    metadata = appliance.get(model_path(model))
    requests = _requests(model, metadata, _shapes(shape or ()), zmq=endpoint is not None)
    address = endpoint or appliance.url
    rows, first_error = [], ""
    for load in loads:
        note(f"{load} in flight, {seconds:g} s …")
        try:
            result = generate(Plan(address, requests, load, seconds, rate_per_s=rate))
        except LoadError as error:
            raise CommandError(
                Exit.FAILED, "BENCH", str(error), "is the appliance still there? `appliance status`"
            ) from error
        first_error = first_error or result.first_error
        rows.append({"concurrency": load, "rate_per_s": rate} | _row(result))
    if as_json:
        print_json({"model": model, "address": address, "rows": rows, "first_error": first_error})
    else:
        _print(rows)
    if first_error or any(row["unanswered"] for row in rows):
        note(f"not every request was answered well; the first error: {first_error or 'none, but replies are missing'}")
        raise typer.Exit(int(Exit.FAILED))


def _numbers(option: str, text: str) -> list[int]:
    """Positive numbers, separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise ValueError(text)
    except ValueError as error:
        raise CommandError(
            Exit.USAGE, "USAGE", f"{option} {text!r} is no list of positive numbers", "e.g. 1,4,16"
        ) from error
    return numbers


def _shapes(texts: tuple[str, ...] | list[str]) -> dict[str, list[int]]:
    """`NAME=1,3,224,224` by name."""
    shapes = {}
    for text in texts:
        name, separator, sizes = text.partition("=")
        if not separator:
            raise CommandError(Exit.USAGE, "USAGE", f"--shape {text!r} names no input", "e.g. image=1,3,224,224")
        shapes[name] = _numbers("--shape", sizes)
    return shapes


def _requests(
    model: str, metadata: dict[str, Any], shapes: dict[str, list[int]], *, zmq: bool
) -> tuple[tuple[bytes, ...], ...]:
    """Requests with noise of the shapes that the model's metadata names."""
    from appliance.cli.payloads import http_binary, noise, zmq_frames

    known = [spec["name"] for spec in metadata["inputs"]]
    if strangers := shapes.keys() - known:
        raise CommandError(
            Exit.USAGE, "USAGE", f"{model!r} has no input {min(strangers)!r}", f"its inputs: {', '.join(known)}"
        )
    requests = []
    for seed in range(VARIANTS):
        inputs: list[Input] = []
        for spec in metadata["inputs"]:
            sizes = shapes.get(spec["name"]) or [size if size >= 0 else OPEN_SIZE for size in spec["shape"]]
            inputs.append(noise(spec["name"], spec["datatype"], sizes, seed=seed))
        requests.append(zmq_frames(model, inputs) if zmq else (http_binary(model, inputs),))
    return tuple(requests)


def _row(result: Result) -> dict[str, Any]:
    return {
        "requests_s": result.per_second,
        **{key: result.latency_ms(share) if result.latencies else None for key, share in PERCENTILES},
        "answered": result.answered,
        "errors": result.errors,
        "unanswered": result.unanswered,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    keys = [key for key, _ in PERCENTILES]
    print_table(
        ("IN FLIGHT", "REQUESTS/S", "P50 MS", "P90", "P99", "P99.9", "ERRORS", "UNANSWERED"),
        [
            (
                row["concurrency"],
                f"{row['requests_s']:,.0f}",
                *("–" if row[key] is None else f"{row[key]:.3f}" for key in keys),
                row["errors"],
                row["unanswered"],
            )
            for row in rows
        ],
    )
