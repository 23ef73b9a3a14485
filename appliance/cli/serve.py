"""`serve` and `config`: run the daemon, and look at its configuration without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from appliance.cli.options import JSON, command
from appliance.cli.output import CommandError, Exit, note, print_json
from appliance.config import Config, find, load, schema

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="appliance.toml; else $APPLIANCE_CONFIG, ./appliance.toml, /etc/appliance/appliance.toml.",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key, e.g. --set http.port=9000. May be repeated.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("serve")(serve)
    config = typer.Typer(no_args_is_help=True, help="The configuration: check, show, schema, docs.")
    config.command("check")(check)
    config.command("show")(show)
    config.command("schema")(show_schema)
    config.command("docs")(docs)
    app.add_typer(config, name="config")


def _load(path: Path | None, settings: list[str] | None) -> tuple[Config, Path | None]:
    found = path or find()
    try:
        return load(found, overrides=settings or ()), found
    except OSError as error:
        raise CommandError(
            Exit.CONFIG,
            "CONFIG",
            f"the configuration {found} cannot be read: {error.strerror}",
            "name one with --config",
        ) from error


@command
def serve(config: ConfigFile = None, settings: Settings = None) -> None:
    """Run the appliance in the foreground. SIGTERM drains and stops, SIGHUP rereads the configuration."""
    loaded, path = _load(config, settings)
    from appliance.daemon import run

    raise typer.Exit(run(loaded, path))


@command
def check(config: ConfigFile = None, settings: Settings = None, as_json: JSON = False) -> None:
    """Whether the configuration can be used; every problem at once, with its line."""
    _, path = _load(config, settings)
    if as_json:
        print_json({"ok": True, "file": str(path) if path else None})
    else:
        note(f"{path or 'the defaults'}: good")


@command
def show(config: ConfigFile = None, settings: Settings = None, as_json: JSON = False) -> None:
    """The configuration in force, defaults included."""
    import msgspec

    loaded, _ = _load(config, settings)
    document = msgspec.to_builtins(loaded)
    if as_json:
        print_json(document)
        return
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    for key, value in document.items():
        if key not in tables:
            typer.echo(f"{key} = {json.dumps(value)}")
    for table, values in tables.items():
        typer.echo(f"\n[{table}]")
        for key, value in values.items():
            typer.echo(f"{key} = {json.dumps(value)}")


@command
def show_schema() -> None:
    """The JSON schema of appliance.toml, for editors."""
    print_json(schema())


@command
def docs() -> None:
    """The text of docs/configuration.md, made from the structs."""
    from appliance.cli.configuration_docs import render

    typer.echo(render(), nl=False)
