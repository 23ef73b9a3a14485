"""`serve` and `config`: run the daemon, and look at its configuration without running it."""

from __future__ import annotations

import errno
import json
import logging
import signal
from pathlib import Path
from typing import Annotated, Literal

import typer

from appliance.cli.options import JSON, command, unreadable
from appliance.cli.output import CommandError, Exit, note, print_json
from appliance.config import (
    Config,
    ConfigError,
    UnreadableError,
    credentials_dir,
    find,
    load,
    resolve_runtime_dir,
    schema,
)
from appliance.host import reload as handshake
from appliance.host import systemd
from appliance.observability import logs
from appliance.observability.journal import stderr_is_journal

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
    config = typer.Typer(no_args_is_help=True, help="The configuration: check, reload, show, schema, docs.")
    config.command("check")(check)
    config.command("reload")(reload)
    config.command("show")(show)
    config.command("schema")(show_schema)
    config.command("docs")(docs)
    app.add_typer(config, name="config")


def _load(
    path: Path | None, settings: list[str] | None, *, credentials: Path | Literal["named"] | None = "named"
) -> tuple[Config, Path | None]:
    found = path or find()
    try:
        return load(found, overrides=settings or (), credentials=credentials), found
    except UnreadableError as error:
        raise unreadable(error) from error


@command
def serve(config: ConfigFile = None, settings: Settings = None) -> None:
    """Run the appliance in the foreground. SIGTERM drains and stops, SIGHUP rereads the configuration."""
    try:
        loaded, path = _load(config, settings, credentials=credentials_dir())
    except (CommandError, ConfigError) as error:
        # stays in `systemctl status` after we are gone
        systemd.failed(str(error), errno.EINVAL)
        if stderr_is_journal():
            logs.configure("auto", "info")
            logging.getLogger(__name__).error("config.refused", extra={"fields": {"reason": str(error)}})
        raise
    from appliance.daemon import run

    raise typer.Exit(run(loaded, path, settings or ()))


@command
def check(config: ConfigFile = None, settings: Settings = None, as_json: JSON = False) -> None:
    """Whether the configuration can be used; every problem at once, with its line."""
    _, path = _load(config, settings)
    if as_json:
        print_json({"ok": True, "file": str(path) if path else None})
    else:
        note(f"{path or 'the defaults'}: good")


@command
def reload(
    config: ConfigFile = None,
    pid: Annotated[
        int | None, typer.Option("--pid", help="The process that serves; else the one last seen here.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 600.0,
    as_json: JSON = False,
) -> None:
    """Have the running appliance reread its configuration and models, and wait; it keeps the old one if the new one is bad."""
    runtime_dir = resolve_runtime_dir(_for_runtime_dir(config))
    before = signal.signal(signal.SIGTERM, _told_to_stop)
    try:
        outcome = handshake.ask(runtime_dir, pid, timeout_s)
    except _ToldToStop:
        note("nothing is waited for any more: the appliance is being stopped")
        # ExecReload= names the process. A death by signal there would make an orderly stop of the service a failed one
        raise typer.Exit(Exit.OK if pid is not None else 128 + signal.SIGTERM) from None
    except handshake.NobodyError as error:
        raise CommandError(
            Exit.UNREACHABLE, "UNREACHABLE", f"nothing was reloaded: {error}", "is the appliance running?"
        ) from error
    except PermissionError as error:
        raise CommandError(
            Exit.FAILED, "PERMISSION_DENIED", "this user may not signal it", "use systemctl reload"
        ) from error
    except TimeoutError as error:
        raise CommandError(
            Exit.TIMEOUT, "TIMEOUT", f"no result within {timeout_s:g} s; it may still come", "see the journal"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print_json({"ok": outcome.ok, "problems": list(outcome.problems), "needs_restart": list(outcome.notes)})
    for problem in outcome.problems:
        note(f"error: {problem}")
    if not outcome.ok:
        raise typer.Exit(Exit.FAILED)
    if not as_json:
        note("reloaded" + (f"; needs a restart: {', '.join(outcome.notes)}" if outcome.notes else ""))


class _ToldToStop(BaseException):
    """SIGTERM came: `systemctl stop` ends a reload that still waits before it stops the service."""


def _told_to_stop(*_: object) -> None:
    raise _ToldToStop


def _for_runtime_dir(path: Path | None) -> Config:
    """The configuration, or the defaults where it is what the reload is to complain about."""
    try:
        return load(path or find())
    except (ConfigError, OSError):
        return Config()


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
