"""The book names only what exists, has an entry for everything that the code can say, and lies open where `doctor` points."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main

from appliance import daemon
from appliance.cli import book as pointers
from appliance.cli import check
from appliance.cli.main import app
from appliance.cli.output import Exit
from appliance.config import Config
from appliance.core.errors import ErrorCode
from appliance.core.manifest import ModelManifest
from appliance.core.readings import GpuState
from appliance.core.states import PUBLIC_STATES, ModelState
from appliance.core.thermal import Level
from appliance.observability.journal import MESSAGE_IDS
from appliance.protocols.status import HTTP_STATUS
from tests.docs.book import BOOKS, DOCS, Command, matches, read, rows, slug

ROOT = DOCS.parent
APPLIANCE = ROOT / "appliance"
INSTALLATION, OPERATIONS = (read(path) for path in BOOKS)
PAGES = (*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "systemd" / "README.md")
CODE = re.compile(r"`([^`\n]+)`")
FINDING_CODE = re.compile(r"(?:gpu|driver|sensor|clock|drive|event|process|disk|fan|memory)-[a-z]+(?:-[a-z]+)*")
NOT_RUN = {
    "needs an NVIDIA GPU": 11,
    "needs a checkout and a network": 2,
    "needs a second disk": 3,
    "runs in a checkout, at the maker's desk": 1,
}
"""How many commands are not run, by reason. Few, and each for a reason that stands in the book."""


# --- what the book says exists --------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[str]:
    """Everything in code that begins with our command."""
    for line in re.findall(r"^\$ (.+)$", text, re.MULTILINE):
        yield from re.findall(r"(?:^|(?<=[ (])|(?<=bin/))appliance [a-z].*", line)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    # code may be broken by the end of a line
    for span in re.findall(r"`([^`]+)`", prose):
        if span.startswith("appliance ") and not span.startswith("appliance …"):
            yield " ".join(span.split())


def complaint(line: str) -> str:
    """What that command line names and does not exist; empty if nothing."""
    node: Any = typer.main.get_command(app)
    words = re.split(r"\s*(?:[|;&)#]|\s2?>)", line)[0].split()[1:]
    path = ["appliance"]
    while words and hasattr(node, "commands") and not words[0].startswith("-"):
        word = words.pop(0)
        if word not in node.commands:
            return f"{' '.join(path)} has no command {word!r}"
        node = node.commands[word]
        path.append(word)
    known = {name for parameter in node.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"-h", "--help"}
    for word in words:
        option = word.strip("[]\"'").partition("=")[0]
        if option.startswith("-") and option not in known:
            return f"{' '.join(path)} has no option {option!r}"
    return ""


def test_a_command_that_does_not_exist_is_found() -> None:
    assert complaint("appliance models load NAME") == ""
    assert complaint("appliance engines prune --max-size-mb 5 | wc") == ""
    assert "no command 'lod'" in complaint("appliance models lod NAME")
    assert "no option '--max-size'" in complaint("appliance engines prune --max-size 5")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_and_option_in_the_docs_exists(path: Path) -> None:
    found = [f"{line}: {wrong}" for line in command_lines(path.read_text()) if (wrong := complaint(line))]
    assert not found


def test_every_configuration_key_in_the_books_exists() -> None:
    """Written as `[section] key`, with further keys of the same section behind it."""
    known = {section: fields(kind) for kind in (Config, ModelManifest) for section, kind in tables(kind)}
    found = []
    for page in (INSTALLATION, OPERATIONS):
        for section, key in re.findall(r"`\[(\w+)\] (\w+)", page.text):
            if section in known and key not in known[section]:
                found.append(f"[{section}] {key}")
            assert section in known or section == "Service", section
    assert not found


def tables(kind: Any) -> Iterator[tuple[str, Any]]:
    for one in msgspec.structs.fields(kind):
        if isinstance(one.type, type) and issubclass(one.type, msgspec.Struct):
            yield one.name, one.type


def fields(kind: Any) -> set[str]:
    return {one.name for one in msgspec.structs.fields(kind)}


@pytest.mark.parametrize("page", [INSTALLATION, OPERATIONS], ids=lambda page: page.path.name)
def test_every_link_of_the_book_leads_somewhere(page: Any) -> None:
    from tests.docs.book import links

    found = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.path.parent / name).resolve() if name else page.path
        if not file.exists() or (anchor and anchor not in read(file).sections):
            found.append(target)
    assert not found


# --- what the code can say -------------------------------------------------------------------------------------------------


def test_every_state_of_a_model_has_its_line_with_its_outside_name() -> None:
    for state in ModelState:
        assert re.search(rf"^\| `{state}` \| {PUBLIC_STATES[state]} \| .+ \| .+ \|$", OPERATIONS.text, re.MULTILINE)


def test_every_state_of_a_gpu_and_every_level_of_heat_has_its_line() -> None:
    assert set(GpuState) <= rows(OPERATIONS, "states")
    assert rows(OPERATIONS, "levels-of-heat") == {level.name for level in Level}


def test_every_error_code_has_its_line_with_its_status() -> None:
    assert rows(OPERATIONS, "error-codes") == set(ErrorCode)
    for code, status in HTTP_STATUS.items():
        assert re.search(rf"^\| `{code}` \| {status} \|", OPERATIONS.text, re.MULTILINE), code


def test_every_exit_status_has_its_line() -> None:
    known = rows(OPERATIONS, "exit-status")
    of_service = {value for name, value in vars(daemon).items() if name.startswith("EXIT_")}
    assert {str(status) for status in of_service} <= known
    for status in Exit:
        assert re.search(rf"^\| `{int(status)}` \| {status.name} \| .+ \|$", OPERATIONS.text, re.MULTILINE), status
    for severity in check.Severity:
        assert f"{int(severity)} {severity.name}" in OPERATIONS.text


def test_every_alert_has_its_line() -> None:
    rules = (DOCS / "prometheus" / "appliance.rules.yml").read_text()
    assert rows(OPERATIONS, "alerts") == set(re.findall(r"- alert: (\w+)", rules))


def finding_codes() -> set[str]:
    """The codes of findings: in the sensors that make some, all string constants of that form; and the states of a GPU but OK."""
    found = {"gpu-" + state.lower().replace("_", "-") for state in GpuState if state is not GpuState.OK}
    for path in (APPLIANCE / "sensors").glob("*.py"):
        tree = ast.parse(path.read_text())
        if not any(isinstance(node, ast.Name) and node.id == "Finding" for node in ast.walk(tree)):
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and FINDING_CODE.fullmatch(node.value)
                and not node.value.endswith("-")
            ):
                found.add(node.value)
    return found


def test_every_finding_has_its_section() -> None:
    codes = finding_codes()
    assert {"gpu-lost", "driver-mismatch", "clock-step", "gpu-rows-failed"} <= codes
    assert not codes - set(OPERATIONS.sections)


def test_every_finding_that_is_made_has_a_code_of_that_form() -> None:
    for path in (APPLIANCE / "sensors").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
                first = node.args[0] if node.args else next(key.value for key in node.keywords if key.arg == "code")
                if isinstance(first, ast.Constant):
                    assert FINDING_CODE.fullmatch(first.value), f"{path.name}: {first.value}"


def test_the_events_that_the_book_explains_exist_and_those_with_a_catalog_entry_are_in_it() -> None:
    sources = "\n".join(path.read_text() for path in APPLIANCE.rglob("*.py"))
    told = {name for name in CODE.findall(section("the-journal")) if re.fullmatch(r"[a-z]+\.[a-z_]+", name)}
    assert not {name for name in told if f'"{name}"' not in sources}
    derived = {"model.failed"}  # how the catalog calls model.state with state=FAILED
    rare = {"config.reloaded", "model.drain_timeout"}
    assert not set(MESSAGE_IDS) - told - derived - rare


def section(wanted: str) -> str:
    """The text of a section with what is below it, to the next heading of its level."""
    lines, inside = [], False
    for line in OPERATIONS.text.splitlines():
        if line.startswith("## "):
            inside = slug(line[3:]) == wanted
        if inside:
            lines.append(line)
    return "\n".join(lines)


# --- where the doctor points ------------------------------------------------------------------------------------------------


def reported_names() -> set[str]:
    """The names under which the doctor's checks report, as its sources have them."""
    found = set()
    for path in (APPLIANCE / "cli").glob("doctor*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"):
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant):
                found.add(first.value)
    return found


def test_every_check_of_the_doctor_points_into_the_book() -> None:
    names = reported_names()
    assert {"ports", "clock", "models folder"} <= names
    assert not {name for name in names if not pointers.pointer(name)}


def test_every_pointer_of_the_doctor_leads_to_a_section() -> None:
    assert not set(pointers.SECTIONS.values()) - set(OPERATIONS.sections)
    assert pointers.pointer("GPU 0") == f"operations.md#{pointers.SECTIONS['GPU']}"
    assert pointers.pointer("hardware", "gpu-lost") == "operations.md#gpu-lost"
    assert pointers.pointer("a check that nobody knows") == ""


# --- the book itself ----------------------------------------------------------------------------------------------------------


def test_every_command_is_in_a_block_that_is_run_or_says_why_it_is_not() -> None:
    reasons: dict[str, int] = {}
    for page in (INSTALLATION, OPERATIONS):
        # a command in a block of another kind would be skipped without a word
        assert set(page.other_blocks) <= {"toml", "ini"}
        for reason, _ in page.not_run:
            reasons[reason] = reasons.get(reason, 0) + 1
    assert reasons == NOT_RUN


def test_every_symptom_is_in_the_table_and_every_section_is_reached_from_it() -> None:
    symptoms = section("troubleshooting-by-symptom")
    head, _, rest = symptoms.partition("\n### ")
    listed = set(re.findall(r"\(#([a-z-]+)\)", head))
    written = {slug(line) for line in re.findall(r"^### (.+)$", "\n### " + rest, re.MULTILINE)} | {
        slug(rest.splitlines()[0])
    }
    assert len(written) >= 15
    assert not written - listed


def test_the_reader_of_the_book_reads_as_it_says(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(
        "# A *b*, c\n```console\n$ cat > f <<'E'\n> x\n> E\n$ false   # exit status 1: so it is\nit said …\n…\n```\n"
        "*Not run by the tests: needs a GPU.*\n\n```console\n$ nvidia-smi\n```\n```console\n$ true\n```\n"
    )
    page = read(file)
    assert page.sections == ["a-b-c"]
    assert page.commands == [
        Command("page.md", 3, "a-b-c", "cat > f <<'E'\nx\nE"),
        Command("page.md", 6, "a-b-c", "false", 1, ["it said …", "…"]),
        Command("page.md", 16, "a-b-c", "true"),
    ]
    assert [(reason, command.text) for reason, command in page.not_run] == [("needs a GPU", "nvidia-smi")]


def test_quoted_output_is_held_to_what_was_printed() -> None:
    assert matches(["a  b", "…", "z …"], "a b\nc\nd\nz 1\n")
    assert matches(["a", "…"], "a\n")
    assert not matches(["a"], "a\nb\n")
    assert not matches(["…", "b"], "a\nc\n")
    assert not matches(["1 model ready"], "0 models ready\n")
