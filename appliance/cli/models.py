"""`models list | show | load | unload`."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from appliance.cli.connection import Appliance, model_path
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, note, print_json, print_table
from appliance.config import find
from appliance.config import load as load_config
from appliance.lifecycle.compilation import engines_path

Name = Annotated[str, typer.Argument(help="The model's name: its folder in the repository.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    models = typer.Typer(no_args_is_help=True, help="The models: list, show, load, unload.")
    models.command("list")(list_models)
    models.command("show")(show)
    models.command("load")(load)
    models.command("unload")(unload)
    app.add_typer(models, name="models")


@command
def list_models(url: URL = None, as_json: JSON = False) -> None:
    """Every model in the repository and its state."""
    index = Appliance(url).post("/v2/repository/index")
    if as_json:
        print_json(index)
    else:
        print_table(
            ("MODEL", "VERSION", "STATE", "REASON"),
            [(entry["name"], entry["version"], entry["state"], entry["reason"]) for entry in index],
        )


@command
def show(name: Name, url: URL = None, as_json: JSON = False) -> None:
    """What a model takes and gives, and how it is run."""
    appliance = Appliance(url)
    document = appliance.get(model_path(name)) | {"config": appliance.get(model_path(name, "config"))}
    document["verification"] = _verification(appliance, name)
    if as_json:
        print_json(document)
        return
    config = document["config"]
    batch = config["max_batch_size"]
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    typer.echo(f"{name}  versions {', '.join(document['versions'])}  {document['platform']}")
    typer.echo(
        f"provider {parameters.get('appliance.provider', '?')}, {config['instance_group'][0]['count']} instance(s)"
    )
    if engine := parameters.get("appliance.engine"):
        typer.echo(f"engine {engine}, verified: {parameters['appliance.verification']}")
    if batch:
        typer.echo(
            f"batches up to {batch} rows; sizes that pay: {parameters.get('appliance.batch_sizes', 'not measured')}"
        )
    else:
        typer.echo(f"unbatched: {parameters.get('appliance.unbatched_reason', '')}")
    print_table(
        ("", "NAME", "DATATYPE", "SHAPE"),
        [
            (kind[:-1], tensor["name"], tensor["datatype"], tensor["shape"])
            for kind in ("inputs", "outputs")
            for tensor in document[kind]
        ],
    )
    if document["verification"] is not None:
        _say_verification(document["verification"])


def _verification(appliance: Appliance, name: str) -> dict[str, Any] | None:
    """What the gate found, with the page's place on this box; None where no report is kept."""
    try:
        record: dict[str, Any] = appliance.get(f"/v2/appliance/models/{quote(name, safe='')}/verification")
    except CommandError as error:
        if error.code is not Exit.NOT_READY:
            raise
        return None
    page = engines_path(load_config(find())) / name / record["key"] / "verification.html"
    return record | {"page": str(page) if page.is_file() else ""}


def _say_verification(record: dict[str, Any]) -> None:
    import msgspec

    from appliance.building.verification import Report
    from appliance.cli.engines import say_report

    if not record["serves"]:
        typer.echo(f"an engine was built and does not serve: {record['engine']}")
    try:
        found = msgspec.convert(record["report"], Report)
    except msgspec.ValidationError as error:
        raise CommandError(
            Exit.FAILED,
            "REPORT",
            f"the verification's report is of another version of the appliance: {error}",
            "make it anew: `appliance verify NAME`",
        ) from error
    say_report(found)
    if record["page"]:
        note(f"report: {record['page']}")


@command
def load(name: Name, url: URL = None, as_json: JSON = False) -> None:
    """Load a model, or load it anew from its folder; what serves now goes on until the new one is ready."""
    appliance = Appliance(url)
    appliance.post(f"/v2/repository/models/{quote(name, safe='')}/load")
    _done(appliance, name, f"{name} is loaded; try `appliance models show {name}`", as_json=as_json)


@command
def unload(name: Name, url: URL = None, as_json: JSON = False) -> None:
    """Answer what was accepted, then unload."""
    appliance = Appliance(url)
    appliance.post(f"/v2/repository/models/{quote(name, safe='')}/unload")
    _done(appliance, name, f"{name} is unloaded; `appliance models load {name}` brings it back", as_json=as_json)


def _done(appliance: Appliance, name: str, words: str, *, as_json: bool) -> None:
    if as_json:
        print_json([entry for entry in appliance.post("/v2/repository/index") if entry["name"] == name])
    else:
        note(words)
