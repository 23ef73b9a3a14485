"""`check`: one line and an exit code for Nagios, Icinga and whoever speaks their plugin protocol.

Codes and performance data as in the Monitoring Plugins Development Guidelines: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN;
`'label'=value[unit];warn;crit;min;max` after a bar. Values are digits, a point and a sign; units are none, s, us, ms, %, B (and
its multiples) or c, so degrees and watts have none; U is a value that is not known.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperCommand

from appliance.cli.connection import Appliance
from appliance.cli.options import JSON, URL
from appliance.cli.output import CommandError, Exit, print_json
from appliance.config import ConfigError

UNITS = ("s", "%", "B")
"""Of our quantities, those that the format allows."""
READINGS = (".temperature", ".power", ".memory.used", ".memory.available")


class Severity(IntEnum):
    """The protocol's exit codes."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


class Limits(msgspec.Struct, frozen=True):
    """What is still well; 0 does not look."""

    p99_warning_ms: float = 0.0
    p99_critical_ms: float = 0.0


class Verdict(msgspec.Struct, frozen=True):
    """What `check` prints: the worst thing found decides."""

    severity: str
    text: str
    performance: str


class PluginCommand(TyperCommand):
    """Its usage errors are UNKNOWN: their usual exit status, 2, is CRITICAL to a monitor."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            # typer keeps the class of usage errors to itself; they are those that end with this status
            if getattr(error, "exit_code", None) == Exit.USAGE:
                error.exit_code = int(Severity.UNKNOWN)  # type: ignore[attr-defined]  # it has it: see above
            raise


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check", cls=PluginCommand)(check)


def check(
    p99_warning_ms: Annotated[
        float, typer.Option(min=0, help="Warn when a model's p99 is above; 0: do not look.")
    ] = 0.0,
    p99_critical_ms: Annotated[float, typer.Option(min=0, help="Critical above; 0: do not look.")] = 0.0,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Is it well? For monitoring: exit status 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN, one line with performance data."""
    try:
        verdict = judge(Appliance(url).get("/v2/appliance/status"), Limits(p99_warning_ms, p99_critical_ms))
    except CommandError as error:
        # nobody answers: for a monitor that is the worst case, not an unknown one; a question that is wrong tells nothing
        severity = Severity.UNKNOWN if error.code in (Exit.USAGE, Exit.CONFIG) else Severity.CRITICAL
        verdict = Verdict(severity.name, " ".join(error.message.split()), "")
    except ConfigError as error:
        verdict = Verdict("UNKNOWN", f"the configuration cannot be used: {' '.join(str(error).split())}", "")
    if as_json:
        print_json(msgspec.to_builtins(verdict))
    else:
        performance = f" | {verdict.performance}" if verdict.performance else ""
        typer.echo(f"APPLIANCE {verdict.severity}: {verdict.text}{performance}")
    raise typer.Exit(int(Severity[verdict.severity]))


def judge(snapshot: dict[str, Any], limits: Limits) -> Verdict:
    """The verdict on a status document."""
    found: list[tuple[Severity, str]] = []
    status = snapshot["status"]
    if status["draining"]:
        found.append((Severity.WARNING, "it is shutting down"))
    for model in snapshot["models"]:
        found += _model(model, limits)
    if not status["ready"] and not status["draining"]:
        found.append((Severity.CRITICAL, "a model that should answer does not"))
    level = (snapshot.get("governor") or {}).get("level", "NOMINAL")
    if level != "NOMINAL":
        severity = Severity.WARNING if level == "WARM" else Severity.CRITICAL
        found.append((severity, f"{level}: {snapshot['governor']['reason']}"))
    if problem := (snapshot.get("recorder") or {}).get("problem"):
        found.append((Severity.WARNING, f"the flight recorder does not record: {problem}"))
    for finding in snapshot.get("findings", ()):
        found.append((Severity.CRITICAL if finding["severity"] == "error" else Severity.WARNING, finding["text"]))
    worst = max((severity for severity, _ in found), default=Severity.OK)
    text = "; ".join(text for severity, text in sorted(found, reverse=True)) or status["line"]
    # a second line would be taken for more output, and what is behind a bar for data
    text = " ".join(text.replace("|", "/").split())
    return Verdict(worst.name, text, " ".join(_performance(snapshot, limits)))


def _model(model: dict[str, Any], limits: Limits) -> list[tuple[Severity, str]]:
    # a folder that is wrong has none
    name = f"{model['name']} version {model['version']}" if model["version"] else str(model["name"])
    if model["detail"] == "FAILED":
        return [(Severity.CRITICAL, f"{name} does not serve: {model['reason']}")]
    p99_ms = model["p99_us"] / 1000
    for limit, severity in ((limits.p99_critical_ms, Severity.CRITICAL), (limits.p99_warning_ms, Severity.WARNING)):
        if limit and p99_ms > limit:
            return [(severity, f"{name} has a p99 of {_digits(p99_ms)} ms, {_digits(limit)} ms are allowed")]
    return []


def _performance(snapshot: dict[str, Any], limits: Limits) -> list[str]:
    from appliance.core.quantities import quantity_of

    warn, crit = (_digits(limit) if limit else "" for limit in (limits.p99_warning_ms, limits.p99_critical_ms))
    found = [f"requests_per_s={_digits(snapshot['status']['requests_per_s'])};;;0"]
    for model in snapshot["models"]:
        # who has answered nobody of late has no percentile, rather than one of 0
        value = f"{_digits(model['p99_us'] / 1000)}ms" if model["p99_us"] else "U"
        found.append(f"{_label(model['name'], ':', model['version'], '_p99')}={value};{warn};{crit};0")
    for name, value in sorted((snapshot.get("readings") or {}).items()):
        if value is not None and math.isfinite(value) and name.endswith(READINGS):
            row = quantity_of(name)
            unit = row[0].unit if row and row[0].unit in UNITS else ""
            found.append(f"{_label(name)}={_digits(value)}{unit}")
    return found


def _label(*parts: str) -> str:
    name = "".join(parts).replace("=", "_").replace("'", "''")
    return f"'{name}'"


def _digits(value: float) -> str:
    """Three decimals at most, and never an exponent."""
    text = f"{value:.3f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
