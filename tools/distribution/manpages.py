"""Manual pages and shell completions from the command line itself, so that they say what the program does.

Pages are man(7) roff: appliance(1) with the overview, and one page for each command, a group's commands on one page.
Values in, text out; `build_deb.py` writes the files.
"""

from __future__ import annotations

import inspect
from datetime import UTC, datetime
from typing import Any

import typer.main
from typer._completion_shared import get_completion_script

from appliance.cli.main import app

PROGRAM = "appliance"
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/appliance",
    "zsh": "usr/share/zsh/vendor-completions/_appliance",
    "fish": "usr/share/fish/vendor_completions.d/appliance.fish",
}
"""Where each shell looks for what a package brings."""

EXIT_STATUS = (
    ("0", "It worked."),
    ("1", "It failed; the message says why and what to do."),
    ("2", "The command line cannot be understood."),
    ("3", "No appliance answers."),
    ("4", "The appliance, or the model, is not ready."),
    ("7", "No answer in time."),
    ("78", "The configuration cannot be used."),
)

FILES = (
    ("/etc/appliance/appliance.toml", "The configuration."),
    ("/etc/appliance/keys/*.pub", "Keys whose offline bundles are trusted."),
    ("/var/lib/appliance/models", "The models: one folder each, with a folder for each version."),
    ("/var/lib/appliance/engines", "Engines built on this box; they can be built again."),
    ("/run/appliance", "Sockets."),
)


def completions() -> dict[str, str]:
    """The completion script of each shell, by the path it is installed at."""
    variable = f"_{PROGRAM.upper()}_COMPLETE"
    return {
        path: get_completion_script(prog_name=PROGRAM, complete_var=variable, shell=shell) + "\n"
        for shell, path in COMPLETIONS.items()
    }


def pages(version: str, epoch: int) -> dict[str, str]:
    """Every page by its file name, e.g. appliance-models.1."""
    root: Any = typer.main.get_command(app)
    date = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d")
    found = {f"{PROGRAM}.1": _overview(root, version, date)}
    for name, command in sorted(root.commands.items()):
        if not command.hidden:
            found[f"{PROGRAM}-{name}.1"] = _page(name, command, version, date)
    return found


def _overview(root: Any, version: str, date: str) -> str:
    lines = [_head(PROGRAM, version, date), ".SH NAME", f"{PROGRAM} \\- {_roff(_first_sentence(root))}"]
    lines += [".SH SYNOPSIS", f".B {PROGRAM}", ".I command", ".RI [ options ]"]
    lines += [".SH DESCRIPTION", *_paragraphs(_help(root)), ".SH COMMANDS"]
    for name, command in sorted(root.commands.items()):
        if not command.hidden:
            lines += [".TP", f".BR {PROGRAM}\\-{_roff(name)} (1)", _roff(_first_sentence(command))]
    lines += [".SH EXIT STATUS", *_terms(EXIT_STATUS), ".SH FILES", *_terms(FILES)]
    lines += [".SH ENVIRONMENT"]
    lines += _terms(
        (("APPLIANCE_CONFIG", "The configuration file."), ("APPLIANCE_URL", "Where the appliance answers."))
    )
    lines += [".SH SEE ALSO", ".BR systemctl (1),", ".BR journalctl (1)", ""]
    return "\n".join(lines)


def _page(name: str, command: Any, version: str, date: str) -> str:
    title = f"{PROGRAM}-{name}"
    lines = [_head(title, version, date), ".SH NAME", f"{_roff(title)} \\- {_roff(_first_sentence(command))}"]
    inner = getattr(command, "commands", None)
    if inner is None:
        lines += [".SH SYNOPSIS", *_synopsis([name], command), ".SH DESCRIPTION", *_paragraphs(_help(command))]
        lines += [".SH OPTIONS", *_parameters(command)]
    else:
        lines.append(".SH SYNOPSIS")
        for index, (word, sub) in enumerate(sorted(inner.items())):
            lines += [*([".br"] if index else []), *_synopsis([name, word], sub)]
        lines += [".SH DESCRIPTION", *_paragraphs(_help(command)), ".SH COMMANDS"]
        for word, sub in sorted(inner.items()):
            lines += [f".SS {_roff(f'{PROGRAM} {name} {word}')}", *_paragraphs(_help(sub)), *_parameters(sub)]
    lines += [".SH SEE ALSO", f".BR {PROGRAM} (1)", ""]
    return "\n".join(lines)


def _head(title: str, version: str, date: str) -> str:
    return f'.TH {_roff(title.upper())} 1 "{date}" "{PROGRAM} {version}" "User Commands"'


def _synopsis(words: list[str], command: Any) -> list[str]:
    parts = [f".B {PROGRAM} {_roff(' '.join(words))}", ".RI [ options ]"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = _roff(_value_name(parameter))
            parts.append(f".I {name}" if parameter.required else f".RI [ {name} ]")
    return parts


def _parameters(command: Any) -> list[str]:
    lines = []
    for parameter in command.params:
        text = getattr(parameter, "help", None) or ""
        if parameter.hidden:
            continue
        if parameter.param_type_name == "argument":
            term = f".I {_roff(_value_name(parameter))}"
        else:
            names = ", ".join((*parameter.opts, *parameter.secondary_opts))
            value = "" if getattr(parameter, "is_flag", False) else f" {_value_name(parameter)}"
            term = f".BR {_roff(names).replace(' ', chr(92) + ' ')}" + (f" {_quoted(value)}" if value else "")
        lines += [".TP", term, _roff(text) or "(no description)"]
    return [*lines, ".TP", ".B \\-h, \\-\\-help", "Show the help."]


def _value_name(parameter: Any) -> str:
    """The word that stands for the value: MODEL, PATH."""
    return str(parameter.metavar or parameter.name.upper())


def _terms(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    return [line for term, text in pairs for line in (".TP", f".B {_roff(term)}", _roff(text))]


def _help(command: Any) -> str:
    return inspect.cleandoc(command.help or "").replace("\b", "")


def _first_sentence(command: Any) -> str:
    text = " ".join(_help(command).split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for index, paragraph in enumerate(text.split("\n\n")):
        lines += [*([".PP"] if index else []), _roff(" ".join(paragraph.split()))]
    return lines


def _quoted(text: str) -> str:
    return '"' + _roff(text).replace('"', "\\(dq") + '"'


def _roff(text: str) -> str:
    """The text such that roff sets it as it is: no escapes, no requests, hyphens that can be copied into a shell."""
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + safe if safe.startswith((".", "'")) else safe
