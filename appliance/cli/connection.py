"""The command line's way to a running appliance: HTTP over its unix socket or TCP, with the standard library only.

(aiohttp takes a third of a second to import; a command should not.)
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from appliance.cli import book
from appliance.cli.options import JOIN
from appliance.cli.output import CommandError, Exit
from appliance.config import CREDENTIAL, Config, ConfigError, find, load, resolve_runtime_dir

TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 600.0
LOOPBACK = "127.0.0.1"

RECORDS = tuple(f"/v2/appliance/{name}" for name in ("events", "history", "energy", "audit"))
"""What is answered from the record."""

UNREACHABLE = (OSError, http.client.HTTPException, UnicodeError)
"""What a connection fails with; the last, where a name can be no host's (a label that is empty or too long)."""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over an AF_UNIX socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("appliance", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Appliance:
    """A running appliance, found by `url`, $APPLIANCE_URL, its unix socket, or its usual port."""

    def __init__(self, url: str | None = None) -> None:
        self._hint = "start one with `appliance serve`, or name it with --url or $APPLIANCE_URL"
        self.url = url or os.environ.get("APPLIANCE_URL") or self._usual()
        self._host, self._port = _place(self.url)

    def _usual(self) -> str:
        """The address in the configuration; the defaults' where there is none to read."""
        try:
            config = load(find())
        except (ConfigError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EACCES:
                self._hint = f"this user may not read the configuration, so only the usual port was asked: {JOIN}"
            config = Config()
        socket_path = Path(config.http.unix_socket or resolve_runtime_dir(config) / "http.sock")
        if socket_path.is_socket():
            return f"unix:{socket_path}"
        host = config.http.host
        if host.startswith(CREDENTIAL):
            # only the service knows it; most often it listens on loopback, too
            self._hint = "http.host is a credential, which only the service can read: name its address with --url"
            host = LOOPBACK
        return f"http://[{host}]:{config.http.port}" if ":" in host else f"http://{host}:{config.http.port}"

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.url.startswith("unix:"):
            return UnixConnection(self.url.removeprefix("unix:"), timeout_s)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """One request; CommandError if nobody answers, or if the answer is an error."""
        connection = self._connect(timeout_s)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            data = response.read()
        except TimeoutError as error:
            raise CommandError(Exit.TIMEOUT, "TIMEOUT", f"no answer from {self.url} within {timeout_s:g} s") from error
        except UNREACHABLE as error:
            raise CommandError(
                Exit.UNREACHABLE,
                "UNREACHABLE",
                f"no appliance answers at {self.url}: {error}",
                self._hint,
            ) from error
        finally:
            connection.close()
        if response.status >= 400:
            raise _error(response.status, data, path)
        return response, data

    def get(self, path: str) -> Any:
        """A JSON document."""
        return self._document(self.request("GET", path)[1])

    def post(self, path: str, document: Any = None) -> Any:
        """A JSON answer to a JSON request, or None for an empty one."""
        body = b"" if document is None else json.dumps(document).encode()
        data = self.request("POST", path, body, timeout_s=LOAD_TIMEOUT_S)[1]
        return self._document(data) if data else None

    def _document(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            text = f"what answers at {self.url} is no appliance: it speaks no JSON"
            raise CommandError(Exit.UNREACHABLE, "UNREACHABLE", text, "another port? name it with --url") from error

    def lines(self, path: str) -> Iterator[dict[str, Any]]:
        """A stream of JSON lines, until the appliance ends it. It is open when this returns: what happens then is in it."""
        connection = self._connect(TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if connection.sock is not None:
                connection.sock.settimeout(None)
            if response.status >= 400:
                raise _error(response.status, response.read(), path)
        except UNREACHABLE as error:
            connection.close()
            raise self._ended(error) from error
        except CommandError:
            connection.close()
            raise

        def read() -> Iterator[dict[str, Any]]:
            try:
                while line := response.readline():
                    yield json.loads(line)
            except (OSError, http.client.HTTPException) as error:
                raise self._ended(error) from error
            finally:
                connection.close()

        return read()

    def _ended(self, error: Exception) -> CommandError:
        return CommandError(Exit.UNREACHABLE, "UNREACHABLE", f"the connection to {self.url} ended: {error}")


def model_path(model: str, *rest: str) -> str:
    """The URL path of a model, its name quoted."""
    return "/".join(("/v2/models", quote(model, safe=""), *rest))


def _place(url: str) -> tuple[str, int]:
    """Host and port of an http:// URL, nothing of a unix: one; CommandError for what is neither."""
    if url.startswith("unix:"):
        return "", 0
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or LOOPBACK, parts.port
    except ValueError as error:
        raise _no_url(url, f": {error}") from error
    if not url.startswith("http://") or not all(character.isprintable() and character != " " for character in host):
        raise _no_url(url)
    return host, 8000 if port is None else port


def _no_url(url: str, why: str = "") -> CommandError:
    return CommandError(
        Exit.USAGE, "USAGE", f"{url!r} is no URL of an appliance{why}", "http://HOST:PORT or unix:/PATH"
    )


def _error(status: int, data: bytes, path: str) -> CommandError:
    try:
        message = str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP status {status}"
    if status in (404, 503):
        hint = "see `appliance models list`"
        if path.startswith(RECORDS):
            hint = f"see {book.pointer('recorder')} and {book.pointer('disk')}: {book.place()}"
        return CommandError(Exit.NOT_READY, "NOT_READY", message, hint)
    return CommandError(Exit.FAILED, f"HTTP_{status}", message)
