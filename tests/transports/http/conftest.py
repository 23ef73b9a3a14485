"""A transport over the fake service on real sockets, on the daemon's kind of loop, and a client that sends what it is told."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvloop

from appliance.config import HttpConfig
from appliance.observability.metrics import Metrics
from appliance.transports.http import HttpTransport
from tests.fakes.service import FakeService

WAIT_S = 5.0
X = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
FOUR_FLOATS = bytes(range(16))


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error, which always looks the same."""
        assert self.headers["content-type"] == "application/json"
        assert list(self.json) == ["error"]
        return str(self.json["error"])


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: Any) -> None:
        self.send(message(method, path, body, **headers))

    async def reply(self, *, head: bool = False) -> Reply:
        async with asyncio.timeout(WAIT_S):
            start, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            assert len(headers) == len(lines), "a header came twice"
            length = 0 if head else int(headers.get("content-length", 0))
            return Reply(int(start.split()[1]), headers, await self.reader.readexactly(length))

    async def ask(self, method: str, path: str, body: bytes | None = None, **headers: Any) -> Reply:
        self.request(method, path, body, **headers)
        return await self.reply(head=method == "HEAD")

    async def ended(self) -> bytes:
        """What still comes before the server closes; an error if it does not."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()

    def close(self) -> None:
        self.writer.close()


def message(method: str, path: str, body: bytes | None = None, **headers: Any) -> bytes:
    """A request; `Some_Header=value` becomes a header line."""
    lines = {"Host": "test"} | {name.replace("_", "-"): str(value) for name, value in headers.items()}
    if body is not None:
        lines.setdefault("Content-Length", str(len(body)))
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    return head.encode() + (body or b"")


def infer_json(**fields: Any) -> bytes:
    return json.dumps({"inputs": [X | {"data": [1, 2, 3, 4]}]} | fields).encode()


def infer_binary(data: bytes = FOUR_FLOATS, **fields: Any) -> tuple[bytes, int]:
    """A body with one binary input, and the length of its JSON."""
    x = X | {"shape": [len(data) // 16, 4], "parameters": {"binary_data_size": len(data)}}
    text = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}} | fields).encode()
    return text + data, len(text)


class House:
    """The service, and transports in front of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.service = FakeService()
        self.metrics = Metrics(self.service)
        self.transports: list[HttpTransport] = []
        self.clients: list[Client] = []

    async def start(self, **limits: Any) -> HttpTransport:
        """A transport with these limits."""
        transport = HttpTransport(
            self.service,
            HttpConfig(port=0, **limits),
            unix_socket=str(self.folder / "http.sock") if not self.transports else None,
            metrics=self.metrics.render,
        )
        self.transports.append(transport)
        self.metrics.http = transport
        await transport.start()
        return transport

    @property
    def transport(self) -> HttpTransport:
        return self.transports[-1]

    @property
    def port(self) -> int:
        return int(self.transport.addresses[0].rpartition(":")[2])

    async def connect(self) -> Client:
        return self._client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def connect_unix(self) -> Client:
        return self._client(*await asyncio.open_unix_connection(self.folder / "http.sock"))

    def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Client:
        client = Client(reader, writer)
        self.clients.append(client)
        return client

    async def ask(self, method: str, path: str, body: bytes | None = None, **headers: Any) -> Reply:
        client = await self.connect()
        reply = await client.ask(method, path, body, **headers)
        client.close()
        return reply

    async def infer(self, body: bytes, header_length: int | None = None, **headers: Any) -> Reply:
        if header_length is not None:
            headers["Inference_Header_Content_Length"] = header_length
        return await self.ask("POST", "/v2/models/echo/infer", body, **headers)

    async def close(self) -> None:
        for client in self.clients:
            client.close()
        for transport in self.transports:
            await transport.close()


@pytest.fixture
async def bare(tmp_path: Path) -> AsyncIterator[House]:
    """A house without a transport yet: the test chooses its limits."""
    house = House(tmp_path)
    yield house
    await house.close()


@pytest.fixture
async def house(bare: House) -> House:
    await bare.start()
    return bare


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that the transport does on its own time."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in the kernel and has no event
            await asyncio.sleep(0.001)


async def at_most(seconds: float, awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(seconds):
        return await awaitable


def bomb(nbytes: int) -> bytes:
    return gzip.compress(bytes(nbytes), 9)
