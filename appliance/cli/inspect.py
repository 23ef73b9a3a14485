"""`inspect FILE.onnx`: what a model file is, and what here could run it, without running it."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.cli.options import JSON, command
from appliance.cli.output import CommandError, Exit, print_json, print_table

if TYPE_CHECKING:
    from appliance.building.engine_fit import EngineFit
    from appliance.building.inspect import Inspection

SHOWN_OPERATORS = 12
TITLE_WIDTH = 18


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


@command
def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file.")],
    as_json: JSON = False,
) -> None:
    """Inputs, outputs, operators, weights, whether it can be batched (and if not, how to re-export it), and what could run it."""
    try:
        from appliance.building.engine_fit import engines
        from appliance.building.inspect import InspectError
        from appliance.building.inspect import inspect as look

        found = look(file)
        fits = engines(found)
    except ImportError as error:
        raise CommandError(
            Exit.FAILED, "NO_ONNX", "inspecting needs the package onnx", "pip install 'appliance[cpu]'"
        ) from error
    except InspectError as error:
        raise CommandError(Exit.FAILED, "NOT_A_MODEL", printable(f"{file} {error}")) from error
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(found) | {"engines": msgspec.to_builtins(fits)})
    else:
        _print(file, found, fits)


def printable(text: str) -> str:
    """Without what would steer a terminal: names come from a file that nobody vouches for."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _line(title: str, text: str) -> None:
    """A titled paragraph, wrapped to the terminal."""
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    wrapped = textwrap.wrap(printable(text), width - TITLE_WIDTH, break_on_hyphens=False) or [""]
    for number, part in enumerate(wrapped):
        typer.echo(f"{title if number == 0 else '':<{TITLE_WIDTH}}{part}")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _print(file: Path, found: Inspection, fits: tuple[EngineFit, ...]) -> None:
    others = "".join(f", {domain} {version}" for domain, version in found.other_opsets.items())
    _line("file", f"{file}, {_bytes(found.file_bytes)}")
    _line(
        "format",
        f"ONNX opset {found.opset}{others}, IR {found.ir_version}, by {found.producer or 'an unnamed producer'}",
    )
    _line("weights", f"{found.parameters:,} parameters in {_bytes(found.parameter_bytes)}")
    if found.external_data:
        _line("", f"also in {', '.join(found.external_data)}")
    shown = list(found.operators.items())[:SHOWN_OPERATORS]
    more = f", and {len(found.operators) - len(shown)} more kinds" if len(found.operators) > len(shown) else ""
    _line("operators", f"{found.nodes:,} nodes: " + ", ".join(f"{name} ×{count}" for name, count in shown) + more)
    _line("datatypes", ", ".join(found.datatypes) or "none declared")
    _line("batching", f"batch axis {found.batch_axis}: {found.advice}")
    for image in found.images:
        size = f"{image.height} × {image.width} pixels, {image.channels} channel(s)"
        _line("picture", f"{image.name} seems to want {image.layout}, {size} ({image.reason})")
    if found.data_dependent:
        _line("sizes", f"outputs may depend on values, not only on shapes ({', '.join(found.data_dependent)})")
    typer.echo()
    print_table(
        ("", "NAME", "DATATYPE", "SHAPE"),
        [
            (kind, printable(value.name), value.datatype, printable("[" + ", ".join(map(str, value.shape)) + "]"))
            for kind, values in (("input", found.inputs), ("output", found.outputs))
            for value in values
        ],
    )
    typer.echo()
    for fit in fits:
        _line(fit.engine, _sentence(fit))


def _sentence(fit: EngineFit) -> str:
    why = f" ({'; '.join(fit.reasons)})" if fit.reasons else ""
    if not fit.missing:
        return {"no": "cannot run it", "perhaps": "might run it", "probably": "probably runs it"}[fit.model] + why
    would = {"no": "could not run it", "perhaps": "might run it", "probably": "would probably run it"}[fit.model] + why
    return f"{would}; {'; '.join(fit.missing)}"
