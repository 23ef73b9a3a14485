"""How commands speak: data on stdout, messages on stderr; tables for people, JSON for programs; errors name the next step."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NoReturn

import typer


class Exit(IntEnum):
    """Exit codes, the same for every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_READY = 4
    TIMEOUT = 7
    CONFIG = 78


class CommandError(Exception):
    """A command that cannot go on: what happened, and what to do about it."""

    def __init__(self, code: Exit, name: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name
        self.message = message
        self.hint = hint


def print_json(document: Any) -> None:
    """The document on stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout: ruled on a terminal, plain columns elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for title in head:
        table.add_column(title, no_wrap=True)
    for row in rows:
        # as plain text: a shape like [batch, 10] would be taken for markup
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    Console(width=None if terminal else 200, highlight=False).print(table)


def note(message: str) -> None:
    """A message for the person, on stderr."""
    typer.echo(message, err=True)


def fail(error: CommandError, *, as_json: bool) -> NoReturn:
    """Say what is wrong and end with its exit code."""
    if as_json:
        print_json({"error": {"code": error.name, "message": error.message, "hint": error.hint}})
    else:
        note(f"error: {error.message}")
        if error.hint:
            note(f"  → {error.hint}")
    raise typer.Exit(int(error.code))
