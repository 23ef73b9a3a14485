"""One HTTP connection: parsed requests in, replies out, in order, under deadlines.

It stands on aiohttp's C parser and does what aiohttp's own request handler does not: deadlines for headers, bodies and readers
that stop reading, limits before anything is read, and answers without a task per request. What a request means is the
`Application`'s business, what connections share the `Server`'s; this file knows only HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from http import HTTPStatus
from typing import Protocol

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from appliance.config import HttpConfig
from appliance.core.errors import ApplianceError, ErrorCode, invalid
from appliance.core.tensor import Buffer
from appliance.protocols.kserve import error_document, too_large
from appliance.protocols.status import HTTP_STATUS
from appliance.transports.http.body import DIRECT_BYTES, BodyReader
from appliance.transports.http.exchange import Application, Exchange, error_head

MAX_PIPELINED = 8
"""Requests parsed ahead on one connection; the rest waits as bytes, and reading pauses."""

CHUNK_OVERHEAD_BYTES = 64 << 10
CHUNK_OVERHEAD_SHARE = 8
"""What the framing of a chunked body may cost: this much, and an eighth of its data. An honest client's chunks are not of one
byte, and each of them costs us about a microsecond."""

MAX_HEADERS = 64
MAX_LINE_BYTES = 8190
NO_FLOW_CONTROL = (1 << 31) - 1
"""Above every body: the parser's own flow control stays out of the way."""

JOINED_BYTES = 64 << 10
"""Parts of an answer below this are joined into one buffer, larger ones are handed to the socket as they are."""

LINGER_S = 2.0
"""How long we go on reading, and throwing away, what a refused client still sends: closing at once would reset the connection
under the answer, and the client would never see it."""

STREAM_BACKLOG_BYTES = 256 << 10
"""What may wait for the reader of a stream; one that falls further behind is cut off."""

KEEP = b"Connection: keep-alive\r\n"
CLOSE = b"Connection: close\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REASONS = {status.value: status.phrase for status in HTTPStatus}


class Phase(Enum):
    """What a connection is doing, for its deadlines."""

    IDLE = "idle"
    HEADER = "header"
    BODY = "body"
    HANDLING = "handling"
    LINGERING = "lingering"


class Connection(BaseProtocol):
    """The protocol object of one connection."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._server = server
        self._config = server.config
        self.default_retry_after_s = server.config.default_retry_after_s
        self._messages: deque[tuple[RawRequestMessage, StreamReader]] = deque()
        self._exchange: Exchange | None = None
        self._payload: StreamReader | None = None
        self._body_limit = 0
        self._direct = False
        self._last = False  # no request may follow the present one
        self._broken: BaseException | None = None  # what followed the requests in `_messages` was not HTTP
        self._held = False
        self._crowded = False
        self._streaming = False
        self._reserved = 0
        self._received = 0
        self._written = 0
        self._mark = 0  # bytes that must have left …
        self._mark_since = 0.0  # … within the write deadline from here
        self.phase = Phase.HEADER
        self.since = time.monotonic()
        self.peer = ""
        self._new_parser()

    def _new_parser(self) -> None:
        self._requests = HttpRequestParser(
            self,
            self._loop,
            NO_FLOW_CONTROL,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,
            max_msg_queue_size=MAX_PIPELINED,
        )

    # --- the transport's calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came. Beyond the limit it is told so and sent away."""
        super().connection_made(transport)
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) else "unix socket"
        refusal = self._server.admit(self)
        if refusal is not None:
            self._refuse("connections", refusal)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone: what it waited for is cancelled."""
        super().connection_lost(exc)
        self._server.forget(self)
        self._messages.clear()
        self._payload = None
        self._give_up()
        self._release()

    def data_received(self, data: bytes) -> None:
        """Parse; begin what can begin. An exception of ours ends this connection and no other."""
        if self.phase is Phase.LINGERING:
            return
        try:
            self._receive(data)
        except Exception:
            self._refuse("bug", self._server.application.bug())

    def eof_received(self) -> bool:
        """The client will send no more, which from a client in the middle of things means that it is gone."""
        return False

    def pause_writing(self) -> None:
        """The client reads more slowly than we write; the sweep looks after it."""
        self._paused = True

    def resume_writing(self) -> None:
        """The client reads again: its next request may be answered."""
        super().resume_writing()
        self._advance()

    # --- the body streams' calls: flow control is ours, by connection and not by body ---

    def pause_reading(self) -> None:
        """A body holds more than it should, which our limits see to."""

    def resume_reading(self, resume_parser: bool = True) -> None:
        """A body was read, which is no reason to read on: the next request may be waiting already."""

    # --- requests ---

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = time.monotonic()

    def _receive(self, data: bytes) -> None:
        if self._last:
            return
        if self.phase is Phase.IDLE and data:
            self._enter(Phase.HEADER)
        if self._payload is not None:
            self._received += len(data)
        try:
            messages, upgraded, _ = self._requests.feed_data(data)
        except Exception as error:  # whatever its parser trips over, the client sent it
            self._broken = error
        else:
            if messages:
                self._messages.extend(messages)
                self._crowded = len(self._messages) >= MAX_PIPELINED
                # no other protocol is spoken here: the request is answered as it is, and the connection ends with it
                self._last = self._last or upgraded
        if self._payload is not None:
            self._body_progress(self._payload)
        elif self._exchange is None:
            self._advance()
        if self._pending and self.phase not in (Phase.BODY, Phase.LINGERING):
            self._hold()

    @property
    def _pending(self) -> bool:
        """More than the present request has come."""
        return bool(self._messages) or self._crowded or self._broken is not None

    def _advance(self) -> None:
        """Begin the next request, if the client reads our answers, and go on reading when all have begun."""
        if self._exchange is not None or self._paused or self.phase is Phase.LINGERING or self.transport is None:
            return
        if self._messages:
            self._next()
        elif self._crowded:
            # the parser has stopped between two requests; what it kept is parsed now
            self._crowded = False
            self.data_received(b"")
        elif self._broken is not None:
            self._server.malformed(self, self._broken)
            self._refuse("malformed", ApplianceError(ErrorCode.INVALID_ARGUMENT, "the request is not valid HTTP"))
        else:
            self._resume()

    def _hold(self) -> None:
        """Read no further: what is here must be answered first."""
        if self.phase is Phase.HEADER:
            self._enter(Phase.IDLE)  # the headers are here; it is we who wait, for the client to read
        if not self._held and self.transport is not None:
            self._held = True
            self.transport.pause_reading()

    def _next(self) -> None:
        message, payload = self._messages.popleft()
        self._requests.message_consumed()
        exchange = self._exchange = Exchange(self, message, unread=not payload.is_eof())
        limit = self._body_limit = self._server.application.check(exchange)
        if exchange.replied:
            return
        if not exchange.unread:
            if payload.total_bytes > limit:
                self._too_large(payload.total_bytes)
            elif self._room(payload.total_bytes):
                self._begin(payload.read_nowait(-1))
            return
        length = message.headers.get("Content-Length")
        if length is not None and int(length) > limit:
            self._too_large(int(length))
        elif self._room(payload.total_bytes if length is None else int(length)):
            if not exchange.legacy and message.headers.get("Expect", "").lower() == "100-continue":
                self._write(CONTINUE)
            self._payload = payload
            self._received = payload.total_bytes
            self._crowded = False  # in the middle of a body the parser keeps nothing back
            self._enter(Phase.BODY)
            self._resume()
            if length is not None and int(length) - payload.total_bytes >= DIRECT_BYTES:
                self._read_directly(int(length), payload)

    def _resume(self) -> None:
        if self._held and self.transport is not None:
            self._held = False
            self.transport.resume_reading()

    def _room(self, nbytes: int) -> bool:
        """Whether the body has room in memory; the client is told if not."""
        try:
            self.reserve(nbytes)
        except ApplianceError as error:
            self._refuse_body(error)
            return False
        return True

    def reserve(self, nbytes: int) -> None:
        """Take room until the present answer is given. RESOURCE_EXHAUSTED if there is none."""
        self._server.reserve(nbytes)
        self._reserved += nbytes

    def _release(self) -> None:
        if self._reserved:
            self._server.reserve(-self._reserved)
            self._reserved = 0

    def _body_progress(self, payload: StreamReader) -> None:
        """More of the body has come."""
        total = payload.total_bytes
        if self._broken is not None:
            self._payload = None
            self._server.malformed(self, self._broken)
            self._refuse("malformed", invalid("the request's body is not framed as HTTP wants it"))
        elif total > self._body_limit:
            self._too_large(total)
        elif total > self._reserved and not self._room(total - self._reserved):
            return
        elif payload.is_eof():
            self._payload = None
            self._begin(payload.read_nowait(-1))
        elif self._received - total > CHUNK_OVERHEAD_BYTES + total // CHUNK_OVERHEAD_SHARE:
            # only now: behind the end of a body, what was received may be the next request
            self._server.refused("tiny_chunks")
            self._refuse_body(invalid("the body comes in chunks that are too small"))

    def _begin(self, body: Buffer) -> None:
        exchange = self._exchange
        assert exchange is not None
        exchange.body = body
        exchange.unread = False
        self._enter(Phase.HANDLING)
        self._server.application.handle(exchange)

    # --- large bodies ---

    def _read_directly(self, length: int, payload: StreamReader) -> None:
        """Receive the rest of a body of known length straight into one buffer: the parser would copy it twice more."""
        assert self.transport is not None
        self._payload = None
        self._direct = True
        # the transport chooses its way of reading when reading starts
        self.transport.pause_reading()
        self.transport.set_protocol(BodyReader(self, length, payload.read_nowait(-1) if payload.total_bytes else b""))
        self.transport.resume_reading()

    def _read_parsed(self) -> None:
        """Back to the parser; a new one, since the old one still waits for the body."""
        self._direct = False
        self._new_parser()
        if self.transport is not None:
            self.transport.pause_reading()
            self.transport.set_protocol(self)
            self.transport.resume_reading()

    def body_complete(self, body: memoryview) -> None:
        """All of a directly received body is here."""
        self._read_parsed()
        try:
            self._begin(body)
        except Exception:
            self._refuse("bug", self._server.application.bug())

    # --- refusals ---

    def _too_large(self, nbytes: int) -> None:
        self._server.refused("body_too_large")
        self._refuse_body(too_large(f"a body of {nbytes} bytes", self._body_limit))

    def _refuse_body(self, error: ApplianceError) -> None:
        """Answer the present request without (all of) its body."""
        self._payload = None
        assert self._exchange is not None
        self._exchange.reply_error(error)

    def _refuse(self, reason: str, error: ApplianceError) -> None:
        """An answer outside of any exchange, and the end."""
        self._server.refused(reason)
        if self._direct:
            self._read_parsed()
        self._payload = None
        status = HTTP_STATUS[error.code]
        if self.transport is None or self.transport.is_closing():
            return
        if self._exchange is None or not self._exchange.replied:
            body = error_document(error.message)
            self._write(self._head(status, len(body), error_head(error, self.default_retry_after_s), CLOSE) + body)
            self._server.count(status)
        self._give_up()
        self._release()
        self._end(linger=True)

    def _give_up(self) -> None:
        """Nobody will read the answer of the present exchange."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.on_gone is not None:
            exchange.on_gone()

    def _end(self, *, linger: bool) -> None:
        """Close, once what is written has left; reading on for a moment if the client may still be sending."""
        self._messages.clear()
        if self.transport is None:
            return
        if linger and not self.transport.is_closing():
            self._enter(Phase.LINGERING)
            self.transport.write_eof()
            self._resume()
        else:
            self.transport.close()

    # --- replies ---

    def _head(self, status: int, length: int, lines: bytes, more: bytes) -> bytes:
        return b"%b%b%b%bContent-Length: %d\r\n\r\n" % (_status_line(status), self._server.date, lines, more, length)

    def _write(self, data: Buffer) -> None:
        assert self.transport is not None
        self._written += len(data)
        self.transport.write(data)

    def write_reply(self, exchange: Exchange, status: int, parts: Sequence[Buffer], head: bytes) -> None:
        """Send the answer of the current exchange; then the next request, if the client reads."""
        self._release()
        if self.transport is None or self.transport.is_closing() or self._exchange is not exchange:
            return  # the client is gone, or told to go
        self._server.count(status)
        self._exchange = None
        keep_alive = exchange.keep_alive and not exchange.unread and not self._server.closing
        if self._last and not self._messages:
            keep_alive = False
        more = CLOSE if not keep_alive else KEEP if exchange.legacy else b""
        size = sum(map(len, parts))
        start = self._head(status, size, head, more)
        if exchange.method == "HEAD":
            self._write(start)
        elif size < JOINED_BYTES:
            self._write(b"".join((start, *parts)))
        else:
            self._write(start)
            for part in parts:
                self._write(part)
        if not keep_alive:
            self._end(linger=exchange.unread)
            return
        self._enter(Phase.IDLE)
        if self._held or self._pending:
            # not from here: a client that pipelines must not recurse us to the limit
            self._loop.call_soon(self._advance)

    def begin_stream(self, content_type: str) -> Callable[[bytes], bool]:
        """A body without an end of its own: it ends with the connection."""
        self._streaming = True
        self._server.count(200)
        if self.transport is not None:
            lines = b"Content-Type: %b\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n" % content_type.encode()
            self._write(_status_line(200) + self._server.date + lines)
        return self._write_stream

    def _write_stream(self, part: bytes) -> bool:
        if self.transport is None or self.transport.is_closing():
            return False
        self._write(part)
        return self.transport.get_write_buffer_size() <= STREAM_BACKLOG_BYTES

    # --- deadlines ---

    def overdue(self, now: float) -> None:
        """Called now and then by the server: enforce the deadline of whatever goes on."""
        if self.transport is None:
            return
        if self._stuck(now):
            self._server.refused("write_deadline")
            self.transport.abort()
            return
        waited = now - self.since
        config = self._config
        if self.phase is Phase.IDLE:
            if waited > config.idle_timeout_s:
                self.close()
        elif self.phase is Phase.HEADER:
            if waited > config.header_timeout_s:
                self._refuse(
                    "header_deadline", ApplianceError(ErrorCode.REQUEST_TIMEOUT, "the request's headers took too long")
                )
        elif self.phase is Phase.BODY:
            if waited > config.body_timeout_s:
                self._refuse(
                    "body_deadline", ApplianceError(ErrorCode.REQUEST_TIMEOUT, "the request's body took too long")
                )
        elif self.phase is Phase.LINGERING and waited > LINGER_S:
            self.transport.abort()

    def _stuck(self, now: float) -> bool:
        """Whether bytes that were waiting a write deadline ago still wait."""
        assert self.transport is not None
        unsent = self.transport.get_write_buffer_size()
        if not unsent or self._written - unsent >= self._mark:
            self._mark = self._written
            self._mark_since = now
            return False
        return now - self._mark_since > self._config.write_timeout_s

    def close(self) -> None:
        """End now, after what is already written."""
        self._end(linger=False)

    def close_if_idle(self) -> None:
        """End unless a request is being read or answered; that one is the last."""
        if self.phase in (Phase.IDLE, Phase.HEADER) and not self._messages:
            self.close()

    @property
    def busy(self) -> bool:
        """A request is being read or answered, or an answer has not left yet."""
        if self._streaming or self.transport is None:
            return False
        return self._exchange is not None or self.transport.get_write_buffer_size() > 0


class Server(Protocol):
    """What connections share."""

    config: HttpConfig
    closing: bool
    date: bytes

    @property
    def application(self) -> Application:
        """Who answers."""

    def admit(self, connection: Connection) -> ApplianceError | None:
        """UNAVAILABLE if there is no room for one more."""

    def forget(self, connection: Connection) -> None:
        """It is gone."""

    def reserve(self, nbytes: int) -> None:
        """Take (or give back) room for a body. RESOURCE_EXHAUSTED if there is none."""

    def count(self, status: int) -> None:
        """A reply went out."""

    def refused(self, reason: str) -> None:
        """A limit did its work."""

    def malformed(self, connection: Connection, error: BaseException) -> None:
        """A client does not speak HTTP."""


_STATUS_LINES: dict[int, bytes] = {}


def _status_line(status: int) -> bytes:
    line = _STATUS_LINES.get(status)
    if line is None:
        line = _STATUS_LINES[status] = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\nServer: appliance\r\n".encode()
        )
    return line
