"""Options that every command shares, and the one place where a command's errors become words and exit codes."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from appliance.cli.output import CommandError, Exit, fail
from appliance.config import ConfigError, UnreadableError

P = ParamSpec("P")

URL = Annotated[
    str | None,
    typer.Option(
        "--url", help="http://HOST:PORT or unix:/PATH of the appliance; $APPLIANCE_URL works too.", show_default=False
    ),
]
JOIN = "ask root to run `usermod --append --groups appliance YOU`, then log in again; or run it as root"

JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def unreadable(error: UnreadableError) -> CommandError:
    """What to tell somebody who has no configuration, or may not read the one there is."""
    what = f"the configuration {error.filename} cannot be read: {error.strerror}"
    hint = "name one with --config or $APPLIANCE_CONFIG"
    if error.errno in (errno.EACCES, errno.EPERM):
        what = f"not allowed to read the configuration {error.filename}"
        hint = JOIN
    return CommandError(Exit.CONFIG, "CONFIG", what, hint)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose operating errors are printed and end with their exit code, never with a traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json", False))
        try:
            function(*args, **kwargs)
        except CommandError as error:
            fail(error, as_json=as_json)
        except ConfigError as error:
            lines = "\n".join(f"  {problem}" for problem in error.problems)
            fail(
                CommandError(
                    Exit.CONFIG, "CONFIG", f"the configuration cannot be used:\n{lines}", "see docs/configuration.md"
                ),
                as_json=as_json,
            )
        except UnreadableError as error:
            fail(unreadable(error), as_json=as_json)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return wrapped
