"""A library's message in words for people and clients: no places in the library's source, no directories of this box.

Messages end up in the repository's index and in answers, which programs elsewhere read. Knows no library; takes text, gives text.
"""

from __future__ import annotations

import re

SOURCE_PLACE = re.compile(r"(?: In \w+)? at /\S+?:\d+\)?|\[\S+::\w+::\d+\] ")
"""TensorRT's forms."""

SIGNATURE_PLACE = re.compile(r"/\S+\.(?:cc|cpp|cu|cuh|h|hpp):\d+ (?=[^'\"(]*::[^'\"(]*\()")
"""ONNX Runtime's: "/onnxruntime_src/….cc:46 void onnxruntime::function(int, bool) ", and then what it has to say."""

AFTER_PARAMETERS = re.compile(r"(?:::<lambda[^>]*>)?(?: const)?(?: \[with [^\]]*\])? ?")

MOST_CHARACTERS = 8192
"""Of a message; names in a model may be of any length, and nobody reads so much."""

PATH = re.compile(
    r"(?<![\w.])(?<!Name:')(?<!name: )(?<!name ')(?<!Node: )(?<!Node \()(?<!node \()"
    r"/(?:[^\s/:;,'\"()]+/)+[^\s:;,'\"()]*"
)
"""Absolute paths, but for names of nodes, which PyTorch's exporter gives the same form: "/encoder/layer.0/MatMul"."""


def clean(text: str) -> str:
    """The text without source places and signatures, and with only the last part of each absolute path."""
    text = SOURCE_PLACE.sub("", _without_signatures(text[:MOST_CHARACTERS]))
    return PATH.sub(lambda found: found[0].rpartition("/")[2], text).strip()


def _without_signatures(text: str) -> str:
    """Without what a C++ library says of where it was: file, line and function."""
    kept, begin = [], 0
    while place := SIGNATURE_PLACE.search(text, begin):
        kept.append(text[begin : place.start()])
        begin = _after_parameters(text, text.index("(", place.end()))
    return "".join([*kept, text[begin:]])


def _after_parameters(text: str, begin: int) -> int:
    """Where the message begins, given where the function's parameters do; parentheses nest. The end if they do not close."""
    depth = 0
    for index in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        # "operator()" has a second pair
        if depth == 0 and text[index + 1 : index + 2] != "(":
            after = AFTER_PARAMETERS.match(text, index + 1)
            return after.end() if after is not None else index + 1
    return len(text)
