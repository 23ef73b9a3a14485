"""`compile`, `verify` and `engines`: make engines for this box, check them, and look at what is kept.

These work on the model repository itself, with or without a running appliance; one that runs is told when there is a new engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import quote

import typer

from appliance.cli.connection import Appliance
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, note, print_json, print_table
from appliance.cli.owner import become_owner
from appliance.cli.tune import Budget, Burning, Goal, Limit, Loads, Percentile, Rows, Tune, TuneOptions, run_tune
from appliance.config import Config, find, load

if TYPE_CHECKING:
    from appliance.building.orders import Order, Outcome, Result, Target
    from appliance.building.verification import Report
    from appliance.lifecycle.repository import ModelFolder

PRECISIONS = ("as-is", "fp32", "fp16", "bf16", "int8")
ENGINES = ("onnxruntime", "tensorrt", "tensorrt_rtx")

Name = Annotated[str, typer.Argument(help="The model's name: its folder in the repository.")]
Repository = Annotated[
    Path | None,
    typer.Option("--repository", "-r", help="The model repository; else the configuration's.", show_default=False),
]
Version = Annotated[int, typer.Option("--model-version", help="Which version; 0: the newest.", min=0)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("compile")(compile_model)
    app.command("verify")(verify)
    engines = typer.Typer(no_args_is_help=True, help="The engines built on this box: list, prune.")
    engines.command("list")(list_engines)
    engines.command("prune")(prune)
    app.add_typer(engines, name="engines")


@command
def compile_model(
    name: Name,
    precision: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRECISIONS)}; else the model's own.", show_default=False)
    ] = "",
    engine: Annotated[
        str, typer.Option(help=f"One of {', '.join(ENGINES)}; else the fastest here.", show_default=False)
    ] = "",
    version: Version = 0,
    repository: Repository = None,
    force: Annotated[bool, typer.Option("--force", help="Build anew even if an engine is kept.")] = False,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="Write a chosen precision or engine that passed to model.toml.")
    ] = True,
    tell: Annotated[
        bool, typer.Option("--load/--no-load", help="Have a running appliance switch to the engine.")
    ] = True,
    tune: Tune = False,
    budget: Budget = "5m",
    goal: Goal = "throughput",
    concurrency: Loads = "1,16",
    latency_limit_ms: Limit = 0.0,
    percentile: Percentile = 99.0,
    rows: Rows = 0,
    burning: Burning = False,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Turn a model into an engine for this box, and check that it answers as the model does; only then may it serve.

    With --tune, find the settings that serve it best on this box, by measuring.
    """
    config = _config(repository)
    folder = model_folder(config, name)
    if tune:
        if precision or engine:
            raise CommandError(Exit.USAGE, "USAGE", "--tune chooses precision and engine itself: leave them out")
        options = TuneOptions(budget, goal, concurrency, latency_limit_ms, percentile, rows, burning, write)
        written = run_tune(config, folder, version, options, url, as_json=as_json)
        if written and tell and (words := _tell(config, url, name).words):
            note(words)
        return
    folder, changed = chosen(folder, precision, engine)
    outcome, report, place = compile_folder(config, folder, version, force=force)
    if not as_json or not report.passed:
        # what was found stands, whatever becomes of the rest
        _say(outcome, report, as_json=as_json, place=place)
    if not report.passed:
        raise typer.Exit(Exit.FAILED)
    if changed and write:
        write_manifest(config, name, changed)
        note(f"model.toml of {name} now says " + ", ".join(f"{key} = {value!r}" for key, value in changed.items()))
    # a choice that is not in model.toml is nothing that an appliance could load
    told = _tell(config, url, name) if tell and (write or not changed) else Told()
    if as_json:
        _say(outcome, report, as_json=True, told=told, place=place)
    elif told.words:
        note(told.words)


@command
def verify(
    name: Name,
    version: Version = 0,
    repository: Repository = None,
    as_json: JSON = False,
) -> None:
    """Hold what serves, or would serve, against the reference: errors, the task's metrics, rows alone and in batches."""
    from appliance.building.orders import CheckOrder

    config = _config(repository)
    folder = model_folder(config, name)
    wanted = _target(config, folder, version)
    kept = _kept(wanted)
    if wanted.engine != "onnxruntime" or wanted.label != "onnxruntime":
        if kept is None:
            raise CommandError(
                Exit.FAILED, "NOT_BUILT", f"no {wanted.label} engine of {name} is kept", f"appliance compile {name}"
            )
        result = run_job(CheckOrder(wanted, kept.digest), config, wanted)
    else:
        result = run_job(CheckOrder(wanted, ""), config, wanted)
    report = _report(result)
    _say(result.outcome, report, as_json=as_json, place=result.kept)
    if not report.passed:
        raise typer.Exit(Exit.FAILED)


@command
def list_engines(repository: Repository = None, as_json: JSON = False) -> None:
    """Every engine that is kept, with its verdict."""
    from appliance.building.store import EngineStore
    from appliance.lifecycle.compilation import engines_path

    entries = EngineStore(engines_path(_config(repository))).entries()
    if as_json:
        import msgspec

        print_json(
            [
                {"model": entry.model, "digest": entry.digest, "folder": str(entry.folder), "bytes": entry.nbytes}
                | msgspec.to_builtins(entry.sidecar)
                for entry in entries
            ]
        )
        return
    print_table(
        ("MODEL", "ENGINE", "KEY", "MB", "SECONDS", "VERIFIED", ""),
        [
            (
                entry.model,
                entry.sidecar.label,
                entry.digest[:12],
                f"{entry.nbytes / 1e6:.1f}",
                f"{entry.sidecar.seconds:.1f}",
                entry.sidecar.verified or "not yet",
                (entry.sidecar.reason or entry.sidecar.summary)[:100],
            )
            for entry in entries
        ],
    )


@command
def prune(
    repository: Repository = None,
    max_size_mb: Annotated[int, typer.Option(min=0, help="Keep at most this much (2**20 bytes); 0: nothing.")] = 0,
    as_json: JSON = False,
) -> None:
    """Remove damaged engines, and the least recently used beyond a size. What is wanted again is built again."""
    from appliance.building.store import EngineStore
    from appliance.lifecycle.compilation import engines_path

    removed = EngineStore(engines_path(_config(repository))).prune(max_size_mb << 20)
    if as_json:
        print_json(removed)
    else:
        note(f"{len(removed)} engine(s) removed")


def _config(repository: Path | None) -> Config:
    """The configuration; from here on root is the user whose engines they are."""
    from appliance.lifecycle.compilation import engines_path

    config = load(find(), overrides=[f'repository.path="{repository}"'] if repository is not None else [])
    become_owner(engines_path(config))
    return config


def model_folder(config: Config, name: str) -> ModelFolder:
    """A model of the repository; CommandError if it is not there or cannot be read."""
    from appliance.core.request import ModelName
    from appliance.lifecycle.repository import Repository as Models

    place = Path(config.repository.path)
    folder = Models(place).read(ModelName(name))
    if folder is None:
        raise CommandError(Exit.USAGE, "NO_MODEL", f"{place} has no model folder {name!r}", "see `ls` there")
    problem = folder.problem or "; ".join(folder.broken.values())
    if not folder.versions:
        raise CommandError(Exit.FAILED, "BAD_MODEL", f"{name}: {problem}")
    return folder


def chosen(folder: ModelFolder, precision: str, engine: str) -> tuple[ModelFolder, dict[str, str]]:
    """The folder with another precision or engine, and what is different from its model.toml. CommandError for unknown words."""
    import msgspec

    changed = {}
    for key, value, known in (("precision", precision, PRECISIONS), ("engine", engine, ENGINES)):
        if value and value not in known:
            raise CommandError(Exit.USAGE, "USAGE", f"{value!r} is no {key}", f"one of {', '.join(known)}")
        if value and value != getattr(folder.manifest, key):
            changed[key] = value
    if changed.get("engine", "onnxruntime") != "onnxruntime" and folder.manifest.device == "cpu":
        changed["device"] = "cuda"
    return msgspec.structs.replace(folder, manifest=msgspec.structs.replace(folder.manifest, **changed)), changed


def _target(config: Config, folder: ModelFolder, version: int) -> Target:
    """What to build or check; "onnxruntime" as it is where nothing is to be built."""
    from appliance.building.orders import DeviceFacts, ProbeOrder, wanted_engine
    from appliance.lifecycle.compilation import device_index, engines_path, target, tensorrt_flavour

    number = version or max(folder.versions)
    if number not in folder.versions:
        known = ", ".join(map(str, sorted(folder.versions)))
        raise CommandError(Exit.USAGE, "NO_VERSION", f"{folder.name} has no version {number}; it has {known}")
    engine = wanted_engine(folder.manifest, tensorrt=tensorrt_flavour()) or "onnxruntime"
    wanted = target(engines_path(config), folder, folder.versions[number], engine, DeviceFacts())
    if engine == "onnxruntime":
        return wanted
    import msgspec

    result = run_job(ProbeOrder(device_index(folder.manifest)), config, wanted)
    assert result.device is not None
    return msgspec.structs.replace(wanted, device=result.device)


def compile_folder(
    config: Config, folder: ModelFolder, version: int, *, force: bool
) -> tuple[Outcome | None, Report, str]:
    """Build and verify, or find what is kept: outcome, report, and the folder where the report is kept.

    No outcome for a model that serves as it is. CommandError: it cannot be built.
    """
    from appliance.building.orders import BuildOrder, CheckOrder

    wanted = _target(config, folder, version)
    if wanted.label == "onnxruntime":
        note(f"{folder.name} runs on ONNX Runtime as it is: nothing to build; its answers are checked")
        result = run_job(CheckOrder(wanted, ""), config, wanted)
        return None, _report(result), result.kept
    built = run_job(BuildOrder(wanted, force), config, wanted).outcome
    assert built is not None
    checked = run_job(CheckOrder(wanted, built.digest), config, wanted)
    assert checked.outcome is not None
    import msgspec

    return msgspec.structs.replace(checked.outcome, built=built.built), _report(checked), checked.outcome.folder


def _kept(wanted: Target) -> Outcome | None:
    from appliance.building import keys
    from appliance.building.orders import BuildError

    try:
        return keys.find(wanted)
    except BuildError as error:
        raise CommandError(Exit.FAILED, "STORE", str(error)) from error


def _report(result: Result) -> Report:
    import msgspec

    from appliance.building.verification import Report

    return msgspec.json.decode(result.report, type=Report)


def run_job(order: Order, config: Config, wanted: Target) -> Result:
    """Run a build process with a bar on a terminal; CommandError with its reason if it fails."""
    from appliance.building import jobs
    from appliance.building.orders import BuildError

    with progress_bar(f"{wanted.model} {wanted.label}") as on_percent:
        try:
            return asyncio.run(
                jobs.run(
                    order,
                    on_percent,
                    time_budget_s=wanted.manifest.build.time_budget_s,
                    memory_limit_mb=config.engines.memory_limit_mb,
                    sandbox=config.workers.sandbox,
                )
            )
        except BuildError as error:
            raise CommandError(Exit.FAILED, "BUILD", f"{wanted.model}: {error}", "docs/compiling.md") from error


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal's standard error; elsewhere a line for each new phase."""
    if not sys.stderr.isatty():
        last = ""

        def say(phase: str, _percent: float) -> None:
            nonlocal last
            if phase != last:
                note(f"{title}: {phase}")
            last = phase

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.fields[title]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[phase]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=100, title=title, phase="")
        yield lambda phase, percent: bar.update(task, completed=percent, phase=phase)


def write_manifest(config: Config, name: str, changed: dict[str, Any], *, remark: str = "") -> None:
    """Change keys of a model.toml (tables as nested dictionaries), leaving comments and order as they are."""
    from appliance.host.durable import write_durably

    file = Path(config.repository.path) / name / "model.toml"
    text = merged_manifest(file.read_text() if file.exists() else "", changed)
    if remark:
        # a remark of the same kind that an earlier run left is replaced
        kept = [line for line in text.splitlines(keepends=True) if not line.startswith(f"# {remark.split()[0]} ")]
        text = f"# {remark}\n{''.join(kept)}"
    try:
        write_durably(file, text.encode())
    except OSError as error:
        raise CommandError(
            Exit.FAILED,
            "READ_ONLY",
            f"{file} cannot be written: {error.strerror}",
            "write " + ", ".join(f"{key} = {value!r}" for key, value in changed.items()) + " there yourself",
        ) from error


def merged_manifest(text: str, changed: dict[str, Any]) -> str:
    """The text of a model.toml with these keys changed."""
    import tomlkit

    document = tomlkit.parse(text)
    _merge(document, changed)
    return tomlkit.dumps(document)


def _merge(document: Any, changed: dict[str, Any]) -> None:
    import tomlkit

    fresh = {}
    for key, value in changed.items():
        if isinstance(value, dict):
            if key not in document:
                document[key] = tomlkit.table()
            _merge(document[key], value)
        elif key in document:
            document[key] = value
        else:
            fresh[key] = value
    for key, value in fresh.items():
        _insert(document, key, value)


def _insert(document: Any, key: str, value: Any) -> None:
    """Before the first table: a plain key after it would belong to it."""
    import tomlkit

    tables = [name for name, item in document.items() if isinstance(item, dict)]
    if not tables or not isinstance(document, tomlkit.TOMLDocument):
        document.add(key, value)
        return
    rest = {name: document.pop(name) for name in tables}
    document.add(key, value)
    for name, item in rest.items():
        document.add(name, item)


class Told(NamedTuple):
    """What came of telling a running appliance: whether it has loaded the model, and that in words; empty if nobody was told."""

    loaded: bool = False
    words: str = ""


def _tell(config: Config, url: str | None, name: str) -> Told:
    """Have a running appliance load the model anew, if it serves this repository."""
    from appliance.lifecycle.repository import Repository as Models

    mine = Models(Path(config.repository.path)).identity
    try:
        appliance = Appliance(url)
        if not mine or appliance.get("/v2/appliance/status").get("repository") != mine:
            return Told(words="a running appliance was not told: it serves another repository, or is an older release")
        appliance.post(f"/v2/repository/models/{quote(name, safe='')}/load")
    except CommandError as error:
        if error.code is Exit.UNREACHABLE:
            return Told()
        return Told(words=f"the running appliance has not loaded it: {error.message}")
    return Told(loaded=True, words="the running appliance has loaded it")


def _say(outcome: Outcome | None, report: Report, *, as_json: bool, told: Told | None = None, place: str = "") -> None:
    """`place`: where the report on a model as it is was kept."""
    import msgspec

    if as_json:
        told = told or Told()
        document = {
            "engine": msgspec.to_builtins(outcome),
            "report": msgspec.to_builtins(report),
            "loaded": told.loaded,
        }
        words = {} if told.loaded or not told.words else {"not_loaded": told.words}
        print_json(document | words | ({"kept": place} if outcome is None else {}))
        return
    say_report(report)
    if outcome is not None:
        state = f"built in {outcome.seconds:.1f} s" if outcome.built else "kept"
        note(f"{outcome.label}: {state}; report: {Path(outcome.folder, 'verification.html')}")
    elif place:
        note(f"report: {Path(place, 'verification.html')}")
    else:
        note("the report could not be kept beside the engines: may you write there?")


def say_report(report: Report) -> None:
    """Errors by output, what both took, the metric of both, and the verdict."""
    if report.outputs:
        _say_numbers(report)
    for failure in report.failures:
        note(f"failed: {failure}")
    verdict = "passed: it may serve" if report.passed else "failed: it does not serve"
    typer.echo(f"{report.label} of {report.model} {verdict} ({report.rows} rows, {report.inputs})")


def _say_numbers(report: Report) -> None:
    from appliance.building.comparison import shown

    print_table(
        ("OUTPUT", "MAX ABS", "MEAN ABS", "MAX REL", "COSINE", "UNEQUAL", ""),
        [
            (
                output.name,
                *(
                    ("", "", "", "", "")
                    if output.problem
                    else (
                        shown(output.max_absolute, ".3g"),
                        shown(output.mean_absolute, ".3g"),
                        shown(output.max_relative, ".3g"),
                        f"{output.cosine:.6f}",
                        f"{output.mismatch:.2%}",
                    )
                ),
                output.problem,
            )
            for output in report.outputs
        ],
    )
    rows = [
        ("reference", report.reference_provider, f"{report.reference_s * 1000:.3f}", *_shares(report.metric_reference))
    ]
    rows.append(
        (report.label, report.candidate_provider, f"{report.candidate_s * 1000:.3f}", *_shares(report.metric_candidate))
    )
    print_table(("", "PROVIDER", "MS A ROW", "METRIC"), rows)


def _shares(metric: Any) -> tuple[str, ...]:
    from appliance.building.comparison import Classification, Regression, shown

    if isinstance(metric, Classification):
        undecided = f", {metric.undecided} NaN" if metric.undecided else ""
        return (f"accuracy {metric.accuracy:.4f}, F1 {metric.f1:.4f} ({metric.samples} samples{undecided})",)
    if isinstance(metric, Regression):
        return (f"MSE {shown(metric.mse, '.4g')}, MAE {shown(metric.mae, '.4g')} ({metric.samples} samples)",)
    return ("",)
