"""`history`, `energy` and `audit`: what the recorder knows, as sparklines, tables, CSV or JSON."""

from __future__ import annotations

import csv
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, print_json, print_table
from appliance.cli.records import SINCE, ask, clock, moment

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_POINTS = 60
LEAST_HASH = 12
"""Digits of a hash that name an entry."""
MOST_NAMES = 64
"""Of one question; the appliance answers no more."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("history")(history)
    app.command("energy")(energy)
    audit = typer.Typer(no_args_is_help=True, help="What operators had done: verify, list.")
    audit.command("verify")(verify)
    audit.command("list")(list_actions)
    app.add_typer(audit, name="audit")


def sparkline(values: Sequence[float | None]) -> str:
    """One block a value, low to high; a gap is a space."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    top = len(BLOCKS) - 1
    return "".join(" " if value is None else BLOCKS[round((value - low) / span * top)] for value in values)


@command
def history(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Readings: gpu.0.temperature, or gpu.temperature for every GPU's; none: which there are."),
    ] = None,
    since: SINCE = "1h",
    step: Annotated[str, typer.Option(help="The least time between points: 1min, 15min, 1h.")] = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print time, name, min, mean, max as CSV.")] = False,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """How readings went: a sparkline with minimum, mean and maximum, or CSV, or JSON."""
    begin = moment(since)
    recorded = ask(url, "/v2/appliance/history", {}, lambda reader: {"series": reader.series()})
    if not names:
        print_json(recorded) if as_json else typer.echo("\n".join(recorded["series"]))
        return
    wanted = matching(names, recorded["series"])
    step_s = moment("0s") - moment(step) if step else 0.0
    points = 2_000 if as_csv or as_json else SPARKLINE_POINTS
    step_s = max(0.0, float(round(step_s)))
    query = {"names": ",".join(wanted), "since": begin, "step": step_s, "points": points}
    found = ask(
        url,
        "/v2/appliance/history",
        query,
        lambda reader: reader.history(wanted, since=begin, step_s=step_s, points=points),
    )
    if as_json:
        print_json(found)
    elif as_csv:
        _csv(found)
    else:
        print_table(
            ("READING", "MIN", "MEAN", "MAX", f"EVERY {found['step_s']:g} S"), [_row(name, found) for name in wanted]
        )


def matching(asked: Sequence[str], recorded: Sequence[str]) -> list[str]:
    """The recorded names that are meant: the name itself, or with what it leaves out ("gpu.temperature" is "gpu.0.temperature"
    and "gpu.1.temperature"). One that there could be and is not recorded stays as it is; CommandError for one that means none.
    """
    from appliance.core.quantities import QUANTITIES

    patterns = [(name, _pattern(name)) for name in recorded]
    found: dict[str, None] = {}
    for name in asked:
        meant = [name] if name in recorded else [other for other, pattern in patterns if pattern.fullmatch(name)]
        could_be = not recorded or any(_shortened(template.split(".")).fullmatch(name) for template in QUANTITIES)
        if not meant and not could_be:
            near = difflib.get_close_matches(name, recorded, n=4, cutoff=0.5)
            hint = f"near it: {', '.join(near)}; " if near else ""
            raise CommandError(
                Exit.FAILED,
                "NO_SUCH_READING",
                f"there is no reading by the name of {name}",
                f"{hint}`appliance history` lists all {len(recorded)} that were recorded",
            )
        found |= dict.fromkeys(meant or [name])
    if len(found) > MOST_NAMES:
        raise CommandError(
            Exit.USAGE, "USAGE", f"that means {len(found)} readings, {MOST_NAMES} go at a time", "name fewer of them"
        )
    return list(found)


def _pattern(name: str) -> re.Pattern[str]:
    """What may be asked for to mean that reading: its name, with or without each label in it (a GPU's number, a sensor)."""
    from appliance.core.quantities import quantity_of

    row = quantity_of(name)
    template = row[0].template if row else re.sub(r"\.\d+(?=\.|$)", ".{number}", name)
    pairs = zip(template.split("."), name.split("."), strict=True)
    return _shortened([f"{{{part}}}" if kind.startswith("{") else part for kind, part in pairs], exact=True)


def _shortened(parts: Sequence[str], *, exact: bool = False) -> re.Pattern[str]:
    """Parts in braces may be left out; unless they are `exact`, they may be anything."""
    labels = {part: re.escape(part[1:-1]) if exact else r"[^.]+" for part in parts if part.startswith("{")}
    texts = [rf"(?:\.{labels[part]})?" if part in labels else rf"\.{re.escape(part)}" for part in parts]
    return re.compile("".join(texts).removeprefix(r"\."))


def _row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    columns = found["series"][name]
    means = [value for value in columns["mean"] if value is not None]
    if not means:
        return (name, "", "", "", "nothing recorded")
    lows = (value for value in columns["min"] if value is not None)
    highs = (value for value in columns["max"] if value is not None)
    return (name, number(min(lows)), number(sum(means) / len(means)), number(max(highs)), sparkline(columns["mean"]))


def number(value: float) -> str:
    """Four digits that count, and an SI prefix for what is large: 61.21M rather than 6.12106e+07."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{prefix}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _csv(found: dict[str, Any]) -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(("time", "name", "min", "mean", "max"))
    for name, columns in found["series"].items():
        for wall, *numbers in zip(found["times"], columns["min"], columns["mean"], columns["max"], strict=True):
            if numbers[0] is not None:
                writer.writerow((clock(wall, "T"), name, *numbers))


@command
def energy(
    since: SINCE = "7d",
    price: Annotated[float, typer.Option(min=0, help="Of a kWh, in your currency.")] = 0.0,
    gco2: Annotated[float, typer.Option(min=0, help="Grams of CO2 of a kWh.")] = 0.0,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """kWh, cost, CO2 and joules per 1,000 inferences by device and model; idle and unattributed are shown apart.

    The last line is what the box took: what is within another device (a Jetson's GPU in its board) counts once.
    """
    import msgspec

    from appliance.core.energy import EnergySum, box_total, price_list

    begin = moment(since)
    query = {"since": begin}
    found = ask(
        url,
        "/v2/appliance/energy",
        query,
        lambda reader: {"energy": msgspec.to_builtins(reader.energy(since=begin))},
    )
    sums = msgspec.convert(found["energy"], list[EnergySum])
    rows = price_list(sums, price, gco2)
    [box] = price_list([EnergySum("box", "", False, "total", "", box_total(sums), 0.0, 0)], price, gco2)
    if as_json:
        total = {key: box[key] for key in ("joules", "kwh", "cost", "gco2")}
        print_json({"since": begin, "total": total, "energy": rows})
        return
    if not rows:
        typer.echo("no energy was recorded in that time: this box has no counter that we can read")
        return
    print_table(
        ("DEVICE", "SOURCE", "PART", "KWH", "COST", "G CO2", "ITEMS", "J PER 1000"),
        [
            (
                f"{row['device']}{' in ' + str(row['within']) if row['within'] else ''}",
                f"{row['source']}{' (estimate)' if row['estimated'] else ''}",
                row["model"] or row["kind"],
                f"{row['kwh']:.6f}",
                f"{row['cost']:.4f}",
                f"{row['gco2']:.1f}",
                row["items"] or "",
                "" if row["joules_per_1000"] is None else f"{row['joules_per_1000']:.3g}",
            )
            for row in (*rows, box)
        ],
    )


@command
def verify(
    accept: Annotated[
        list[str] | None,
        typer.Option(help="The hash of an entry by which the chain was begun anew, when you have looked into why."),
    ] = None,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Whether the chain of actions holds: nothing changed, removed or inserted. Exit status 1 if it does not, or if a damaged
    record was put aside with the actions before: the new chain cannot speak for those.
    """
    found = ask(url, "/v2/appliance/audit", {"limit": 1}, lambda reader: reader.audit(limit=1))
    verdict, anew = found["verdict"], found.get("begun_anew", [])
    accepted = [one for one in accept or () if len(one) >= LEAST_HASH]
    open_ = [entry for entry in anew if not any(entry["hash"].startswith(one) for one in accepted)]
    damaged = [] if anew and not open_ else found.get("damaged_files", [])
    if as_json:
        print_json({**verdict, "begun_anew": anew, "damaged_files": found.get("damaged_files", [])})
    elif verdict["ok"]:
        typer.echo(f"{verdict['entries']} actions, the chain holds; its head is {verdict['head']}")
        for entry in anew:
            typer.echo(
                f"begun anew at {clock(entry['time'])}: {entry['fields'].get('reason', '')}; the last hash before: "
                f"{entry['fields'].get('last_hash', '')}"
            )
    if verdict["ok"] and not open_ and not damaged:
        return
    if as_json:
        raise typer.Exit(int(Exit.FAILED))
    if verdict["ok"]:
        begun = f"begun anew at {clock(open_[-1]['time'])}" if open_ else "perhaps begun anew"
        accepting = "".join(f" --accept {entry['hash'][:LEAST_HASH]}" for entry in open_)
        then = f"then `appliance audit verify{accepting}`" if open_ else "then put them elsewhere"
        raise CommandError(
            Exit.FAILED,
            "BEGUN_ANEW",
            f"{begun}: {len(damaged)} damaged file{'' if len(damaged) == 1 else 's'} beside it; "
            "what operators did before is not in this chain",
            f"keep a copy of them, compare the last hash with those in the log (audit.action), {then}",
        )
    raise CommandError(
        Exit.FAILED,
        "BROKEN_CHAIN",
        f"the chain of actions is broken at entry {verdict['broken_seq']}: {verdict['reason']}",
        "keep the file as it is, and compare the heads in the log (audit.action)",
    )


@command
def list_actions(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 50,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """The newest actions, oldest first."""
    found = ask(url, "/v2/appliance/audit", {"limit": limit}, lambda reader: reader.audit(limit=limit))
    if as_json:
        print_json(found)
        return
    print_table(
        ("NUMBER", "TIME", "ACTOR", "ACTION", "ON"),
        [
            (
                entry["seq"],
                clock(entry["time"]),
                entry["actor"],
                entry["action"],
                " ".join(f"{key}={value}" for key, value in entry["fields"].items()),
            )
            for entry in found["entries"]
        ],
    )
