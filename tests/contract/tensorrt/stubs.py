"""Type stubs from an API, for the type checker: `tensorrt/__init__.pyi`.

What a docstring's type does not say in Python's words becomes Any. Names, parameters, defaults and results of the library's own
classes are exact, and that is what differs between releases.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator

from tests.contract.tensorrt.api import Api, Class, Method, Property, Signature, signature

HEAD = """# mypy: disable-error-code="override, overload-cannot-match, overload-overlap, misc"
import builtins as _b
import enum as _enum
from collections.abc import Sequence as _Sequence
from typing import Any as _Any, SupportsFloat as _SupportsFloat, SupportsInt as _SupportsInt, overload as _overload

__version__: _b.str
"""
PLAIN = {
    "int": "_b.int",
    "float": "_b.float",
    "bool": "_b.bool",
    "str": "_b.str",
    "bytes": "_b.bytes",
    "None": "None",
    "SupportsInt": "_SupportsInt",
    "SupportsFloat": "_SupportsFloat",
}


class Writer:
    """Writes one release's stub."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def text(self) -> str:
        """The whole file."""
        lines = [HEAD]
        for name in self._ordered():
            lines += self._class(name, self._api.classes[name], "")
        for name, overloads in self._api.functions.items():
            lines += self._method(name, Method(overloads, static=True), "", within=False)
        lines += [
            f"{name}: _Any" for name in self._api.attributes if name.isidentifier() and not keyword.iskeyword(name)
        ]
        return "\n".join(lines) + "\n"

    def _ordered(self) -> list[str]:
        """Bases before what inherits from them."""
        order: list[str] = []

        def add(name: str) -> None:
            if name in order or name not in self._api.classes:
                return
            for base in self._api.classes[name].bases:
                add(base)
            order.append(name)

        for name in self._api.classes:
            add(name)
        return order

    def type(self, text: str, *, given: bool) -> str:
        """A docstring's type; `given`: of a parameter, where a sequence will do for sizes, and an address for a pointer."""
        if text in PLAIN:
            return PLAIN[text]
        if text in self._api.classes:
            return "_Any" if given and text in ("Dims", "Weights") else text
        if inner := re.fullmatch(r"(?:list|[Ss]equence|List)\[(.+)\]", text):
            element = self.type(inner[1], given=given)
            return f"_Sequence[{element}]" if given else f"_b.list[{element}]"
        return "_Any"

    def _class(self, name: str, one: Class, indent: str) -> Iterator[str]:
        if one.members is not None:
            yield f"{indent}class {name}(_enum.IntEnum):"
            for member, value in one.members.items():
                if not keyword.iskeyword(member):
                    yield f"{indent}    {member} = {value}"
            return
        bases = ", ".join(base for base in one.bases if base in self._api.classes)
        yield f"{indent}class {name}({bases}):" if bases else f"{indent}class {name}:"
        inner = f"{indent}    "
        for part, nested in one.nested.items():
            yield from self._class(part, nested, inner)
        yield from (f"{inner}{constant}: _Any" for constant in one.constants if not keyword.iskeyword(constant))
        for part, value in one.properties.items():
            yield from self._property(part, value, inner)
        for part, method in one.methods.items():
            yield from self._method(part, method, inner, within=True)
        yield f"{inner}..."

    def _property(self, name: str, value: Property, indent: str) -> Iterator[str]:
        returns = self.type(signature(value.get[0]).returns, given=False) if value.get else "_Any"
        yield f"{indent}@property"
        yield f"{indent}def {name}(self) -> {returns}: ..."
        if value.set is not None:
            lines = [signature(line).parameters for line in value.set]
            kind = self.type(lines[0][0].type, given=True) if lines and lines[0] else "_Any"
            yield f"{indent}@{name}.setter"
            yield f"{indent}def {name}(self, value: {kind}) -> None: ..."

    def _method(self, name: str, method: Method, indent: str, *, within: bool) -> Iterator[str]:
        bound = within and not method.static
        overloads = list(dict.fromkeys(self._signature(one, bound=bound) for one in method.overloads()))
        if not overloads:
            overloads = [f"({'self, ' if bound else ''}*args: _Any, **kwargs: _Any) -> _Any"]
        for text in overloads:
            if len(overloads) > 1:
                yield f"{indent}@_overload"
            if within and method.static:
                yield f"{indent}@staticmethod"
            text = re.sub(r" -> .*", " -> None", text) if name == "__init__" else text
            yield f"{indent}def {name}{text}: ..."

    def _signature(self, one: Signature, *, bound: bool) -> str:
        parts, optional = ["self"] if bound else [], False
        for parameter in one.parameters:
            if parameter.name.startswith("*"):
                parts.append(f"{parameter.name}: _Any")
                continue
            optional = optional or parameter.optional
            name = f"{parameter.name}_" if keyword.iskeyword(parameter.name) else parameter.name
            parts.append(f"{name}: {self.type(parameter.type, given=True)}{' = ...' if optional else ''}")
        return f"({', '.join(parts)}) -> {self.type(one.returns, given=False)}"


def write(api: Api) -> str:
    """The text of `tensorrt/__init__.pyi`."""
    return Writer(api).text()
