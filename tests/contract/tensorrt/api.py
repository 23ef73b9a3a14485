"""An API as values: classes, methods with the parameters that pybind11 writes into docstrings, properties, enum members."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

NAMESPACES = re.compile(
    r"\b\w+\.tensorrt(_\w+)?\.|nvinfer1::|nvonnxparser::|typing_extensions\.|typing\.|collections\.abc\."
)
STARS = ("*", "/")


class Parameter(msgspec.Struct, frozen=True):
    """One parameter, without `self`; its type is the docstring's text, with namespaces taken off."""

    name: str
    type: str
    optional: bool


class Signature(msgspec.Struct, frozen=True):
    """One overload."""

    parameters: tuple[Parameter, ...]
    returns: str

    def refuses(self, positional: int, keywords: tuple[str, ...]) -> str:
        """Why a call with so many positional arguments and these keywords does not fit; empty if it does."""
        names = [parameter.name for parameter in self.parameters]
        if any(name.startswith("*") for name in names):
            return ""
        if positional > len(names):
            return f"takes {len(names)} arguments, not {positional}"
        for keyword in keywords:
            if keyword not in names[positional:]:
                return f"has no parameter {keyword!r}"
        given = {*names[:positional], *keywords}
        short = [
            parameter.name for parameter in self.parameters if parameter.name not in given and not parameter.optional
        ]
        return f"is not given {short[0]!r}" if short else ""


def _parts(text: str) -> Iterator[str]:
    """Split at the commas that stand in no bracket."""
    depth, part = 0, ""
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += letter
    if part.strip():
        yield part.strip()


def signature(line: str, *, bound: bool = True) -> Signature:
    """`"2. name(self: A, x: int = 0) -> B"` taken apart. ValueError for a line that is none."""
    head, arrow, returns = line.rpartition(") -> ")
    if not arrow or "(" not in head:
        raise ValueError(f"no signature: {line!r}")
    parameters = []
    for position, part in enumerate(_parts(head.partition("(")[2])):
        if part in STARS or (bound and position == 0 and re.match(r"(self|arg0)\b", part)):
            continue
        name, _, rest = part.partition(":")
        kind, equals, _ = rest.partition("=")
        parameters.append(Parameter(name.strip(), NAMESPACES.sub("", kind.strip()), bool(equals)))
    return Signature(tuple(parameters), NAMESPACES.sub("", returns.strip()))


class Method(msgspec.Struct, frozen=True):
    """Its overloads as written; none: of Python, with parameters unknown."""

    signatures: list[str]
    static: bool = False

    def overloads(self) -> list[Signature]:
        """The overloads, taken apart."""
        return [signature(line, bound=not self.static) for line in self.signatures]


class Property(msgspec.Struct, frozen=True):
    """`set` is None for one that is read only."""

    get: list[str]
    set: list[str] | None


class Class(msgspec.Struct, frozen=True):
    """`members` is None for what is no enumeration. `text` is the docstring: it names callbacks that have no binding."""

    bases: list[str]
    text: str = ""
    members: dict[str, int] | None = None
    methods: dict[str, Method] = {}
    properties: dict[str, Property] = {}
    nested: dict[str, Class] = {}
    constants: list[str] = []


class Api(msgspec.Struct, frozen=True):
    """One release."""

    version: str
    classes: dict[str, Class]
    functions: dict[str, list[str]]
    attributes: dict[str, str]

    @property
    def rtx(self) -> bool:
        """Whether this is the RTX flavour, which counts its releases from 1."""
        return self.version.startswith("1.")

    def lineage(self, name: str) -> Iterator[Class]:
        """A class and those it inherits from, nearest first. `name` may be dotted: a class within a class."""
        outer, *inner = name.split(".")
        found = self.classes.get(outer)
        for part in inner:
            found = found.nested.get(part) if found is not None else None
        if found is not None:
            yield found
            for base in found.bases:
                yield from self.lineage(base)

    def method(self, owner: str, name: str) -> Method | None:
        """A method of a class or its bases."""
        return next((one.methods[name] for one in self.lineage(owner) if name in one.methods), None)

    def has(self, owner: str, name: str) -> bool:
        """Whether a class, or one it inherits from, has a member of any kind by that name."""
        return any(
            name in one.methods
            or name in one.properties
            or name in one.nested
            or name in one.constants
            or name in (one.members or {})
            or (one.members is not None and name in ("name", "value"))
            for one in self.lineage(owner)
        )

    def everywhere(self) -> Iterator[Class]:
        """Every class, nested ones too."""
        waiting = list(self.classes.values())
        while waiting:
            one = waiting.pop()
            yield one
            waiting += one.nested.values()
