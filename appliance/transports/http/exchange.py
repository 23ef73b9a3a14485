"""One request and the way to answer it: what a connection gives to the application.

It knows the connection only as somebody who writes replies, and of HTTP only what every reply needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from aiohttp.http import HttpVersion11
from aiohttp.http_parser import RawRequestMessage

from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.tensor import Buffer
from appliance.protocols.kserve import error_document
from appliance.protocols.status import HTTP_STATUS

JSON_HEAD = b"Content-Type: application/json\r\n"


class Channel(Protocol):
    """The connection, as an exchange uses it."""

    default_retry_after_s: float

    def write_reply(self, exchange: Exchange, status: int, parts: Sequence[Buffer], head: bytes) -> None:
        """Send an answer; nobody reads it if the client is gone."""

    def reserve(self, nbytes: int) -> None:
        """Take room until the answer is given. RESOURCE_EXHAUSTED if there is none."""

    def begin_stream(self, content_type: str) -> Callable[[bytes], bool]:
        """Begin a body without an end of its own; the result writes a part and says whether the client keeps up."""

    def close(self) -> None:
        """End, once what is written has left."""


class Exchange:
    """One request and the way to answer it."""

    __slots__ = (
        "_connection",
        "body",
        "headers",
        "keep_alive",
        "legacy",
        "method",
        "on_gone",
        "path",
        "replied",
        "unread",
    )

    def __init__(self, connection: Channel, message: RawRequestMessage, *, unread: bool) -> None:
        self._connection = connection
        self.method: str = message.method
        self.path: str = message.path
        self.headers: Mapping[str, str] = message.headers
        self.keep_alive = not message.should_close
        self.legacy = message.version < HttpVersion11
        self.unread = unread
        self.body: Buffer = b""
        self.replied = False
        self.on_gone: Callable[[], None] | None = None

    def reply(self, status: int, parts: Sequence[Buffer], head: bytes) -> None:
        """Answer: a status, the body in parts, and header lines (each ended by CRLF) beside those that every reply has."""
        if self.replied:
            raise RuntimeError("answered twice")
        self.replied = True
        self._connection.write_reply(self, status, parts, head)

    def reply_error(self, error: ApplianceError, more: bytes = b"") -> None:
        """Answer with an error: its status, its message as JSON, when to come back if waiting helps, and more header lines."""
        self.reply(
            HTTP_STATUS[error.code],
            [error_document(error.message)],
            error_head(error, self._connection.default_retry_after_s) + more,
        )

    def reserve(self, nbytes: int) -> None:
        """Take room for more bytes until the answer is given. RESOURCE_EXHAUSTED if there is none."""
        self._connection.reserve(nbytes)

    def begin_stream(self, content_type: str) -> Callable[[bytes], bool]:
        """Answer with a body that goes on until `close_stream`; the result writes a part and says whether the client keeps up."""
        self.replied = True
        return self._connection.begin_stream(content_type)

    def close_stream(self) -> None:
        """End a streamed body, and with it the connection."""
        self._connection.close()


class Application(Protocol):
    """Who answers. Called on the loop; must reply to every exchange, now or later, exactly once."""

    def check(self, exchange: Exchange) -> int:
        """By the head alone: the bytes that the body may have. May answer at once; then nothing more is read."""

    def handle(self, exchange: Exchange) -> None:
        """Begin to answer."""

    def bug(self) -> ApplianceError:
        """An exception that nobody expected is being handled: log it, and give what the client may know."""


def error_head(error: ApplianceError, default_retry_after_s: float) -> bytes:
    """The header lines of an error: when to come back, if waiting helps."""
    if error.code not in (ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE):
        return JSON_HEAD
    seconds = error.retry_after_s if error.retry_after_s is not None else default_retry_after_s
    return JSON_HEAD + b"Retry-After: %d\r\n" % max(1, math.ceil(seconds))
