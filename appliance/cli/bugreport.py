"""`bugreport`: one archive for support. Events, history, configuration without secrets, versions, logs; no payloads or models."""

from __future__ import annotations

import io
import json
import platform
import shutil
import sqlite3
import subprocess
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance import __version__
from appliance.cli.connection import Appliance
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, note, print_json
from appliance.cli.records import SINCE, ask, moment
from appliance.cli.redaction import redact, redact_problem, redact_text, redact_toml
from appliance.config import ConfigError, find, load

if TYPE_CHECKING:
    from appliance.recording.reader import RecordReader

MAX_PART_BYTES = 8 << 20
"""Of one file in the archive; what is longer loses its beginning, which is the older part."""
JOURNAL_S = 30.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bugreport")(bugreport)


@command
def bugreport(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The archive to write; else in this folder.")
    ] = None,
    since: SINCE = "7d",
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Pack what support needs into one archive, and say what is in it. Works without a running appliance."""
    file = output or Path(time.strftime("appliance-bugreport-%Y%m%d-%H%M%S.tar.gz"))
    parts = _collect(url, moment(since))
    contents = []
    try:
        with tarfile.open(file, "x:gz") as archive:
            for name, data in parts.items():
                cut = data[-MAX_PART_BYTES:]
                entry = tarfile.TarInfo(f"bugreport/{name}")
                entry.size, entry.mtime, entry.mode = len(cut), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(cut))
                contents.append({"name": name, "bytes": len(cut), "cut": len(cut) < len(data)})
    except OSError as error:
        raise CommandError(
            Exit.FAILED, "NOT_WRITTEN", f"{file} cannot be written: {error.strerror}", "choose another with --output"
        ) from error
    file.chmod(0o600)
    if as_json:
        print_json({"file": str(file), "bytes": file.stat().st_size, "contents": contents})
        return
    for part in contents:
        note(f"  {part['name']:<20} {part['bytes']:>9} bytes{' (only its end)' if part['cut'] else ''}")
    note("look into it before you send it: it holds no payloads, models or known secrets, but names of yours")
    typer.echo(file)


def _collect(url: str | None, since: float) -> dict[str, bytes]:
    """Each part by file name; what cannot be had is a text that says why."""
    sources: dict[str, Callable[[], Any]] = {
        "versions.json": _versions,
        "configuration.json": _configuration,
        "configuration.toml": _configuration_text,
        "status.json": lambda: Appliance(url).get("/v2/appliance/status"),
        "workers.json": lambda: Appliance(url).get("/v2/appliance/workers"),
        "events.json": lambda: ask(
            url,
            "/v2/appliance/events",
            {"since": since, "limit": 10_000},
            lambda reader: {"events": reader.events(since=since, limit=10_000)},
        ),
        "history.json": lambda: _history(url, since),
        "audit.json": lambda: ask(url, "/v2/appliance/audit", {}, lambda reader: reader.audit()),
        "log.txt": lambda: _journal(since),
    }
    parts = {}
    for name, source in sources.items():
        try:
            found = source()
        except ConfigError as error:
            # most reports are asked for because something is broken, and this may be what is
            found = {
                "missing": "the configuration cannot be used",
                "problems": [redact_problem(one) for one in error.problems],
            }
        except (CommandError, OSError, ValueError, subprocess.SubprocessError) as error:
            found = {"missing": str(error)}
        if isinstance(found, str):
            parts[name] = redact_text(found).encode()
        else:
            parts[name] = json.dumps(redact(found), indent=1, default=str, ensure_ascii=False).encode()
    return parts


def _versions() -> dict[str, Any]:
    from importlib.metadata import distributions

    return {
        "appliance": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "packages": {package.metadata["Name"]: package.version for package in distributions()},
    }


def _configuration() -> Any:
    import msgspec

    return msgspec.to_builtins(load(find()))


def _configuration_text() -> str:
    """The file as it was written; the program may not be able to read it."""
    file = find()
    if file is None:
        return "# there is no file: the defaults count\n"
    return f"# {file}\n{redact_toml(file.read_text(errors='replace'))}"


def _history(url: str | None, since: float) -> list[Any]:
    names = ask(url, "/v2/appliance/history", {}, lambda reader: {"series": reader.series()})["series"]
    found = []
    for begin in range(0, len(names), 32):
        some = names[begin : begin + 32]
        query = {"names": ",".join(some), "since": since, "points": 700}
        found.append(
            ask(
                url,
                "/v2/appliance/history",
                query,
                partial(_ask_history, names=some, since=since),
            )
        )
    return found


def _ask_history(reader: RecordReader, names: list[str], since: float) -> Any:
    return reader.history(names, since=since, points=700)


def _journal(since: float) -> str:
    program = shutil.which("journalctl")
    if program is None:
        return "there is no journal here; the log went to stderr of `appliance serve`\n"
    arguments = (program, "-u", "appliance", "--since", f"@{since:.0f}", "-n", "20000", "--no-pager", "-o", "short-iso")
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=JOURNAL_S, check=False)  # noqa: S603
    return done.stdout or done.stderr
