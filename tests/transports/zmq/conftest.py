"""A transport over the fake service on real sockets, and raw peers that speak to it frame by frame."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from appliance.config import ZmqConfig
from appliance.transports.zmq import ZmqTransport
from tests.fakes.service import FakeService

WAIT_S = 5.0
FOUR_FLOATS = bytes(range(16))


class House:
    """The service, its transport, and what the transport reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.service = FakeService()
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self.transport = self.make()

    def make(self, config: ZmqConfig | None = None) -> ZmqTransport:
        self.transport = ZmqTransport(
            self.service,
            config or ZmqConfig(event_heartbeat_s=0.05),
            ipc=f"ipc://{self.folder}/run/infer.ipc",
            tcp="tcp://127.0.0.1:0",
            events_ipc=f"ipc://{self.folder}/run/events.ipc",
            events_tcp="tcp://127.0.0.1:*",
            report=lambda topic, data: self.reports.append((topic, data)),
        )
        return self.transport

    @property
    def ipc(self) -> str:
        return self.transport.endpoints[0]

    @property
    def tcp(self) -> str:
        return self.transport.endpoints[1]

    @property
    def events(self) -> str:
        return self.transport.endpoints[2]


class Wire:
    """Raw sockets of one test."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self.sockets: list[zmq.asyncio.Socket] = []

    def socket(self, kind: int, endpoint: str, **options: int) -> zmq.asyncio.Socket:
        socket = self.context.socket(kind)
        self.sockets.append(socket)
        socket.linger = 0
        for name, value in options.items():
            setattr(socket, name, value)
        socket.connect(endpoint)
        return socket

    def dealer(self, endpoint: str, **options: int) -> Peer:
        return Peer(self.socket(zmq.DEALER, endpoint, **options))

    def req(self, endpoint: str, **options: int) -> Peer:
        return Peer(self.socket(zmq.REQ, endpoint, **options))


class Peer:
    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket

    async def send(self, header: dict[str, Any] | bytes, *tensors: bytes) -> None:
        data = header if isinstance(header, bytes) else json.dumps(header).encode()
        await self.socket.send_multipart([b"AIP1", data, *tensors])

    async def infer(self, request_id: str, **fields: Any) -> None:
        header = {"op": "infer", "id": request_id, "model": "echo", **fields}
        header.setdefault("inputs", [{"name": "x", "datatype": "FP32", "shape": [1, 4], "frame": 0}])
        await self.send(header, FOUR_FLOATS)

    async def frames(self) -> list[bytes]:
        return await asyncio.wait_for(self.socket.recv_multipart(), WAIT_S)

    async def reply(self) -> dict[str, Any]:
        frames = await self.frames()
        assert frames[0] == b"AIP1"
        header: dict[str, Any] = json.loads(frames[1])
        return header | {"frames": frames[2:]}

    async def ask(self, header: dict[str, Any] | bytes, *tensors: bytes) -> dict[str, Any]:
        await self.send(header, *tensors)
        return await self.reply()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    await house.transport.start()
    yield house
    await house.transport.close()


@pytest.fixture
async def wire(house: House) -> AsyncIterator[Wire]:
    wire = Wire()
    yield wire
    wire.context.destroy(linger=0)


async def until(condition: Any) -> None:
    """Wait for something that the transport does on its own time."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in libzmq and has no event
            await asyncio.sleep(0.001)
