"""The command `appliance`: one file per noun, put together here. Heavy imports stay inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from appliance import __version__
from appliance.cli import (
    bench,
    bugreport,
    bundle,
    check,
    doctor,
    engines,
    governor,
    history,
    infer,
    inspect,
    models,
    serve,
    status,
    top,
)

app = typer.Typer(
    name="appliance",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Runs neural networks for the programs beside it: ONNX models over ZeroMQ and HTTP.",
)

for noun in (
    serve,
    status,
    top,
    check,
    doctor,
    models,
    governor,
    infer,
    inspect,
    engines,
    bench,
    history,
    bugreport,
    bundle,
):
    noun.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the release.")
    ] = False,
) -> None:
    """Runs neural networks for the programs beside it: ONNX models over ZeroMQ and HTTP."""


def main() -> None:
    """The entry point."""
    app()
