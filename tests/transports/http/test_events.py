"""GET /v2/appliance/events: JSON lines from now on, for clients that keep up."""

from __future__ import annotations

import asyncio
import json
import socket

from tests.transports.http.conftest import Client, House, until


async def follow(house: House, query: str = "") -> Client:
    client = await house.connect()
    client.request("GET", f"/v2/appliance/events{query}")
    reply = await client.reply()
    assert (reply.status, reply.headers["content-type"]) == (200, "application/x-ndjson")
    return client


async def test_events_come_as_lines_from_now_on(house: House) -> None:
    house.service.publish("before", {})
    client = await follow(house)
    house.service.publish("model.state", {"model": "echo", "state": "READY"})
    async with asyncio.timeout(5):
        event = json.loads(await client.reader.readline())
    assert (event["topic"], event["seq"]) == ("model.state", 2)
    assert event["data"] == {"model": "echo", "state": "READY"}


async def test_a_limit_ends_the_stream_after_so_many(house: House) -> None:
    client = await follow(house, "?limit=2")
    for number in range(3):
        house.service.publish("tick", {"number": number})
    lines = (await client.ended()).splitlines()
    assert [json.loads(line)["data"]["number"] for line in lines] == [0, 1]
    assert house.service.listeners == []


async def test_a_client_that_leaves_is_forgotten(house: House) -> None:
    client = await follow(house)
    assert len(house.service.listeners) == 1
    client.close()
    await until(lambda: not house.service.listeners)


async def test_a_client_that_does_not_read_is_cut_off_and_the_others_are_not(house: House) -> None:
    sleeper, reader = await follow(house), await follow(house, "?limit=400")
    sleeper.writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sleeper.reader._transport.pause_reading()  # type: ignore[attr-defined]
    for number in range(400):
        house.service.publish("tick", {"number": number, "padding": "x" * 20_000})
        await reader.reader.readline()
    assert await reader.ended() == b""
    assert house.service.listeners == []


async def test_head_and_a_second_request_are_no_stream(house: House) -> None:
    client = await house.connect()
    assert (await client.ask("HEAD", "/v2/appliance/events")).status == 200
    assert (await client.ask("GET", "/v2")).status == 200
    assert house.service.listeners == []


async def test_draining_does_not_wait_for_streams(house: House) -> None:
    client = await follow(house)
    await asyncio.wait_for(house.transport.drain(), 2)
    await house.transport.close()
    assert await client.ended() == b""
    await until(lambda: not house.service.listeners)
