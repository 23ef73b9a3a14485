"""The HTTP face: listeners on TCP and a unix socket, the connections they accept, and the sweep that enforces deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import http_parser

from appliance.config import HttpConfig
from appliance.core.errors import ApplianceError, ErrorCode, unavailable
from appliance.observability.logs import RateLimit
from appliance.transports.http.application import HttpApplication
from appliance.transports.http.connection import Connection

if TYPE_CHECKING:
    from appliance.service import InferenceService, Records

log = logging.getLogger(__name__)

BACKLOG = 512
DRAIN_S = 5.0
"""How long `drain` waits for answers that are being written to clients that still read."""

EXCESS = 128
"""Connections beyond the limit that are told so; further ones are dropped without a word."""


class HttpTransport:
    """See the module. `start`, then `drain` (no new connections, open requests end), then `close`.

    `sockets` listen already, on TCP or unix; with them no TCP socket is bound here.
    """

    def __init__(
        self,
        service: InferenceService,
        config: HttpConfig,
        *,
        unix_socket: str | None,
        metrics: Callable[[], bytes],
        records: Records | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        self.config = config
        self.application = HttpApplication(service, config, metrics, records)
        self.closing = False
        self._last_call = False
        self.date = _date()
        self.statuses: dict[int, int] = {}
        self.refusals: dict[str, int] = {}
        self.bytes_in_flight = 0
        self.addresses: list[str] = []
        self._unix_socket = unix_socket
        self._bound: tuple[int, int] | None = None
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._sweep: asyncio.Task[None] | None = None
        self._quiet = RateLimit()

    async def start(self) -> None:
        """Listen. OSError if an address is taken; RuntimeError if aiohttp's C parser is missing (the other is not as strict)."""
        if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
            raise RuntimeError(
                "aiohttp was installed without its C parser; unset AIOHTTP_NO_EXTENSIONS or reinstall it"
            )
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(self, loop)

        for given in self._sockets:
            if given.family == socket.AF_UNIX:
                self._listening(await loop.create_unix_server(connection, sock=given, backlog=BACKLOG))
            else:
                self._listening(await loop.create_server(connection, sock=given, backlog=BACKLOG))
        if not self._sockets:
            host, port = self.config.host, self.config.port
            self._listening(await loop.create_server(connection, host, port, backlog=BACKLOG, reuse_address=True))
        if self._unix_socket is not None:
            await self._listen_on_path(connection, self._unix_socket)
        self._sweep = asyncio.create_task(self._enforce_deadlines(), name="http-deadlines")

    async def _listen_on_path(self, connection: Callable[[], Connection], path: str) -> None:
        remove_stale(Path(path))
        before = os.umask(0o117)
        try:
            server = await asyncio.get_running_loop().create_unix_server(connection, path, backlog=BACKLOG)
        finally:
            os.umask(before)
        self._bound = _identity(path)
        self._listening(server)

    def _listening(self, server: asyncio.Server) -> None:
        self._servers.append(server)
        for listener in server.sockets:
            name = listener.getsockname()
            if isinstance(name, tuple):
                # accepted connections inherit it: a peer that lost its power is noticed some day
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                host = f"[{name[0]}]" if ":" in name[0] else name[0]
                self.addresses.append(f"http://{host}:{name[1]}")
            else:
                self.addresses.append(f"unix:{name}")

    # --- what connections share ---

    def admit(self, connection: Connection) -> ApplianceError | None:
        """UNAVAILABLE if there is no room for one more."""
        self._connections.add(connection)
        excess = len(self._connections) - self.config.max_connections
        if excess > EXCESS and connection.transport is not None:
            connection.transport.abort()
        if self.closing and not self._last_call:
            return unavailable("the appliance is shutting down; come again in a moment")
        return unavailable("too many connections; close one or come again") if excess > 0 else None

    def forget(self, connection: Connection) -> None:
        """It is gone."""
        self._connections.discard(connection)

    def reserve(self, nbytes: int) -> None:
        """Take (or give back) room for a body. RESOURCE_EXHAUSTED if there is none."""
        if nbytes > 0 and self.bytes_in_flight + nbytes > self.config.max_bytes_in_flight:
            self.refused("bytes_in_flight")
            raise ApplianceError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"{self.bytes_in_flight} bytes of requests are in flight, {self.config.max_bytes_in_flight} may be; come again",
                retry_after_s=self.config.default_retry_after_s,
            )
        self.bytes_in_flight += nbytes

    def count(self, status: int) -> None:
        """A reply went out."""
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def refused(self, reason: str) -> None:
        """A limit did its work."""
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def malformed(self, connection: Connection, error: BaseException) -> None:
        """A client does not speak HTTP: one line per address and second, the rest counted."""
        suppressed = self._quiet.allow(connection.peer)
        if suppressed is not None:
            fields = {"peer": connection.peer, "error": " ".join(str(error).split())[:200], "suppressed": suppressed}
            log.warning("http.malformed", extra={"fields": fields})

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    async def _enforce_deadlines(self) -> None:
        config = self.config
        shortest = min(config.header_timeout_s, config.body_timeout_s, config.idle_timeout_s, config.write_timeout_s)
        while True:
            await asyncio.sleep(min(1.0, shortest / 4))
            self.date = _date()
            now = time.monotonic()
            for connection in list(self._connections):
                try:
                    connection.overdue(now)
                except Exception:
                    # one connection's trouble must not end everybody's deadlines
                    log.exception("http.sweep_failed")
                    connection.close()

    # --- the end ---

    async def drain(self, last_request_s: float = 0.0) -> None:
        """Accept nobody any more; let open requests end and answers leave, for a while.

        Clients that keep their connections may ask once more within `last_request_s`; the answer tells them that it was the last.
        """
        self.closing = True
        self._last_call = last_request_s > 0  # who was accepted in the same turn of the loop is served, too
        for server in self._servers:
            server.close()
        if last_request_s:
            await asyncio.sleep(last_request_s)
            self._last_call = False
        for connection in list(self._connections):
            connection.close_if_idle()
        deadline = time.monotonic() + DRAIN_S
        while any(connection.busy for connection in self._connections) and time.monotonic() < deadline:  # noqa: ASYNC110
            # once per life, for milliseconds; an event would cost every reply
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """End everything; works after half a start."""
        self.closing = True
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.gather(self._sweep, return_exceptions=True)
            self._sweep = None
        for server in self._servers:
            server.close()
        await self.application.close()
        for connection in list(self._connections):
            connection.close()
        self._servers.clear()
        if self._unix_socket is not None and self._bound is not None:
            with contextlib.suppress(FileNotFoundError):
                if _identity(self._unix_socket) == self._bound:  # another's, by now, stays
                    os.unlink(self._unix_socket)  # noqa: PTH108  pathlib's is taken for a blocking call, and this one is at the end
            self._bound = None


def _date() -> bytes:
    return f"Date: {formatdate(usegmt=True)}\r\n".encode()


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116  pathlib's is taken for a blocking call in a coroutine, and this one is at start and end
    return status.st_dev, status.st_ino


def remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on. FileExistsError if somebody does, or if it is no socket at all."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(f"{path} exists and is no socket; remove it or choose another http.unix_socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)  # a full backlog would hold us for ever
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass
    raise FileExistsError(f"another process listens on {path}; is an appliance running already?")
