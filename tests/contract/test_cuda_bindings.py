"""Every CUDA call of the engine exists in the installed bindings, and takes as many arguments. Needs no driver."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "appliance" / "engines" / "cuda.py"
SAMPLE = """
from cuda.bindings import driver
driver.cuInit(0)
driver.cuMemAlloc(1, 2)
driver.cuNothing()
driver.CUstream_flags.CU_STREAM_NON_BLOCKING
driver.CUstream_flags.CU_NOTHING
getattr(driver, "cuNobody")(1)
"""


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def problems(source: str) -> list[str]:
    from cuda.bindings import driver

    tree = ast.parse(source)
    # `attribute = driver.CUdevice_attribute`
    names = {"driver": "driver"}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and dotted(node.value).startswith("driver.")
        ):
            names[node.targets[0].id] = dotted(node.value)
    found = []
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or dotted(node).split(".")[0] not in names:
            continue
        first, *rest = dotted(node).split(".")
        path = [*names[first].split(".")[1:], *rest]
        thing = driver
        for part in path:
            thing = getattr(thing, part, None)
        if thing is None:
            found.append(f"{node.lineno}: there is no driver.{'.'.join(path)}")
        elif (call := calls.get(id(node))) is not None and path[-1].startswith("cu"):
            takes = inspect.signature(thing).parameters
            if len(call.args) != len(takes):
                found.append(f"{node.lineno}: {path[-1]} takes {len(takes)} arguments, not {len(call.args)}")
    # calls by name: `getattr(driver, "cuMemFree")`, and the names in messages
    for node in ast.walk(tree):
        named = isinstance(node, ast.Constant) and re.fullmatch(r"cu[A-Z]\w+", str(node.value))
        if isinstance(node, ast.Constant) and named and not hasattr(driver, str(node.value)):
            found.append(f"{node.lineno}: there is no driver.{node.value}")
    return sorted(found)


def test_the_check_can_fail() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is for x86-64 Linux")
    assert problems(SAMPLE) == [
        "4: cuMemAlloc takes 1 arguments, not 2",
        "5: there is no driver.cuNothing",
        "7: there is no driver.CUstream_flags.CU_NOTHING",
        "8: there is no driver.cuNobody",
    ]


def test_every_call_is_in_the_bindings() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is for x86-64 Linux")
    if not FILE.exists():
        pytest.skip("there is no appliance/engines/cuda.py yet")
    assert problems(FILE.read_text()) == []
