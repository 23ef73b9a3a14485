"""What a file of ours uses of TensorRT, read from its source, and what of it a release does not have.

Works without types, and so sees what a type checker does not: calls on values of type Any. A name that stands in a `hasattr` or a
`getattr` with a default may be missing in some releases, not in all of them. A function whose docstring begins with
"TensorRT-RTX" is held against that flavour only.
"""

from __future__ import annotations

import ast
import collections
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from tests.contract.tensorrt.api import Api, Method, Signature

HOME = "tensorrt_library"
"""The module through which everything else reaches the library."""

RTX = "TensorRT-RTX"

HOLDERS = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
}
"""What variables of these names, with or without an underscore, hold in files that use TensorRT."""

ORDINARY = {
    name
    for kind in (
        str,
        bytes,
        memoryview,
        list,
        dict,
        set,
        tuple,
        int,
        Path,
        mmap.mmap,
        collections.OrderedDict,
        collections.deque,
        Exception,
    )
    for name in dir(kind)
} | {"name", "value", "shape", "dtype", "type", "run", "start", "stop", "error", "shapes"}
"""Members of everyday things: met without a class beside them, they are not taken for TensorRT's."""


class Call(msgspec.Struct, frozen=True):
    """How it is called; `positional` is -1 if the number is not known (`*arguments`)."""

    positional: int
    keywords: tuple[str, ...]


class Use(msgspec.Struct, frozen=True):
    """One use: of the dotted `name` from the module down, or of a member of something (`owner` is its class, or "?")."""

    line: int
    owner: str
    name: str
    call: Call | None = None
    rtx_only: bool = False


class Uses(msgspec.Struct):
    """Everything in one file."""

    file: str
    found: list[Use] = []
    guarded: set[str] = set()
    own: set[str] = set()


class _Reader(ast.NodeVisitor):
    def __init__(self, file: str) -> None:
        self.uses = Uses(file, [], set(), set())
        self._roots = {"trt", f"{HOME}.trt"}
        self._calls: dict[int, ast.Call] = {}
        self._rtx_only = False

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for name in node.names:
            if name.name == HOME:
                self._roots.add(f"{name.asname or name.name}.trt")

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Name):
            self.uses.own.add(node.targets[0].id)
            if _dotted(node.value) in self._roots:
                self._roots.add(node.targets[0].id)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        # a field of a class of ours
        if isinstance(node.target, ast.Name):
            self.uses.own.add(node.target.id)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.uses.own.add(node.name)
        around = self._rtx_only
        self._rtx_only = around or (ast.get_docstring(node) or "").startswith(RTX)
        self.generic_visit(node)
        self._rtx_only = around

    def visit_Call(self, node: ast.Call) -> None:
        self._calls[id(node.func)] = node
        if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr") and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and (node.func.id == "hasattr" or len(node.args) == 3):
                self.uses.guarded.add(str(name.value))
                self._note(node.lineno, "?", str(name.value), None)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        dotted = _dotted(node)
        root = next((one for one in self._roots if dotted.startswith(f"{one}.")), None)
        call = self._call(node)
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
            self.uses.own.add(node.attr)
        if root is not None:
            self._note(node.lineno, "", dotted.removeprefix(f"{root}."), call)
            return
        holder = dotted.split(".")[-2].removeprefix("_") if "." in dotted else ""
        if not node.attr.startswith("_"):
            self._note(node.lineno, HOLDERS.get(holder, "?"), node.attr, call)
        self.generic_visit(node)

    def _call(self, node: ast.Attribute) -> Call | None:
        call = self._calls.get(id(node))
        if call is None:
            return None
        open_ended = any(isinstance(one, ast.Starred) for one in call.args) or any(
            one.arg is None for one in call.keywords
        )
        return Call(-1 if open_ended else len(call.args), tuple(one.arg or "" for one in call.keywords))

    def _note(self, line: int, owner: str, name: str, call: Call | None) -> None:
        self.uses.found.append(Use(line, owner, name, call, self._rtx_only))


def _dotted(node: ast.AST) -> str:
    """`a.b.c` as text; what is no plain chain of names begins with "?"."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def read(file: Path) -> Uses:
    """The uses in a file."""
    reader = _Reader(file.name)
    reader.visit(ast.parse(file.read_text()))
    return reader.uses


def users(folder: Path) -> list[Path]:
    """The files that use TensorRT: its home, and all that import it."""
    return sorted(
        file
        for file in folder.rglob("*.py")
        if file.stem == HOME or _imports_home(ast.parse(file.read_text(encoding="utf-8")))
    )


def _imports_home(tree: ast.Module) -> bool:
    return any(
        any(alias.name.endswith(HOME) for alias in node.names) or (getattr(node, "module", None) or "").endswith(HOME)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    )


class Checker:
    """Holds uses against releases. A name that is guarded must exist in one of them."""

    def __init__(self, apis: Iterable[Api]) -> None:
        self._words = {api.version: _vocabulary(api) | set(api.classes) for api in apis}

    def problems(self, uses: Uses, api: Api) -> list[str]:
        """What this release does not have, one sentence each, with file and line."""
        found = []
        for use in uses.found:
            if use.rtx_only and not api.rtx:
                continue
            said = self._problem(use, uses, api)
            if said:
                found.append(f"{uses.file}:{use.line}: {said}")
        return list(dict.fromkeys(found))

    def _problem(self, use: Use, uses: Uses, api: Api) -> str:
        if use.name.rpartition(".")[2] in uses.guarded:
            last = use.name.rpartition(".")[2]
            known = any(last in words for words in self._words.values())
            return (
                ""
                if known or (use.owner == "?" and last in uses.own)
                else f"{last!r} is guarded, but no release has it"
            )
        if use.owner == "":
            return _chain(use, api)
        if use.owner != "?":
            return self._of_class(use, api)
        return self._of_something(use, uses, api)

    def _of_class(self, use: Use, api: Api) -> str:
        if not api.has(use.owner, use.name):
            return f"{use.owner} has no {use.name!r}"
        method = api.method(use.owner, use.name)
        return _refusal(use, [method] if method else [])

    def _of_something(self, use: Use, uses: Uses, api: Api) -> str:
        """A name that some release knows must be known to this one; a call must fit a method of that name of any class."""
        if use.name in ORDINARY or use.name in uses.own or "_" not in use.name.strip("_") or use.name.isupper():
            # one word, or a constant: on something that is not known it may be anybody's
            return ""
        if not any(use.name in words for words in self._words.values()):
            return ""
        if use.name not in self._words[api.version]:
            return f"nothing has {use.name!r}, which other releases have"
        return _refusal(use, [one.methods[use.name] for one in api.everywhere() if use.name in one.methods])


def _vocabulary(api: Api) -> set[str]:
    """All names of members, of any class."""
    known: set[str] = set()
    for one in api.everywhere():
        known |= {*one.methods, *one.properties, *(one.members or {}), *one.constants, *one.nested}
    return known


def _chain(use: Use, api: Api) -> str:
    """`Class`, `Class.member`, `Class.Inner.MEMBER`, `function`, and calls of them."""
    parts = use.name.split(".")
    if len(parts) == 1 and parts[0] in api.functions:
        overloads = [Method(api.functions[parts[0]], static=True)]
        return _refusal(use, overloads)
    if parts[0] in api.attributes or parts[0].startswith("__"):
        return ""
    if parts[0] not in api.classes:
        return f"there is no {parts[0]!r}"
    owner = parts[0]
    for part in parts[1:]:
        if not api.has(owner, part) and not part.startswith("__"):
            return f"{owner} has no {part!r}"
        nested = f"{owner}.{part}"
        if not any(True for _ in api.lineage(nested)):
            method = api.method(owner, part)
            return _refusal(use, [method] if method and method.static else [])
        owner = nested
    constructor = api.method(owner, "__init__")
    return _refusal(use, [constructor] if constructor else [])


def _refusal(use: Use, methods: list[Method]) -> str:
    """Why none of these takes the call; empty if one does, or nothing is known."""
    if use.call is None or use.call.positional < 0:
        return ""
    overloads: list[Signature] = []
    for method in methods:
        if not method.signatures:
            return ""
        overloads += method.overloads()
    reasons = [overload.refuses(use.call.positional, use.call.keywords) for overload in overloads]
    return f"{use.name}() {reasons[0]}" if reasons and all(reasons) else ""


def subclasses(file: Path) -> Iterator[tuple[int, str, str, tuple[str, ...]]]:
    """Methods that override the library's: line, the library's class, method, parameters without `self`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            parts = _dotted(base).split(".")
            if len(parts) > 1 and parts[-2] == "trt":
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        names = tuple(argument.arg for argument in method.args.args[1:])
                        yield method.lineno, parts[-1], method.name, names


def overrides(file: Path, api: Api) -> list[str]:
    """Callbacks of ours that the library would never call: their name is not in the class, nor in its description."""
    found = []
    for line, owner, name, parameters in subclasses(file):
        method = api.method(owner, name)
        described = any(name in one.text for one in api.lineage(owner))
        if method is None and not described:
            found.append(f"{file.name}:{line}: {owner} has no callback {name!r}")
        elif method is not None and all(len(one.parameters) != len(parameters) for one in method.overloads()):
            found.append(f"{file.name}:{line}: {owner}.{name} is called with other arguments: {method.signatures[0]}")
    return found
