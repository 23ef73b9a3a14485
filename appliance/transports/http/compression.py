"""gzip and deflate, both ways, within bounds. Other encodings are refused by name: clients that are sent br cannot read it.

Both directions work in steps of a few milliseconds, so that a body of many megabytes does not hold up everybody else; whoever
drives them decides what happens between two steps.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from appliance.core.errors import ApplianceError, ErrorCode, invalid
from appliance.core.tensor import Buffer
from appliance.protocols.kserve import too_large

MINIMUM_BYTES = 1024
"""Smaller answers are sent as they are: compressing them costs more than it saves on a local link."""

LEVEL = 1
"""The fastest: tensors hardly compress, and the client waits."""

STEP_BYTES = 512 << 10
INPUT_BYTES = 64 << 10

GZIP_BITS = 31
ZLIB_BITS = 15

Pieces: TypeAlias = Iterator[bytes]

_ACCEPTED = re.compile(r"\s*([A-Za-z0-9*-]+)\s*(?:;\s*q\s*=\s*([0-9.]{1,5}))?\s*$")


class UnsupportedEncodingError(ApplianceError):
    """UNSUPPORTED, and the answer lists what is."""

    __slots__ = ()

    def __init__(self, encoding: str) -> None:
        super().__init__(
            ErrorCode.UNSUPPORTED, f"Content-Encoding {encoding[:32]!r} is not supported; use gzip or deflate"
        )


class Inflation:
    """A body on its way out of its Content-Encoding. Call `step` until it says True, then take `data`."""

    def __init__(self, body: Buffer, encoding: str, limit: int) -> None:
        name = encoding.strip().lower()
        if name not in ("gzip", "x-gzip", "deflate"):
            raise UnsupportedEncodingError(encoding)
        self._machine = zlib.decompressobj(wbits=ZLIB_BITS if name == "deflate" else GZIP_BITS)
        self._name = name
        self._limit = limit
        self._rest = memoryview(body)
        self._parts: list[bytes] = []
        self.nbytes = 0

    def step(self) -> bool:
        """Inflate some more; True at the end.

        INVALID_ARGUMENT unless the body is exactly one stream; PAYLOAD_TOO_LARGE as soon as it passes the limit.
        """
        machine = self._machine
        budget = STEP_BYTES
        while budget > 0:
            if machine.eof:
                if machine.unused_data or len(self._rest):
                    raise self._broken()
                return True
            piece: Buffer = machine.unconsumed_tail
            if not piece:
                piece, self._rest = self._rest[:INPUT_BYTES], self._rest[INPUT_BYTES:]
            try:
                data = machine.decompress(piece, budget)
            except zlib.error as error:
                raise self._broken() from error
            if not data and not len(piece) and not machine.eof:
                raise self._broken()  # it ends in the middle
            self._parts.append(data)
            self.nbytes += len(data)
            if self.nbytes > self._limit:
                raise too_large("the inflated body", self._limit)
            budget -= max(len(data), len(piece) // 2)
        return False

    def _broken(self) -> ApplianceError:
        return invalid(f"the body is not one whole {self._name} stream")

    @property
    def data(self) -> bytes:
        """The body, once `step` has said True."""
        return b"".join(self._parts)


def encoded(content_encoding: str | None) -> bool:
    """Whether a Content-Encoding means that there is something to undo."""
    return content_encoding is not None and content_encoding.strip().lower() not in ("", "identity")


def choose(accept: str, *, tensors: bool) -> str:
    """The encoding for an answer: the best that the client accepts of identity, deflate and gzip, "" for identity.

    Tensors are compressed only for a client that names one coding. HTTP libraries list all they know in every request without
    anybody having asked, and a megabyte of float32 costs 40 ms to become a tenth smaller.
    """
    best, best_quality = "", 0.0
    codings = accept.split(",")
    if tensors and len(codings) > 1:
        return ""
    for part in codings:
        match = _ACCEPTED.match(part)
        if match is None:
            continue
        name = match[1].lower()
        try:
            quality = float(match[2]) if match[2] else 1.0
        except ValueError:
            continue
        if name in ("gzip", "deflate", "identity") and quality > best_quality:
            best, best_quality = name, quality
    return "" if best == "identity" else best


def compress(parts: Sequence[Buffer], encoding: str) -> Pieces:
    """The parts as one stream of that encoding, in pieces of some work each."""
    machine = zlib.compressobj(LEVEL, wbits=GZIP_BITS if encoding == "gzip" else ZLIB_BITS)
    for part in parts:
        rest = memoryview(part)
        while len(rest):
            yield machine.compress(rest[:STEP_BYTES])
            rest = rest[STEP_BYTES:]
    yield machine.flush()
