"""What must not leave the box in an archive for support: values by the name they are assigned to, by their look, and, of a
configuration's text, everything but what its schema knows.

Pure: text in, text out. Lines keep their numbers, so that a complaint about a file still points at the right one. `bugreport`
drives it.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, time
from typing import Any

import msgspec

from appliance.config import Config, Problem

REMOVED = "(removed)"
TYPO = 0.7
"""How much an unknown name must be like a known one to be shown: as a typing error it is what support looks for."""
LOST_LINES = 100
"""Of a key that has no end: a page of a log may begin in one."""

_NAME = (
    r"password|passwd|passphrase|pwd|psk|secret|token|credential|authorization|bearer|cookie"
    r"|(?:api|private|access|auth|client|encryption|license|shared|signing|ssh)[-_]?key"
    r"|(?<![a-z])(?:auth|pass)(?![a-z])"
)
_TEXT = r"\"(?:\\.|[^\"\\])*\"|'[^']*'|[\"'].*|(?:bearer |basic )?\S+"
SECRET = re.compile(rf"(?i){_NAME}")
ASSIGNED = re.compile(rf"(?i)((?:{_NAME})[\w.-]*[\"']?\s*[=:]\s*)({_TEXT})")
ARGUMENT = re.compile(rf"(?i)(--[\w-]{{0,60}}(?:{_NAME})[\w-]*[ \t]+)([^\s-][^\s]*)")
HEADER = re.compile(r"(?i)(authorization[\"']?\s*:[ \t]*)\S.*")
IN_URL = re.compile(r"(://)(?:[^\s\"'/@]*|[^\s\"'/:@]*:[^\s\"']*)@")
LOOKS = (
    re.compile(
        rf"-----BEGIN [^-\n]+-----(?:(?:(?!-----BEGIN )[\s\S])*?-----END [^-\n]+-----|(?:.*\n?){{0,{LOST_LINES}}})"
    ),
    re.compile(r"(?i)\b(?:bearer|basic)[ \t]+[\w+/.~=-]{4,}"),
    re.compile(r"\b(?:gh[a-z]_|github_pat_|glpat-|xox[a-z]-|hf_|sk-)[\w-]{6,}"),
    re.compile(r"\bAKIA[0-9A-Z]{12,}"),
    re.compile(r"\beyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)?"),
)
"""Keys, credentials of HTTP, and tokens that say themselves what they are."""

_BROKEN_TABLE = re.compile(r"\s*\[+\s*([\w.-]+)[\s\]]*$")
_TRIPLE = re.compile(r"\"\"\"|'''")
_OPENS = re.compile(rf"{_TRIPLE.pattern}|[\[{{]")
_STATEMENT_LINES = 500
"""What is longer counts as without end."""
_BARE = re.compile(r"[\w-]+")


def redact(value: Any) -> Any:
    """A document without the values of keys that sound like secrets, and without what looks like one."""
    if isinstance(value, dict):
        return {key: REMOVED if SECRET.search(str(key)) and item else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Lines without what is assigned to names that sound like secrets, and without what looks like one."""
    for look in LOOKS:
        text = look.sub(REMOVED, text)
    text = HEADER.sub(rf"\1{REMOVED}", text)
    text = ARGUMENT.sub(rf"\1{REMOVED}", ASSIGNED.sub(rf"\1{REMOVED}", text))
    return IN_URL.sub(rf"\1{REMOVED}@", text)


def redact_problem(problem: Problem) -> str:
    """A complaint about a configuration without what only the file says: names that the schema does not know."""
    place = f"{problem.file}:{problem.line}" if problem.line else problem.file
    if not problem.key:
        # the parser's words may quote keys
        return f"{place}: not valid TOML"
    *tables, last = problem.key.split(".")
    kind = _table(tables)
    if kind is None or _shown(last, kind) == REMOVED:
        return f"{place}: unknown key {REMOVED}"
    if re.match(r"'[^']*' is [\[{]", problem.message):
        return f"{place}: {problem.key!r} is of another kind"
    return redact_text(str(problem))


def redact_toml(text: str) -> str:
    """The text of a configuration, which need not be valid: no comments, and values of those keys alone that the schema knows.

    A value is told where its statement can be read by itself. After one that cannot be read and may go on over lines (an open
    quote or bracket) nobody knows what is a key and what is part of a secret: the rest is left out.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    valid = _statement(lines, len(lines))[0] is not None
    table: tuple[str, ...] | None = ()
    found: list[str] = []
    while len(found) < len(lines):
        line = lines[len(found)]
        if not line.strip() or line.lstrip().startswith("#"):
            found.append("")
            continue
        statement, size = _statement(lines[len(found) :], 1)
        if not valid and _TRIPLE.search("\n".join(lines[len(found) : len(found) + size])):
            # where quotes do not match, what is inside may be outside
            statement = None
        if statement is not None and line.lstrip().startswith("["):
            table, shown = _header(statement)
            found.append(shown)
        elif statement is not None:
            kind = None if table is None else _table(table)
            found += [", ".join(_members(statement, kind)), *[""] * (size - 1)]
        elif match := _BROKEN_TABLE.match(line):
            path = tuple(match[1].split("."))
            table = path if _table(path) is not None else None
            found.append(f"[{match[1]}" if table else REMOVED)
        else:
            found.append(REMOVED)
            if line.lstrip().startswith("["):
                table = None
            elif _OPENS.search(line):
                found.append(f"# {len(lines) - len(found)} more lines {REMOVED}: the one above has no end")
                break
    return "\n".join(found).rstrip("\n") + "\n"


def _statement(lines: list[str], least: int) -> tuple[dict[str, Any] | None, int]:
    """What the lines begin with, parsed, and how many lines it takes, `least` of them; None if there is no such number."""
    most = min(len(lines), _STATEMENT_LINES) if _OPENS.search(lines[0]) else 1
    for end in range(least, max(least, most) + 1):
        try:
            return tomllib.loads("\n".join(lines[:end]) + "\n"), end
        except (tomllib.TOMLDecodeError, RecursionError):
            continue
    return None, 1


def _header(statement: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, str]:
    """The table that a header begins, None if there is none such, and its line."""
    path, inner = [], statement
    while inner:
        ((name, below),) = inner.items()
        path.append(name)
        inner = below[0] if isinstance(below, list) else below
    if _table(path) is not None:
        return tuple(path), f"[{'.'.join(path)}]"
    kind = _table(path[:-1])
    return None, f"[{'.'.join((*path[:-1], _shown(path[-1], kind)))}]" if kind else f"[{REMOVED}]"


def _table(path: tuple[str, ...] | list[str]) -> type[msgspec.Struct] | None:
    """What may stand in that table; None if the schema has none such."""
    kind: Any = Config
    for name in path:
        kind = _fields(kind).get(name)
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            return None
    known: type[msgspec.Struct] = kind
    return known


def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


def _shown(name: str, kind: type[msgspec.Struct]) -> str:
    """The name of a key if it is known there, or mistyped."""
    known = _fields(kind)
    likely = name in known or (_BARE.fullmatch(name) and difflib.get_close_matches(name, known, 1, TYPO))
    return name if likely else REMOVED


def _members(table: Mapping[str, Any], kind: type[msgspec.Struct] | None) -> Iterator[str]:
    """`key = value` of a table of that kind (None: nothing in it is known)."""
    for name, value in table.items():
        below = _fields(kind).get(name) if kind else None
        shown = _shown(name, kind) if kind else REMOVED
        if below is None:
            yield f'{shown if _BARE.fullmatch(shown) else json.dumps(shown)} = "{REMOVED}"'
        elif not (isinstance(below, type) and issubclass(below, msgspec.Struct)):
            yield f"{name} = {_value(value)}"
        elif isinstance(value, dict):
            members = list(_members(value, below))
            yield f"{name}.{members[0]}" if len(members) == 1 else f"{name} = {{{', '.join(members)}}}"
        else:
            yield f'{name} = "{REMOVED}"'


def _value(value: Any) -> str:
    """A known key's value as TOML; what holds names of its own is known to nobody."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(redact_text(value), ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(_value(one) for one in value)}]"
    if isinstance(value, int | float | date | time):
        return str(value)
    return f'"{REMOVED}"'
