"""`compile --tune`: measure settings in private appliances, and write the best ones that are surely better to model.toml.

What to try, what to measure and what to believe is `core.tuning`'s; here are processes, clock, words and files.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from appliance.cli.connection import Appliance
from appliance.cli.output import CommandError, Exit, note, print_json, print_table
from appliance.config import Config

if TYPE_CHECKING:
    from appliance.cli.trial import Trial
    from appliance.core.tuning import Candidate, Choice, Facts, Points, Round, Tuner
    from appliance.lifecycle.repository import ModelFolder

Tune = Annotated[bool, typer.Option("--tune", help="Find the settings that serve best on this box, by measuring.")]
Budget = Annotated[str, typer.Option(help="Tuning: how long it may take (90s, 5m, 1h).")]
Goal = Annotated[str, typer.Option(help="Tuning: throughput or latency.")]
Loads = Annotated[str, typer.Option(help="Tuning: the requests in flight to be good at.")]
Limit = Annotated[
    float, typer.Option(min=0, help="Tuning: the most that --percentile of the requests may take; 0: any.")
]
Percentile = Annotated[float, typer.Option(min=1, max=99.99, help="Tuning: which latency counts.")]
Rows = Annotated[int, typer.Option(min=0, help="Tuning: the most rows in a request; 0: as many as may come now.")]
Burning = Annotated[bool, typer.Option("--burning", help="Tuning: also try what burns CPU while it waits.")]

UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}
VARIANTS = 8


class TuneOptions(NamedTuple):
    """What was asked for, as typed."""

    budget: str
    goal: str
    concurrency: str
    limit_ms: float
    percentile: float
    rows: int
    burning: bool
    write: bool

    @property
    def budget_s(self) -> float:
        """The budget in seconds; CommandError for what is no time."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", self.budget.strip())
        if found is None or not float(found[1]):
            raise CommandError(Exit.USAGE, "USAGE", f"--budget {self.budget!r} is no time", "e.g. 90s, 5m, 1h")
        return float(found[1]) * UNITS_S[found[2]]

    @property
    def loads(self) -> tuple[int, ...]:
        """Requests in flight, ascending; CommandError for what are no numbers."""
        parts = self.concurrency.split(",")
        if not all(part.strip().isdigit() and 1 <= int(part) <= 256 for part in parts):
            message = f"--concurrency {self.concurrency!r} is no list of numbers from 1 to 256"
            raise CommandError(Exit.USAGE, "USAGE", message, "e.g. 1,16")
        return tuple(sorted({int(part) for part in parts}))


class Session:
    """One search: the appliances that run, and the time that is left."""

    def __init__(self, config: Config, folder: ModelFolder, version: int, options: TuneOptions) -> None:
        from appliance.lifecycle.compilation import engines_path

        self.config, self.folder, self.version, self.options = config, folder, version, options
        self.engines = engines_path(config)
        self.deadline = time.monotonic() + options.budget_s
        file = Path(config.repository.path) / folder.name / "model.toml"
        self.text = file.read_text() if file.exists() else ""
        self.requests: tuple[tuple[bytes, ...], ...] = ()
        self.trials: dict[Candidate, Trial] = {}
        self.stack = contextlib.ExitStack()

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self.deadline - time.monotonic()

    def start(self, candidate: Candidate) -> Trial:
        """An appliance with these settings; the one that runs, if there is one. TrialError if it does not serve.

        An engine whose verdict does not hold for these settings would not be taken, and the model as it is measured in its place:
        then it is verified first.
        """
        from appliance.cli.trial import TrialError
        from appliance.core.tuning import DEFAULT

        if candidate in self.trials:
            return self.trials[candidate]
        precision = changed_folder(self.folder, candidate).manifest.precision
        if not self._serves(candidate, precision):
            self.stop(candidate)
            passed, reason = verified(self, candidate)
            if not self._serves(candidate, precision) and candidate != DEFAULT:
                raise TrialError(f"its {precision} engine was not taken: {'it passed' if passed else reason}")
        return self.trials[candidate]

    def _serves(self, candidate: Candidate, precision: str) -> bool:
        """Start it; whether what serves is of that precision."""
        from appliance.building.orders import CONVERTED
        from appliance.cli.engines import merged_manifest
        from appliance.cli.trial import Trial

        text = merged_manifest(self.text, nested(candidate))
        trial = Trial(self.config, self.folder.name, self.version, text, self.engines)
        self.trials[candidate] = trial.__enter__()
        trial.metadata()
        served = trial.config()["parameters"].get("appliance.engine", {}).get("string_value", "")
        return precision not in CONVERTED or precision in served

    def stop(self, candidate: Candidate) -> None:
        """End its appliance."""
        if trial := self.trials.pop(candidate, None):
            trial.close()

    def close(self) -> None:
        """End them all."""
        for candidate in list(self.trials):
            self.stop(candidate)


def run_tune(
    config: Config, folder: ModelFolder, version: int, options: TuneOptions, url: str | None, *, as_json: bool
) -> bool:
    """Search, say what was found, keep it beside the engines, and write what was chosen; whether model.toml was changed."""
    from appliance.core.tuning import Goal as TuningGoal
    from appliance.core.tuning import TooShortError, Tuner, Wanted

    if options.goal not in ("throughput", "latency"):
        raise CommandError(Exit.USAGE, "USAGE", f"{options.goal!r} is no goal", "throughput or latency")
    goal: TuningGoal = "latency" if options.goal == "latency" else "throughput"
    number = version or max(folder.versions)
    if number not in folder.versions:
        raise CommandError(Exit.USAGE, "NO_VERSION", f"{folder.name} has no version {number}")
    session = Session(config, folder, number, options)
    wanted = Wanted(goal, options.limit_ms)
    tuner = Tuner(wanted, len(options.loads), options.budget_s)
    _warn_of_company(url)
    try:
        precisions, refused = build_precisions(session)
        with session_bar(session) as on_step:
            prepare(session, tuner, precisions, on_step)
        _drive(session, tuner)
    except TooShortError as error:
        hint = f"--budget {error.needed_s * 1.2 + 1:.0f}s, or fewer loads in --concurrency"
        raise CommandError(
            Exit.USAGE, "TOO_SHORT", f"{options.budget} is too little to tell settings apart", hint
        ) from error
    finally:
        session.close()
    choice = tuner.choice()
    written = bool(choice.within and choice.candidate.changes and options.write)
    document = keep(session, tuner, choice, refused, written=written)
    if written:
        _write(session, choice)
    _say(document, as_json=as_json)
    if not choice.within:
        raise typer.Exit(Exit.FAILED)
    return written


def _warn_of_company(url: str | None) -> None:
    """Another appliance on this box takes part of its time."""
    with contextlib.suppress(CommandError):
        appliance = Appliance(url)
        appliance.request("GET", "/v2/health/live", timeout_s=2)
        note(
            f"an appliance answers at {appliance.url}: what it does meanwhile disturbs the measurements (ratios less than others)"
        )


def nested(candidate: Candidate) -> dict[str, Any]:
    """Its changes as tables of model.toml."""
    found: dict[str, Any] = {}
    for key, value in candidate.changes:
        table, _, name = key.rpartition(".")
        (found.setdefault(table, {}) if table else found)[name] = value
    return found


def changed_folder(folder: ModelFolder, candidate: Candidate) -> ModelFolder:
    """The folder as its model.toml would make it."""
    import msgspec

    manifest = folder.manifest
    for key, value in nested(candidate).items():
        new = msgspec.structs.replace(getattr(manifest, key), **value) if isinstance(value, dict) else value
        manifest = msgspec.structs.replace(manifest, **{key: new})
    return msgspec.structs.replace(folder, manifest=manifest)


def build_precisions(session: Session) -> tuple[tuple[str, ...], dict[str, str]]:
    """The precisions that can be had and pass their verification here, and why the others do not."""
    from appliance.core.tuning import Candidate

    folder = session.folder
    if folder.manifest.engine == "loopback":
        return (), {}
    found, refused = [], {}
    if folder.manifest.precision != "as-is":
        found.append("as-is")
    for precision in ("int8",) if folder.manifest.device == "cpu" else ("fp16", "int8"):
        if precision == folder.manifest.precision:
            continue
        passed, reason = verified(session, Candidate((("precision", precision),)))
        if passed:
            found.append(precision)
        else:
            refused[precision] = reason
    return tuple(found), refused


def verified(session: Session, candidate: Candidate) -> tuple[bool, str]:
    """Whether the model with these settings answers as the reference does, and why not."""
    from appliance.cli.engines import compile_folder

    folder = changed_folder(session.folder, candidate)
    if folder.manifest.engine == "loopback":
        return True, ""
    try:
        _, report, _ = compile_folder(session.config, folder, session.version, force=False)
    except CommandError as error:
        return False, error.message
    return report.passed, "; ".join(report.failures)


def prepare(session: Session, tuner: Tuner, precisions: tuple[str, ...], on_step: Callable[[str], None]) -> None:
    """Measure the present settings, and with what they come to find what to try. CommandError if they do not serve."""
    from appliance.cli.trial import TrialError
    from appliance.core.tuning import DEFAULT, screened

    begun = time.monotonic()
    on_step("the present settings")
    try:
        trial = session.start(DEFAULT)
        started_s = time.monotonic() - begun
        session.requests = made_requests(session, trial)
        begun = time.monotonic()
        points = trial.measure(session.requests, session.options.loads, 0.3, session.options.percentile)
        facts = _facts(session, trial, precisions)
    except TrialError as error:
        raise CommandError(
            Exit.FAILED, "NOT_SERVED", f"{session.folder.name} does not serve as it is: {error}"
        ) from error
    tuner.record({DEFAULT: points}, time.monotonic() - begun + started_s, starting_s=started_s)
    tuner.screen(screened(session.folder.manifest, facts), session.left_s)


def _facts(session: Session, trial: Trial, precisions: tuple[str, ...]) -> Facts:
    from appliance.core.tuning import Facts

    rows = max(1, int(trial.config()["max_batch_size"]))
    return Facts(
        cores=len(os.sched_getaffinity(0)),
        threads=trial.threads(),
        max_rows=rows,
        precisions=precisions,
        places=_places(),
        rows=session.options.rows or rows,
        largest_load=max(session.options.loads),
        burning=session.options.burning,
    )


def _places() -> tuple[tuple[str, str], ...]:
    """GPU engines that this box can run, with their devices."""
    from appliance.engines import providers
    from appliance.lifecycle.compilation import tensorrt_flavour

    found = [("cuda", flavour)] if (flavour := tensorrt_flavour()) else []
    return (*found, *((("cuda", "onnxruntime"),) if not providers.missing("cuda") else ()))


def made_requests(session: Session, trial: Trial) -> tuple[tuple[bytes, ...], ...]:
    """Requests of one row: golden inputs, else the noise that the verification uses."""
    from appliance.building import verification
    from appliance.building.rows import row_count
    from appliance.building.runner import to_wire
    from appliance.cli.payloads import Input, zmq_frames
    from appliance.core.tensor import TensorSpec, datatype_of
    from appliance.engines.base import EngineTraits

    document, rows = trial.metadata(), int(trial.config()["max_batch_size"])
    specs = tuple(TensorSpec(s["name"], datatype_of(s["datatype"]), tuple(s["shape"])) for s in document["inputs"])
    traits = EngineTraits("", "", "", "cpu", specs, (), bool(rows), max(1, rows))
    manifest = session.folder.manifest
    golden = sorted((Path(session.config.repository.path) / session.folder.name / "golden").glob("*.npz"))
    try:
        feeds = [feed for file in golden for feed in verification.golden_feeds(file, traits)]
        feeds = feeds or verification.generate(traits, manifest.preprocessing, manifest.build.shapes, VARIANTS)
    except verification.VerificationError as error:
        raise CommandError(Exit.FAILED, "NO_INPUTS", f"{session.folder.name}: {error}") from error
    found = []
    for feed in feeds:
        count = row_count(feed) if rows else 1
        for row in range(count):
            inputs = []
            for spec in specs:
                array = feed[spec.name][row : row + 1] if rows else feed[spec.name]
                inputs.append(Input(spec.name, spec.datatype.value, array.shape, to_wire(array, spec).tobytes()))
            found.append(zmq_frames(session.folder.name, inputs))
    return tuple(found[:VARIANTS])


def _drive(session: Session, tuner: Tuner) -> None:
    """Do what the tuner asks for, until it has what it needs."""
    from appliance.core.tuning import Verify

    with contextlib.ExitStack() as stack:
        on_step = stack.enter_context(session_bar(session))
        while (step := tuner.next_round(session.left_s)) is not None:
            if isinstance(step, Verify):
                stack.close()  # a build has a bar of its own
                for candidate in step.candidates:
                    tuner.verified(candidate, *verified(session, candidate))
                on_step = stack.enter_context(session_bar(session))
                continue
            begun = time.monotonic()
            found = measured(session, step, on_step)
            tuner.record(found, time.monotonic() - begun)


def measured(session: Session, step: Round, on_step: Callable[[str], None]) -> dict[Candidate, Points | str]:
    """One round; a candidate that cannot be measured has its reason. What is not in the finals is ended afterwards."""
    from appliance.cli.trial import TrialError
    from appliance.core.tuning import DEFAULT

    found: dict[Candidate, Points | str] = {}
    for candidate in step.entries:
        on_step(f"{step.stage}: {candidate.name}")
        try:
            trial = session.start(candidate)
            options = session.options
            found[candidate] = trial.measure(session.requests, options.loads, step.seconds, options.percentile)
        except TrialError as error:
            if candidate == DEFAULT:
                raise CommandError(Exit.FAILED, "NOT_SERVED", f"the present settings: {error}") from error
            found[candidate] = str(error)
        if candidate != DEFAULT and (step.stage != "finals" or isinstance(found[candidate], str)):
            session.stop(candidate)
    for candidate in list(session.trials):
        if candidate not in step.entries and candidate != DEFAULT:
            session.stop(candidate)
    return found


@contextlib.contextmanager
def session_bar(session: Session) -> Iterator[Callable[[str], None]]:
    """A bar over the budget, with what is measured and the time left."""
    from appliance.cli.engines import progress_bar

    with progress_bar(f"{session.folder.name} tuning") as on_percent:

        def step(what: str) -> None:
            left = max(0, int(session.left_s))
            words = f"{what}, {left // 60}:{left % 60:02} left" if sys.stderr.isatty() else what
            on_percent(words, min(100.0, 100 - 100 * session.left_s / session.options.budget_s))

        yield step


def keep(session: Session, tuner: Tuner, choice: Choice, refused: dict[str, str], *, written: bool) -> dict[str, Any]:
    """The document of the search, kept with its picture beside the model's engines."""
    import msgspec

    from appliance.cli.tuning_page import page, picture
    from appliance.core.tuning import DEFAULT, judge, medians
    from appliance.host.durable import write_durably

    options, rows = session.options, []
    beside = tuner.trials[DEFAULT]
    for candidate, trial in tuner.trials.items():
        points = medians(trial)
        found = judge(trial, beside, tuner.goal, finals_only=bool(trial.finals))
        rows.append(
            {
                "name": candidate.name,
                "changes": dict(candidate.changes),
                "points": msgspec.to_builtins(points),
                "ratio": found.ratio if found.rounds else None,
                "at_least": found.low if found.rounds > 1 else None,
                "worst_load": found.worst if found.rounds else None,
                "rounds": found.rounds,
                "finalist": bool(trial.finals),
                "verified": trial.verified,
                "failure": trial.failure,
                "chosen": candidate == choice.candidate and choice.within,
            }
        )
    rows.sort(key=lambda row: (row["name"] != DEFAULT.name, not row["finalist"], -(row["ratio"] or 0)))
    place = session.engines / session.folder.name
    document = {
        "model": session.folder.name,
        "version": session.version,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "goal": options.goal,
        "loads": list(options.loads),
        "limit_ms": options.limit_ms,
        "percentile": options.percentile,
        "budget_s": options.budget_s,
        "cores": len(os.sched_getaffinity(0)),
        "chosen": choice.candidate.name if choice.within else None,
        "reason": choice.reason,
        "written": written,
        "not_built": refused,
        "not_measured": [candidate.name for candidate in tuner.unmeasured],
        "rows": rows,
        "page": str(place / "tuning.html"),
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_durably(place / "tuning.json", msgspec.json.format(msgspec.json.encode(document)))
        write_durably(place / "tuning.svg", picture(document).encode())
        write_durably(place / "tuning.html", page(document).encode())
    except OSError as error:
        note(f"table and picture cannot be kept: {error.strerror}")
    return document


def _write(session: Session, choice: Choice) -> None:
    from appliance.cli.engines import write_manifest

    day = datetime.datetime.now(datetime.UTC).date()
    loads = " and ".join(map(str, session.options.loads))
    remark = f"Tuned {day} by `appliance compile {session.folder.name} --tune`, {loads} in flight: {choice.reason}."
    write_manifest(session.config, session.folder.name, nested(choice.candidate), remark=remark)


def _say(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    tail = f"P{document['percentile']:g} MS"
    loads = "/".join(map(str, document["loads"]))
    print_table(
        ("SETTINGS", f"ITEMS/S AT {loads}", "P50 MS", tail, "RATIO", "AT LEAST", "ROUNDS", "VERIFIED", ""),
        [table_row(row) for row in document["rows"]],
    )
    for name, reason in document["not_built"].items():
        note(f"{name} was left out: {reason}")
    if document["not_measured"]:
        note(f"no time for: {', '.join(document['not_measured'])}; a larger --budget has it")
    note(f"{document['chosen'] or 'nothing is chosen'}: {document['reason']}")
    note("model.toml says so now" if document["written"] else "model.toml was left as it is")
    note(f"table and picture: {document['page']}")


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as people read it."""
    points = row["points"]
    state = {True: "yes", False: "no", None: ""}[row["verified"]]
    return (
        row["name"],
        " / ".join(f"{point['items_s']:,.0f}" for point in points),
        " / ".join(f"{point['p50_ms']:.3g}" for point in points),
        " / ".join(f"{point['tail_ms']:.3g}" for point in points),
        "" if row["ratio"] is None else f"{row['ratio']:.3f}",
        "" if row["at_least"] is None else f"{row['at_least']:.3f}",
        str(row["rounds"] or ""),
        state,
        "chosen" if row["chosen"] else row["failure"][:80],
    )
