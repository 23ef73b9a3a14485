"""The command line's way to a running appliance: HTTP over its unix socket or TCP, with the standard library only.

(aiohttp takes a third of a second to import; a command should not.)
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from appliance.cli.output import CommandError, Exit
from appliance.config import Config, ConfigError, find, load, resolve_runtime_dir

TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 600.0


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
        self.url = url or os.environ.get("APPLIANCE_URL") or _default_url()
        if not self.url.startswith(("http://", "unix:")):
            raise CommandError(
                Exit.USAGE, "USAGE", f"{self.url!r} is no URL of an appliance", "http://HOST:PORT or unix:/PATH"
            )

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.url.startswith("unix:"):
            return UnixConnection(self.url.removeprefix("unix:"), timeout_s)
        parts = urlsplit(self.url)
        return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 8000, timeout=timeout_s)

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
        except (OSError, http.client.HTTPException) as error:
            raise CommandError(
                Exit.UNREACHABLE,
                "UNREACHABLE",
                f"no appliance answers at {self.url}: {error}",
                "start one with `appliance serve`, or name it with --url or $APPLIANCE_URL",
            ) from error
        finally:
            connection.close()
        if response.status >= 400:
            raise _error(response.status, data)
        return response, data

    def get(self, path: str) -> Any:
        """A JSON document."""
        return json.loads(self.request("GET", path)[1])

    def post(self, path: str, document: Any = None) -> Any:
        """A JSON answer to a JSON request, or None for an empty one."""
        body = b"" if document is None else json.dumps(document).encode()
        data = self.request("POST", path, body, timeout_s=LOAD_TIMEOUT_S)[1]
        return json.loads(data) if data else None

    def lines(self, path: str) -> Iterator[dict[str, Any]]:
        """A stream of JSON lines, until the appliance ends it. It is open when this returns: what happens then is in it."""
        connection = self._connect(TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if connection.sock is not None:
                connection.sock.settimeout(None)
            if response.status >= 400:
                raise _error(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
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


def _default_url() -> str:
    try:
        config = load(find())
    except (ConfigError, OSError):
        config = Config()
    socket_path = Path(config.http.unix_socket or resolve_runtime_dir(config) / "http.sock")
    if socket_path.is_socket():
        return f"unix:{socket_path}"
    return f"http://{config.http.host}:{config.http.port}"


def _error(status: int, data: bytes) -> CommandError:
    try:
        message = str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP status {status}"
    if status in (404, 503):
        return CommandError(Exit.NOT_READY, "NOT_READY", message, "see `appliance models list`")
    return CommandError(Exit.FAILED, f"HTTP_{status}", message)
