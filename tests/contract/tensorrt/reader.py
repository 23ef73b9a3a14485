"""Prints the API of a bindings package as JSON. Run as a program, in a process of its own, with nothing of this project.

python reader.py FOLDER MODULE STUB...
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import sys
from typing import Any

SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\(.*\) -> .+$")
SPECIAL = ("__init__", "__getitem__", "__setitem__", "__len__", "__call__", "__enter__", "__exit__")


def signatures(thing: Any) -> list[str]:
    """The lines of a docstring in which pybind11 gives the signatures."""
    lines = (line.strip() for line in (getattr(thing, "__doc__", None) or "").splitlines())
    return [line for line in lines if SIGNATURE.match(line)]


def describe(kind: type) -> dict[str, Any]:
    """One class, without what it inherits."""
    bases = [base.__name__ for base in kind.__bases__ if base.__name__ not in ("object", "pybind11_object")]
    found: dict[str, Any] = {"bases": bases, "text": kind.__doc__ or ""}
    members = getattr(kind, "__members__", None)
    if members is not None:
        return found | {"members": {name: int(value) for name, value in members.items()}}
    methods, properties, nested, constants = {}, {}, {}, []
    for name, value in sorted(vars(kind).items()):
        if name.startswith("_") and name not in SPECIAL:
            continue
        if isinstance(value, property) or type(value).__name__ == "pybind11_static_property":
            properties[name] = {"get": signatures(value.fget), "set": signatures(value.fset) if value.fset else None}
        elif isinstance(value, type):
            nested[name] = describe(value)
        elif isinstance(value, staticmethod):
            methods[name] = {"signatures": signatures(value.__func__), "static": True}
        elif callable(value):
            methods[name] = {"signatures": signatures(value)}
        else:
            constants.append(name)
    return found | {"methods": methods, "properties": properties, "nested": nested, "constants": constants}


def main() -> None:
    """Load the stubs, import the module over them, walk it."""
    folder, module, *stubs = sys.argv[1:]
    for stub in stubs:
        ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, folder)
    library = importlib.import_module(module)
    classes, functions, attributes = {}, {}, {}
    for name, value in sorted(vars(library).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, type):
            classes[name] = describe(value)
        elif callable(value):
            functions[name] = signatures(value)
        elif type(value).__name__ != "module":
            attributes[name] = type(value).__name__
    api = {"version": library.__version__, "classes": classes, "functions": functions, "attributes": attributes}
    sys.stdout.write(json.dumps(api))


if __name__ == "__main__":
    main()
