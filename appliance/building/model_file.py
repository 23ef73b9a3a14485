"""A model file as a tree that can be walked safely: parsed, and refused with an exact message where it must not be trusted.

The only home of the package `onnx`'s messages. Executes nothing, and opens no file but the model: of weights that lie in other
files it asks the file system for kind, size and links. Any bytes end in a model or in `InspectError`. Driven by `inspect`.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 2 << 30
"""protobuf reads no message of 2 GiB or more; larger models keep their weights in external data."""

MAX_GRAPH_DEPTH = 16
MAX_NODES = 1_000_000
MAX_TENSOR_BYTES = 1 << 40
MAX_OFFSET = (1 << 63) - 1

WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}
"""Bytes of an element, by TensorProto's numbers; others (8 bits, 4 bits, strings) count as one."""

PARTS = (".", "", "..")


class InspectError(Exception):
    """The file is not a model that can be described."""


def read(path: Path) -> Any:
    """The parsed ModelProto, not yet checked. InspectError: no regular file, of impossible size, or no ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InspectError("is not a regular file")
        if not 0 < status.st_size < MAX_FILE_BYTES:
            raise InspectError(f"has {status.st_size} bytes; a model has between 1 and {MAX_FILE_BYTES - 1}")
        data = path.read_bytes()
    except OSError as error:
        raise InspectError(f"cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        # protobuf itself refuses messages nested deeper than 100
        model.ParseFromString(data)
    except (DecodeError, ValueError, RecursionError, MemoryError) as error:
        raise InspectError("is not ONNX, or is cut off: its protobuf does not parse") from error
    if not model.HasField("graph") or not model.graph.node:
        raise InspectError("parses, but holds no graph: it is not ONNX, or is cut off")
    return model


class Contents:
    """Every node and weight of a model, in all graphs and functions. Constructing it checks; InspectError says what is wrong."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.constants: list[Any] = []
        self.graphs: list[Any] = []
        self.external: tuple[str, ...] = ()
        if model.training_info:
            raise InspectError("carries training information (training_info): export it for inference")
        self._graph(model.graph, 0)
        for function in model.functions:
            self._nodes(function.node, 0)
        refuse_recursion(model.functions)
        for tensor in (*self.weights, *self.constants):
            refuse_size(tensor)
        self.external = self._external(folder)

    def _graph(self, graph: Any, depth: int) -> None:
        if depth > MAX_GRAPH_DEPTH:
            raise InspectError(f"nests graphs deeper than {MAX_GRAPH_DEPTH} levels")
        if graph.sparse_initializer:
            raise InspectError("keeps weights in sparse form (sparse_initializer): export them dense")
        self.graphs.append(graph)
        self.weights.extend(graph.initializer)
        self._nodes(graph.node, depth)

    def _nodes(self, nodes: Any, depth: int) -> None:
        self.nodes.extend(nodes)
        if len(self.nodes) > MAX_NODES:
            raise InspectError(f"holds more than {MAX_NODES} nodes")
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    raise InspectError(f"keeps a sparse tensor in attribute {attribute.name!r}: export it dense")
                self.constants.extend(attribute.tensors)
                if attribute.HasField("t"):
                    self.constants.append(attribute.t)
                for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                    self._graph(inner, depth + 1)

    def _external(self, folder: Path) -> tuple[str, ...]:
        sizes: dict[str, int] = {}
        for tensor in (*self.weights, *self.constants):
            if not tensor.external_data and tensor.data_location != 1:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            name = entries.get("location", "")
            if name not in sizes:
                sizes[name] = external_size(folder, name)
            refuse_place(tensor, name, entries, sizes[name])
        return tuple(sorted(sizes))


def refuse_recursion(functions: Any) -> None:
    """InspectError if functions of the model call each other in a circle. Iterative: the chain may be long."""
    bodies = {(one.domain, one.name): [(node.domain, node.op_type) for node in one.node] for one in functions}
    if len(bodies) != len(functions):
        raise InspectError("defines a function twice")
    done: set[tuple[str, str]] = set()
    for start in bodies:
        path: list[tuple[tuple[str, str], Iterator[tuple[str, str]]]] = [(start, iter(bodies[start]))]
        within = {start}
        while path:
            name, calls = path[-1]
            callee = next((call for call in calls if call in bodies and call not in done), None)
            if callee is None:
                done.add(name)
                within.discard(name)
                path.pop()
            elif callee in within:
                raise InspectError(f"has a function that calls itself: {callee[1]!r}")
            else:
                within.add(callee)
                path.append((callee, iter(bodies[callee])))


def elements(tensor: Any) -> int:
    """How many there are."""
    return math.prod(int(size) for size in tensor.dims)


def nbytes(tensor: Any) -> int:
    """How many bytes they take."""
    return elements(tensor) * WIDTHS.get(tensor.data_type, 1)


def refuse_size(tensor: Any) -> None:
    """InspectError for a shape that no tensor has."""
    total = WIDTHS.get(tensor.data_type, 1)
    for size in tensor.dims:
        if size < 0:
            raise InspectError(f"has a weight {tensor.name!r} with a negative size: {list(tensor.dims)[:8]}")
        total *= max(int(size), 1)
        if total > MAX_TENSOR_BYTES:
            raise InspectError(
                f"has a weight {tensor.name!r} of more than {MAX_TENSOR_BYTES} bytes: {list(tensor.dims)[:8]}"
            )


def external_size(folder: Path, name: str) -> int:
    """Bytes of a file that weights lie in. InspectError unless it is a regular file within the folder, reached by no link."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or name.startswith("/") or any(part in PARTS for part in parts):
        raise InspectError(f"keeps weights in {name!r}, outside its folder or not a plain path within it")
    place = folder
    try:
        for part in parts:
            place = place / part
            status = os.lstat(place)
            if stat.S_ISLNK(status.st_mode):
                raise InspectError(f"keeps weights in {name!r}, which is reached by a symbolic link: copy the file")
    except (OSError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else "no name of a file"
        raise InspectError(f"keeps weights in {name!r}, which cannot be had: {words}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InspectError(f"keeps weights in {name!r}, which is no regular file")
    if status.st_nlink > 1:
        raise InspectError(f"keeps weights in {name!r}, which has hard links: copy the file")
    return status.st_size


def refuse_place(tensor: Any, name: str, entries: dict[str, str], file_bytes: int) -> None:
    """InspectError if a weight does not lie within its file, or not with the size that it says."""
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key, "")
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
        if text and (not text.isascii() or not text.isdigit() or len(text) >= 20 or number > MAX_OFFSET):
            raise InspectError(
                f"has a weight {tensor.name!r} with {key} {text[:40]!r} in {name!r}; it must be 0 to {MAX_OFFSET}"
            )
        numbers[key] = number
    size = nbytes(tensor)
    length = numbers["length"] if entries.get("length") else size
    if tensor.data_type in WIDTHS and length < size:
        raise InspectError(f"has a weight {tensor.name!r} of {size} bytes, with only {length} in {name!r}")
    if numbers["offset"] + length > file_bytes:
        raise InspectError(
            f"has a weight {tensor.name!r} at bytes {numbers['offset']} to {numbers['offset'] + length} of {name!r}, "
            f"which has {file_bytes}"
        )
