"""`status`, `ps` and `events`: what a running appliance is doing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from appliance.cli.connection import Appliance
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import Exit, print_json, print_table
from appliance.cli.records import SINCE, ask, clock, moment


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status")(status)
    app.command("ps")(processes)
    app.command("events")(events)


@command
def status(url: URL = None, as_json: JSON = False) -> None:
    """Whether it is ready, what it serves, and how busy it is. Exit status 4 if it is not ready."""
    snapshot = Appliance(url).get("/v2/appliance/status")
    state = snapshot["status"]
    if as_json:
        print_json(snapshot)
    else:
        word = "draining" if state["draining"] else "ready" if state["ready"] else "not ready"
        typer.echo(f"{state['name']} {state['version']}: {word}, {state['line']}, up {_span(state['uptime_s'])}")
        print_table(
            ("MODEL", "VERSION", "STATE", "PENDING", "ANSWERED", "FAILED", "RESTARTS", "REASON"),
            [
                (
                    model["name"],
                    model["version"],
                    model["detail"],
                    model["pending"],
                    model["success"],
                    sum(model["failures"].values()),
                    model["restarts"],
                    model["reason"],
                )
                for model in snapshot["models"]
            ],
        )
    if not state["ready"]:
        raise typer.Exit(int(Exit.NOT_READY))


def _span(seconds: float) -> str:
    """A duration as a person says it."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


@command
def processes(url: URL = None, as_json: JSON = False) -> None:
    """The worker processes: what runs where, on what, and which batch sizes pay."""
    workers = Appliance(url).get("/v2/appliance/workers")
    if as_json:
        print_json(workers)
        return
    print_table(
        (
            "MODEL",
            "VERSION",
            "INSTANCE",
            "PID",
            "STATE",
            "ENGINE",
            "PROVIDER: NODES",
            "RSS MB",
            "BATCHES",
            "RESTARTS",
            "BATCH ≤",
            "MS PER BATCH SIZE",
        ),
        [
            (
                worker["model"],
                worker["version"],
                worker["instance"],
                worker["pid"],
                worker["state"],
                worker["engine"] or "as-is",
                _provider(worker),
                f"{worker['rss_bytes'] / 1e6:.0f}",
                worker["batches"],
                worker["restarts"],
                worker["batch_size_cap"],
                " ".join(f"{rows}:{milliseconds:g}" for rows, milliseconds in worker["batch_ms"].items()),
            )
            for worker in workers
        ],
    )


def _provider(worker: dict[str, Any]) -> str:
    """What runs it: nodes by provider where the engine says so, and a fallback in words."""
    details = worker["details"]
    shown = details.get("nodes") or worker["provider"]
    return f"{shown} ({details['fallback']})" if details.get("fallback") else str(shown)


@command
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until interrupted.")] = False,
    since: SINCE = "24h",
    kind: Annotated[str, typer.Option(help="Only these: model.state, or model for all that begin so.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="The newest so many (100); with --follow: stop after so many.")
    ] = None,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """What happened, and with --follow what happens: starts and stops, models, workers, operators, faults."""
    if follow:
        _follow(url, limit, as_json=as_json)
        return
    begin = moment(since)
    query = {"since": begin, "kind": kind, "limit": limit or 100}
    found = ask(
        url,
        "/v2/appliance/events",
        query,
        lambda reader: {"events": reader.events(since=begin, kind=kind, limit=limit or 100)},
    )
    if as_json:
        print_json(found)
        return
    for event in found["events"]:
        fields = " ".join(f"{key}={_readable(key, value)}" for key, value in event["fields"].items())
        typer.echo(f"{clock(event['time'])}  {event['severity']:<8} {event['kind']:<18} {fields}")


def _readable(key: str, value: Any) -> Any:
    """Moments as a person on site reads them."""
    return clock(value).replace(" ", "T") if key == "last_heard" and isinstance(value, float) else value


def _follow(url: str | None, limit: int | None, *, as_json: bool) -> None:
    query = f"?limit={limit}" if limit else ""
    for event in Appliance(url).lines(f"/v2/appliance/events{query}"):
        if as_json:
            import json

            typer.echo(json.dumps(event, ensure_ascii=False))
        else:
            fields = " ".join(f"{key}={value}" for key, value in event["data"].items())
            typer.echo(f"{event['time']}  {event['seq']:>6}  {event['topic']:<18} {fields}")
