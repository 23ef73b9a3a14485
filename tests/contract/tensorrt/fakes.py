"""Whether a stand-in for TensorRT has only what the real one has: classes, methods, parameters, properties, enum members.

Names with an underscore are the stand-in's own, and so is what stands outside of classes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.contract.tensorrt.api import Api

ENUMERATIONS = ("Enum", "IntEnum", "IntFlag", "Flag")


def problems(file: Path, api: Api) -> list[str]:
    """What the release does not have, one sentence each, with file and line."""
    tree = ast.parse(file.read_text())
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [f"{file.name}:{line}: {words}" for line, words in _class(node, node.name, api)]
    return found


def _class(node: ast.ClassDef, name: str, api: Api) -> Iterator[tuple[int, str]]:
    real = next(api.lineage(name), None)
    if real is None:
        yield node.lineno, f"there is no class {name!r}"
        return
    enumeration = any(getattr(base, "id", getattr(base, "attr", "")) in ENUMERATIONS for base in node.bases)
    if enumeration != (real.members is not None):
        yield node.lineno, f"{name} is {'no' if enumeration else 'an'} enumeration"
        return
    for part in node.body:
        if isinstance(part, ast.ClassDef) and not part.name.startswith("_"):
            yield from _class(part, f"{name}.{part.name}", api)
        elif isinstance(part, ast.FunctionDef):
            yield from _function(part, name, api)
        elif isinstance(part, ast.Assign | ast.AnnAssign):
            for target in part.targets if isinstance(part, ast.Assign) else [part.target]:
                if isinstance(target, ast.Name) and not target.id.startswith("_"):
                    yield from _constant(part, target.id, name, api)


def _constant(part: ast.Assign | ast.AnnAssign, member: str, owner: str, api: Api) -> Iterator[tuple[int, str]]:
    real = next(api.lineage(owner))
    if not api.has(owner, member):
        yield part.lineno, f"{owner} has no {member!r}"
    elif real.members is not None and isinstance(part.value, ast.Constant) and part.value.value != real.members[member]:
        yield part.lineno, f"{owner}.{member} is {real.members[member]}, not {part.value.value}"


def _function(part: ast.FunctionDef, owner: str, api: Api) -> Iterator[tuple[int, str]]:
    for line, name in _attributes(part):
        if not any(name in one.properties for one in api.lineage(owner)):
            yield line, f"{owner} has no property {name!r}"
    if part.name.startswith("_") and part.name not in ("__init__", "__call__"):
        return
    if any(getattr(one, "id", getattr(one, "attr", "")) in ("property", "setter") for one in part.decorator_list):
        if not any(part.name in one.properties for one in api.lineage(owner)):
            yield part.lineno, f"{owner} has no property {part.name!r}"
        return
    method = api.method(owner, part.name)
    if method is None:
        if part.name != "__init__" and not _described(part, owner, api):
            yield part.lineno, f"{owner} has no method {part.name!r}"
        return
    static = any(getattr(one, "id", "") == "staticmethod" for one in part.decorator_list)
    arguments = [*part.args.posonlyargs, *part.args.args][0 if static else 1 :]
    wanted = [argument.arg for argument in (*arguments, *part.args.kwonlyargs)]
    overloads = [[parameter.name for parameter in one.parameters] for one in method.overloads()]
    if overloads and not any(names[: len(wanted)] == wanted for names in overloads):
        yield part.lineno, f"{owner}.{part.name} has parameters {overloads[0]}, not {wanted}"


def _attributes(part: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    """Public attributes that a method sets on itself."""
    for node in ast.walk(part):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            mine = isinstance(node.value, ast.Name) and node.value.id == "self"
            if mine and not node.attr.startswith("_"):
                yield node.lineno, node.attr


def _described(part: ast.FunctionDef, owner: str, api: Api) -> bool:
    """Callbacks are not bound; the description of the class shows how they are written."""
    return any(f"def {part.name}(" in one.text for one in api.lineage(owner))
