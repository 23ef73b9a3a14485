"""gzip and deflate, both ways, within bounds. Other encodings are refused by name: clients that are sent br cannot read it."""

from __future__ import annotations

import gzip
import re
import zlib

from appliance.core.errors import invalid, unsupported
from appliance.protocols.kserve import too_large

MINIMUM_BYTES = 1024
"""Smaller answers are sent as they are: compressing them costs more than it saves on a local link."""

LEVEL = 1
"""The fastest: tensors hardly compress, and the client waits."""

_ACCEPTED = re.compile(r"\s*([A-Za-z0-9*-]+)\s*(?:;\s*q\s*=\s*([0-9.]+))?")


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its Content-Encoding; UNSUPPORTED, INVALID_ARGUMENT, or PAYLOAD_TOO_LARGE before it passes `limit`."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise unsupported(f"Content-Encoding {encoding[:32]!r} is not supported; use gzip or deflate")
    machine = zlib.decompressobj(wbits=31 if name != "deflate" else 15)
    try:
        data = machine.decompress(body, limit + 1)
    except zlib.error as error:
        raise invalid(f"the body is not valid {name}") from error
    if len(data) > limit:
        raise too_large("the inflated body", limit)
    if not machine.eof or machine.unused_data:
        raise invalid(f"the body is not one whole {name} stream")
    return data


def choose(accept: str) -> str:
    """The encoding for an answer: the best that the client accepts of identity, deflate and gzip, "" for identity."""
    best, best_quality = "", 0.0
    for part in accept.split(","):
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


def deflate(body: bytes, encoding: str) -> bytes:
    """The body with that encoding."""
    return gzip.compress(body, LEVEL, mtime=0) if encoding == "gzip" else zlib.compress(body, LEVEL)
