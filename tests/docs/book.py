"""The administrator's book as data: its sections, links, tables, and the commands in its console blocks with what they print.

A block looks as on a terminal: `$ ` begins a command, `> ` goes on with it, everything else is output. `…` in output stands for
any text, a line of nothing else for any lines. `# exit status N: why` behind a command is the status that it ends with, else 0. A
line `*Not run by the tests: REASON.*` before a block takes it out, for everybody to see.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
BOOKS = (DOCS / "installation.md", DOCS / "operations.md")
"""In the order of an administrator's life."""

HEADING = re.compile(r"^(#{1,6}) (.+)$")
STATUS = re.compile(r"\s{2,}# exit status (\d+)(?:: .*)?$")
NOT_RUN = re.compile(r"^\*Not run by the tests: (.+)\.\*$")
LINK = re.compile(r"\]\(([^)\s]*)\)")
ANY = "…"


@dataclass
class Command:
    """One command: where it stands, its text, the status it ends with, and the lines it prints (none: not quoted)."""

    file: str
    line: int
    section: str
    text: str
    status: int = 0
    output: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass
class Page:
    """One page: its text, the slugs of its headings, its commands, and those that are not run, by reason."""

    path: Path
    text: str
    sections: list[str] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    not_run: list[tuple[str, Command]] = field(default_factory=list)
    other_blocks: list[str] = field(default_factory=list)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def read(path: Path) -> Page:
    """The page in that file."""
    page = Page(path, path.read_text())
    section, reason = "", ""
    block: str | None = None
    target: list[Command] = []
    for number, line in enumerate(page.text.splitlines(), 1):
        if line.startswith("```"):
            if block is None:
                block = line[3:]
                target = [] if reason else page.commands
                if block != "console":
                    page.other_blocks.append(block)
            else:
                page.not_run += [(reason, command) for command in target if reason]
                block, reason = None, ""
        elif block == "console":
            _console(target, page, section, number, line)
        elif block is None:
            if heading := HEADING.match(line):
                section = slug(heading[2])
                page.sections.append(section)
            if line:
                found = NOT_RUN.match(line)
                reason = found[1] if found else ""
    return page


def _console(target: list[Command], page: Page, section: str, number: int, line: str) -> None:
    if line.startswith("$ "):
        text = line[2:]
        status = STATUS.search(text)
        target.append(Command(page.path.name, number, section, STATUS.sub("", text), int(status[1]) if status else 0))
    elif line.startswith(">") and target and not target[-1].output:
        target[-1].text += "\n" + line[2:]
    else:
        target[-1].output.append(line)


def links(page: Page) -> list[str]:
    """Every target of a link outside of code."""
    prose = re.sub(r"```.*?```", "", page.text, flags=re.DOTALL)
    return [target for target in LINK.findall(prose) if "://" not in target]


def rows(page: Page, section: str) -> set[str]:
    """What the first cells of the tables of a section name in backticks."""
    found: set[str] = set()
    inside = False
    for line in page.text.splitlines():
        if heading := HEADING.match(line):
            inside = slug(heading[2]) == section
        elif inside and line.startswith("| "):
            found.update(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
    return found


def pattern(lines: list[str]) -> re.Pattern[str]:
    """What the quoted lines stand for. Runs of spaces are one, since widths of columns are nobody's promise."""
    parts = []
    for line in lines:
        if line.strip() == ANY:
            parts.append(r"(?:[^\n]*\n)*?")
            continue
        pieces = [r"[ ]+".join(map(re.escape, re.split(r"\s+", piece))) for piece in line.rstrip().split(ANY)]
        parts.append("[^\n]*".join(pieces) + r"[ ]*\n")
    return re.compile("".join(parts))


def matches(lines: list[str], printed: str) -> bool:
    """Whether a command printed what the book quotes, from the first line to the last."""
    text = "".join(re.sub(r"\s+", " ", line).rstrip() + "\n" for line in printed.splitlines())
    return pattern(lines).fullmatch(text) is not None
