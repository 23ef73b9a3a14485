"""`inspect FILE.onnx`: what a model file is, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.cli.options import JSON, command
from appliance.cli.output import CommandError, Exit, print_json, print_table

if TYPE_CHECKING:
    from appliance.building.inspect import Inspection

SHOWN_OPERATORS = 12


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


@command
def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file.")],
    as_json: JSON = False,
) -> None:
    """Inputs, outputs, operators, weights, and whether it can be batched (and if not, how to re-export it)."""
    from appliance.building.inspect import InspectError
    from appliance.building.inspect import inspect as look

    try:
        found = look(file)
    except InspectError as error:
        raise CommandError(Exit.FAILED, "NOT_A_MODEL", f"{file} {error}") from error
    except ImportError as error:
        raise CommandError(
            Exit.FAILED, "NO_ONNX", "inspecting needs the package onnx", "pip install 'appliance[cpu]'"
        ) from error
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(found))
    else:
        _print(file, found)


def _print(file: Path, found: Inspection) -> None:
    typer.echo(f"{file}: opset {found.opset}, IR {found.ir_version}, by {found.producer or 'an unnamed producer'}")
    typer.echo(f"{found.parameters:,} parameters in {found.parameter_bytes / 1e6:.2f} MB, {found.nodes} nodes")
    typer.echo(f"batch axis {found.batch_axis}: {found.advice}")
    if found.external_data:
        typer.echo(f"weights also in {', '.join(found.external_data)}")
    if found.data_dependent:
        typer.echo(f"outputs may depend on values ({', '.join(found.data_dependent)})")
    print_table(
        ("", "NAME", "DATATYPE", "SHAPE"),
        [
            (kind, value.name, value.datatype, "[" + ", ".join(map(str, value.shape)) + "]")
            for kind, values in (("input", found.inputs), ("output", found.outputs))
            for value in values
        ],
    )
    shown = list(found.operators.items())[:SHOWN_OPERATORS]
    more = " …" if len(found.operators) > len(shown) else ""
    typer.echo("operators: " + ", ".join(f"{name} ×{count}" for name, count in shown) + more)
