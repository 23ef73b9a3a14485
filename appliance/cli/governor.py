"""`governor show | hold | release`: what the governor holds back, and an operator's hold on it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from appliance.cli.connection import Appliance
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import print_json, print_table
from appliance.cli.records import span_s

PATH = "/v2/appliance/governor"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    governor = typer.Typer(no_args_is_help=True, help="What is held back while it is hot: show, hold, release.")
    governor.command("show")(show)
    governor.command("hold")(hold)
    governor.command("release")(release)
    app.add_typer(governor, name="governor")


@command
def show(url: URL = None, as_json: JSON = False) -> None:
    """The level, what it holds back, and what each device says."""
    _print(Appliance(url).get(PATH), as_json=as_json)


@command
def hold(
    level: Annotated[str, typer.Argument(help="WARM, HOT or CRITICAL: at least that is in force.")],
    span: Annotated[str, typer.Option("--for", help="How long: 30s, 10m, 2h; at most a day.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever finds it.")],
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Hold back at least what this level holds back, for a while. The sensors can still ask for more, never for less.

    It ends by itself, by `release`, and by a restart. It is an operator's action: `appliance audit list` has it.
    """
    body = {"level": level, "seconds": span_s(span), "reason": reason}
    _print(Appliance(url).post(f"{PATH}/hold", body), as_json=as_json)


@command
def release(url: URL = None, as_json: JSON = False) -> None:
    """End a hold. What the sensors ask for stays."""
    _print(Appliance(url).post(f"{PATH}/release"), as_json=as_json)


def _print(governor: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(governor)
        return
    typer.echo(": ".join(part for part in (governor["level"], governor["reason"]) if part))
    if held := governor["hold"]:
        typer.echo(f"held at {held['level']} for {held['seconds_left']:.0f} s more: {held['reason']}")
    if governor["devices"]:
        rows = [(device["device"], device["level"], device["note"]) for device in governor["devices"]]
        print_table(("DEVICE", "LEVEL", ""), rows)
