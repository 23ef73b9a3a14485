"""One HTTP connection: parsed requests in, replies out, in order, under deadlines.

It stands on aiohttp's C parser and does what aiohttp's own request handler does not: a deadline for headers, bodies and readers
that stop reading, limits before anything is read, and answers without a task per request (docs/adr/0004). What a request means is
the `Application`'s business; this file knows only HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from http import HTTPStatus
from typing import Any, Protocol

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_exceptions import HTTPException

from appliance.config import HttpConfig
from appliance.core.errors import ApplianceError, ErrorCode, invalid
from appliance.protocols.kserve import error_document, too_large
from appliance.protocols.status import HTTP_STATUS

MAX_PIPELINED = 8
"""Requests parsed ahead on one connection; then reading pauses until they are answered."""

MAX_CHUNK_OVERHEAD_BYTES = 1 << 20
"""What the framing of a chunked body may cost beside its data: about 170,000 chunks of a byte, which is no honest client."""

MAX_HEADERS = 64
MAX_LINE_BYTES = 8190

REASONS = {status.value: status.phrase for status in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Phase(Enum):
    """What a connection is doing, for its deadlines."""

    IDLE = "idle"
    HEADER = "header"
    BODY = "body"
    HANDLING = "handling"


class Application(Protocol):
    """Who answers. Called on the loop; must reply to every exchange, now or later, exactly once."""

    def handle(self, exchange: Exchange) -> None:
        """Begin to answer."""

    def check(self, exchange: Exchange) -> None:
        """ApplianceError to refuse a request by its head, before its body is read."""


class Exchange:
    """One request and the way to answer it."""

    __slots__ = ("_connection", "body", "headers", "keep_alive", "method", "on_gone", "path", "replied")

    def __init__(self, connection: Connection, message: RawRequestMessage) -> None:
        self._connection = connection
        self.method: str = message.method
        self.path: str = message.path
        self.headers: Mapping[str, str] = message.headers
        self.keep_alive = not message.should_close
        self.body: bytes = b""
        self.replied = False
        self.on_gone: Callable[[], None] | None = None

    @property
    def peer(self) -> str:
        """The client's address, for logs."""
        return self._connection.peer

    def reply(self, status: int, parts: list[bytes], head: bytes) -> None:
        """Answer: a status, the body in parts, and header lines (each ended by CRLF) beside those that every reply has."""
        if self.replied:
            raise RuntimeError("answered twice")
        self.replied = True
        self._connection.write_reply(self, status, parts, head)

    def reply_error(self, error: ApplianceError, retry_after_s: float) -> None:
        """Answer with an error: its status, its message as JSON, and when to come back if waiting helps."""
        head = b"Content-Type: application/json\r\n"
        if error.code in (ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE):
            seconds = error.retry_after_s if error.retry_after_s is not None else retry_after_s
            head += b"Retry-After: %d\r\n" % max(1, round(seconds + 0.49))
        self.reply(HTTP_STATUS[error.code], [error_document(error.message)], head)

    def begin_stream(self, content_type: str) -> Callable[[bytes], bool]:
        """Answer with a body that goes on until `close_stream`; the result writes a part and says whether the client keeps up."""
        self.replied = True
        return self._connection.begin_stream(content_type)

    def close_stream(self) -> None:
        """End a streamed body, and with it the connection."""
        self._connection.close()


class Connection(BaseProtocol):
    """The protocol object of one connection."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        config = server.config
        parser = HttpRequestParser(
            self,
            loop,
            # flow control by the size of the whole body: parts are joined once, at the end
            config.max_body_bytes,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,
        )
        super().__init__(loop, parser)
        self._server = server
        self._config = config
        self._messages: deque[tuple[RawRequestMessage, StreamReader]] = deque()
        self._exchange: Exchange | None = None
        self._payload: StreamReader | None = None
        self._closing = False
        self._broken: ApplianceError | None = None
        self._streaming = False
        self._reserved = 0
        self._received = 0
        self.phase = Phase.HEADER
        self.since = time.monotonic()
        self.peer = ""

    # --- the transport's calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came. Beyond the limit it is told so and sent away."""
        super().connection_made(transport)
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) else "unix socket"
        if not self._server.admit(self):
            self._refuse(ApplianceError(ErrorCode.UNAVAILABLE, "too many connections", retry_after_s=1.0))

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone: what it waited for is cancelled."""
        super().connection_lost(exc)
        self._server.forget(self)
        self._release()
        exchange, self._exchange = self._exchange, None
        self._messages.clear()
        self._closing = True
        if exchange is not None and exchange.on_gone is not None:
            exchange.on_gone()

    def data_received(self, data: bytes) -> None:
        """Parse; begin what can begin."""
        if self._closing:
            return
        if self.phase is Phase.IDLE and data:
            self._enter(Phase.HEADER)
        assert self._parser is not None
        try:
            messages, upgraded, _ = self._parser.feed_data(data)
        except (HttpProcessingError, HTTPException, ValueError) as error:
            self._malformed(error)
            return
        if messages:
            self._messages.extend(messages)
            if upgraded:
                # no other protocol is spoken here; the request is answered as it is, and the connection ends with it
                self._closing = True
            if len(self._messages) > MAX_PIPELINED and not self._buffer_paused:
                self._pause_reading_for_buffer()
        if self._payload is not None:
            self._received += len(data)
            self._body_progress()
        elif self._exchange is None and self._messages:
            self._next()

    def eof_received(self) -> bool:
        """The client will send no more. It may still be reading."""
        return self._exchange is not None

    def resume_writing(self) -> None:
        """The client reads again: the next request may be answered."""
        super().resume_writing()
        self.since = time.monotonic()
        if self._exchange is None and self._messages:
            self._next()

    # --- requests ---

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = time.monotonic()

    def _next(self) -> None:
        """Begin the next parsed request."""
        message, payload = self._messages.popleft()
        assert self._parser is not None
        if self._buffer_paused and len(self._messages) <= MAX_PIPELINED // 2:
            self._resume_reading_for_buffer()
        exchange = self._exchange = Exchange(self, message)
        try:
            self._reserve(message, payload)
            self._server.application.check(exchange)
        except ApplianceError as error:
            self._refuse_request(exchange, error, payload)
            return
        if payload.is_eof():
            self._begin(exchange, payload)
            return
        if message.headers.get("Expect", "").lower() == "100-continue" and self.transport is not None:
            self.transport.write(CONTINUE)
        self._payload = payload
        self._received = payload.total_bytes
        self._enter(Phase.BODY)

    def _reserve(self, message: RawRequestMessage, payload: StreamReader) -> None:
        """Check what the body will take, before it is read."""
        if payload.is_eof():
            return
        length = message.headers.get("Content-Length")
        if length is not None and int(length) > self._config.max_body_bytes:
            raise too_large(f"a body of {length} bytes", self._config.max_body_bytes)
        self._reserved = int(length) if length is not None else 0
        self._server.reserve(self._reserved)

    def _release(self) -> None:
        if self._reserved:
            self._server.reserve(-self._reserved)
            self._reserved = 0

    def _body_progress(self) -> None:
        """More of the body has come."""
        payload, exchange = self._payload, self._exchange
        assert payload is not None
        assert exchange is not None
        if payload.exception() is not None:
            self._malformed(payload.exception())
            return
        if payload.total_bytes > self._config.max_body_bytes:
            self._payload = None
            self._refuse_request(exchange, too_large("the body", self._config.max_body_bytes), payload)
            return
        if self._received - payload.total_bytes > MAX_CHUNK_OVERHEAD_BYTES:
            self._payload = None
            self._refuse_request(exchange, invalid("the body comes in chunks that are too small"), payload)
            return
        if payload.is_eof():
            self._payload = None
            self._begin(exchange, payload)

    def _begin(self, exchange: Exchange, payload: StreamReader) -> None:
        self._enter(Phase.HANDLING)
        if payload.total_bytes:
            exchange.body = payload.read_nowait(-1)
        self._server.application.handle(exchange)

    def _refuse_request(self, exchange: Exchange, error: ApplianceError, payload: StreamReader) -> None:
        """Answer without having read the body; the connection cannot go on if some of it is still to come."""
        if not payload.is_eof():
            exchange.keep_alive = False
        self._enter(Phase.HANDLING)
        exchange.reply_error(error, self._config.default_retry_after_s)

    def _malformed(self, error: BaseException | None) -> None:
        """What came is not HTTP: say so once, and hang up."""
        self._server.malformed(self, error)
        self._refuse(ApplianceError(ErrorCode.INVALID_ARGUMENT, "the request is not valid HTTP"))

    def _refuse(self, error: ApplianceError) -> None:
        """An answer outside of any exchange, and the end."""
        self._closing = True
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.on_gone is not None:
            exchange.on_gone()
        if self.transport is not None:
            body = error_document(error.message)
            head = b"Content-Type: application/json\r\n"
            if error.retry_after_s is not None:
                head += b"Retry-After: %d\r\n" % max(1, round(error.retry_after_s))
            self.transport.write(_head(HTTP_STATUS[error.code], len(body), head, keep_alive=False) + body)
            self._server.count(HTTP_STATUS[error.code])
            self.transport.close()

    # --- replies ---

    def write_reply(self, exchange: Exchange, status: int, parts: list[bytes], head: bytes) -> None:
        """Send the answer of the current exchange; then the next request, if the client reads."""
        self._server.count(status)
        self._release()
        if self.transport is None or self._exchange is not exchange:
            return  # the client is gone
        self._exchange = None
        self._payload = None
        keep_alive = exchange.keep_alive and not self._closing and not self._server.closing
        length = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        if exchange.method == "HEAD":
            parts = []
        self.transport.write(b"".join((_head(status, length, head, keep_alive=keep_alive), *parts)))
        if not keep_alive:
            self._closing = True
            self.transport.close()
            return
        self._enter(Phase.IDLE)
        if self._messages and not self.writing_paused:
            # not from here: a client that pipelines must not recurse us to the limit
            self._loop.call_soon(self._next_if_free)

    def _next_if_free(self) -> None:
        if self._messages and self._exchange is None and not self._closing:
            self._next()

    def begin_stream(self, content_type: str) -> Callable[[bytes], bool]:
        """A body without an end of its own: it ends with the connection."""
        self._streaming = True
        self._server.count(200)
        if self.transport is not None:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
                % content_type.encode()
            )
        return self._write_stream

    def _write_stream(self, part: bytes) -> bool:
        if self.transport is None or self._closing:
            return False
        self.transport.write(part)
        return not self.writing_paused

    # --- deadlines ---

    def overdue(self, now: float) -> None:
        """Called now and then by the server: enforce the deadline of whatever goes on."""
        waited = now - self.since
        config = self._config
        if self.transport is None:
            return
        if self._closing or self.writing_paused:
            if waited > config.write_timeout_s:
                self.transport.abort()
        elif self.phase is Phase.IDLE:
            if waited > config.idle_timeout_s:
                self._closing = True
                self.transport.close()
        elif self.phase is Phase.HEADER:
            if waited > config.header_timeout_s:
                self._refuse(ApplianceError(ErrorCode.REQUEST_TIMEOUT, "the request's headers took too long"))
        elif self.phase is Phase.BODY and waited > config.body_timeout_s:
            self._payload = None
            self._refuse(ApplianceError(ErrorCode.REQUEST_TIMEOUT, "the request's body took too long"))

    def close(self) -> None:
        """End now, after what is already written."""
        self._closing = True
        if self.transport is not None:
            self.transport.close()

    def close_if_idle(self) -> None:
        """End unless a request is being read or answered; that one is the last."""
        if self._exchange is None and not self._messages:
            self.close()

    @property
    def busy(self) -> bool:
        """A request is being read or answered, or an answer has not left yet."""
        if self._streaming:
            return False
        unsent = self.transport is not None and self.transport.get_write_buffer_size() > 0
        return self._exchange is not None or unsent


class Server(Protocol):
    """What connections share."""

    config: HttpConfig
    closing: bool

    @property
    def application(self) -> Application:
        """Who answers."""

    def admit(self, connection: Connection) -> bool:
        """Whether there is room for one more."""

    def forget(self, connection: Connection) -> None:
        """It is gone."""

    def reserve(self, nbytes: int) -> None:
        """Take (or give back) room for a body. RESOURCE_EXHAUSTED if there is none."""

    def count(self, status: int) -> None:
        """A reply went out."""

    def malformed(self, connection: Connection, error: Any) -> None:
        """A client does not speak HTTP."""


_LINES: dict[int, bytes] = {}


def _head(status: int, length: int, lines: bytes, *, keep_alive: bool) -> bytes:
    start = _LINES.get(status)
    if start is None:
        reason = REASONS.get(status, "Error")
        start = _LINES[status] = f"HTTP/1.1 {status} {reason}\r\nServer: appliance\r\n".encode()
    end = b"\r\n" if keep_alive else b"Connection: close\r\n\r\n"
    return b"%b%bContent-Length: %d\r\n%b" % (start, lines, length, end)
