"""`status`, `ps` and `events`: what a running appliance is doing."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from appliance.cli.connection import Appliance
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, note, print_json, print_table
from appliance.cli.records import ask, clock, moment

SHAPE = ("time", "kind", "severity", "fields")
"""Of an event that is followed: seconds since 1970, and what the record knows."""
MOST_RECORDED = 10_000
RECENT = 100
SAME_S = 0.25


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
        if problem := (snapshot.get("recorder") or {}).get("problem"):
            typer.echo(f"the flight recorder does not record: {problem}")
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
    since: Annotated[
        str,
        typer.Option(
            help="30s, 15min, 24h, 7d ago, or a time like 2027-01-31T06:00; else 24h, and with --follow from now on.",
            show_default=False,
        ),
    ] = "",
    kind: Annotated[str, typer.Option(help="Only these: model.state, or model for all that begin so.")] = "",
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="The newest so many (100); with --follow: end after so many new ones."),
    ] = None,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """What happened, and with --follow what happens: starts and stops, models, workers, operators, faults."""
    if follow:
        _follow(url, since, kind, limit, as_json=as_json)
        return
    begin = moment(since or "24h")
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
        _print_event(event)


def _print_event(event: dict[str, Any]) -> None:
    fields = " ".join(f"{key}={_readable(key, value)}" for key, value in event["fields"].items())
    typer.echo(f"{clock(event['time'])}  {event['severity']:<8} {event['kind']:<18} {fields}")


def _readable(key: str, value: Any) -> Any:
    """Moments as a person on site reads them."""
    return clock(value, "T") if key == "last_heard" and isinstance(value, float) else value


def _follow(url: str | None, since: str, kind: str, limit: int | None, *, as_json: bool) -> None:
    """What was recorded since then, if that is asked for; then what happens, in the same shape: an object a line."""
    from itertools import islice

    appliance = Appliance(url)
    begin = moment(since) if since else None
    # opened first: what happens while the record is read must not fall between the two
    stream = appliance.lines("/v2/appliance/events")
    recorded = [] if begin is None else _recorded(appliance, begin, kind)
    told = [{key: event[key] for key in SHAPE} for event in recorded]
    for event in told:
        _print_line(event, as_json=as_json)
    new = (event for event in map(_happened, stream) if _is_kind(event["kind"], kind) and not _is_told(event, told))
    for event in islice(new, limit):
        _print_line(event, as_json=as_json)


def _recorded(appliance: Appliance, since: float, kind: str) -> list[dict[str, Any]]:
    try:
        query = urlencode({"since": since, "kind": kind, "limit": MOST_RECORDED})
        found: list[dict[str, Any]] = appliance.get(f"/v2/appliance/events?{query}")["events"]
    except CommandError as error:
        note(f"what happened before is not known: {error.message}")
        return []
    return found


def _happened(event: dict[str, Any]) -> dict[str, Any]:
    """An event of the stream in the shape that it has in the record."""
    from datetime import datetime

    from appliance.recording.bridge import as_recorded

    kind, severity, fields = as_recorded(event["topic"], event["data"])
    time = datetime.fromisoformat(event["time"]).timestamp()
    return dict(zip(SHAPE, (time, kind, severity, fields), strict=True))


def _is_kind(kind: str, wanted: str) -> bool:
    return not wanted or kind == wanted or kind.startswith(f"{wanted}.")


def _is_told(event: dict[str, Any], told: list[dict[str, Any]]) -> bool:
    """Whether it was read from the record already; the two clocks are read a moment apart, and the record adds a number."""
    return any(
        event["kind"] == other["kind"]
        and abs(event["time"] - other["time"]) < SAME_S
        and event["fields"].items() <= other["fields"].items()
        for other in told[-RECENT:]
    )


def _print_line(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(event, ensure_ascii=False))
    else:
        _print_event(event)
