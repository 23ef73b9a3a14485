"""What hostile, broken and slow peers do, and that others do not notice."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from typing import Any

import psutil
import pytest
import zmq

from appliance.config import ZmqConfig
from tests.transports.zmq.conftest import FOUR_FLOATS, House, Peer, Wire, until


def _garbage(rng: random.Random) -> list[bytes]:
    header = json.dumps(
        {"op": "infer", "id": "g", "model": "echo", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4]}]}
    )
    kind = rng.randrange(8)
    if kind == 0:
        return [rng.randbytes(rng.randrange(1, 40)) for _ in range(rng.randrange(1, 6))]
    if kind == 1:
        return [b"AIP1", rng.randbytes(rng.randrange(200))]
    if kind == 2:
        return [b"AIP1", header.encode()[: rng.randrange(len(header))], FOUR_FLOATS]
    if kind == 3:
        return [b"AIP1", header.encode(), FOUR_FLOATS[: rng.randrange(16)]]
    if kind == 4:
        return [b"AIP1", b"[" * rng.randrange(1, 5000)]
    if kind == 5:
        return [b""] * rng.randrange(1, 12)
    if kind == 6:
        return [b"AIP1", header.replace("4]", str(rng.choice([-1, 2**70, "x", 1.5])) + "]").encode(), FOUR_FLOATS]
    return [b"AIP" + rng.randbytes(1), header.encode(), FOUR_FLOATS]


async def test_two_thousand_garbage_messages_disturb_nobody(house: House, wire: Wire) -> None:
    rng = random.Random(20)
    bad, good = wire.dealer(house.ipc, sndhwm=0, rcvhwm=0), wire.dealer(house.ipc)
    served = 0
    for number in range(2000):
        bad.socket.send_multipart(_garbage(rng))
        if number % 50 == 0:
            await good.infer(str(number))
            served += (await good.reply())["ok"]
    assert served == 40
    await until(lambda: house.transport.counters.messages_received >= 2040)
    assert house.transport.counters.messages_malformed > 1000
    assert house.transport.counters.handler_faults == 0
    assert {request.id for request in house.service.requests} - {"g"} == {str(number) for number in range(0, 2000, 50)}


@pytest.mark.slow
async def test_a_hundred_thousand_garbage_messages_leave_memory_as_it_was(house: House, wire: Wire) -> None:
    rng = random.Random(21)
    bad, good = wire.dealer(house.ipc, sndhwm=0, rcvhwm=0), wire.dealer(house.ipc)
    process = psutil.Process()
    sizes = []
    for _ in range(100):
        for _ in range(1000):
            bad.socket.send_multipart(_garbage(rng))
        for _ in range(1000):
            await bad.frames()  # every one is answered
        await good.infer("good")
        assert (await good.reply())["ok"] is True
        house.service.requests.clear()
        sizes.append(process.memory_info().rss)
    assert max(sizes[50:]) - max(sizes[10:50]) < 4 << 20
    assert house.transport.counters.handler_faults == 0


async def test_all_outboxes_together_are_bounded(house: House, wire: Wire) -> None:
    peers = [await _stuck(house, wire, 120, outbox_bytes=1 << 20)]
    config = house.transport._config
    channel = house.transport._channel
    assert channel is not None
    data = bytes(1 << 16)
    for number in range(7):
        # as if answers to seven more peers had been refused by their full pipes
        for _ in range(20):
            channel._put(bytes([number]) * 5, [bytes([number]) * 5, b"AIP1", b"{}", data])
    waiting = sum(box.nbytes for box in channel._outboxes.values())
    assert waiting == channel._waiting_bytes
    assert waiting <= 4 * config.outbox_bytes
    assert peers


async def test_a_message_with_too_many_frames_is_refused_and_the_next_one_served(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    reply = await peer.ask({"op": "infer", "id": "1", "model": "echo"}, *[b"x"] * 5000)
    assert (reply["code"], reply["id"]) == ("PAYLOAD_TOO_LARGE", "1")
    assert (await peer.ask({"op": "ping"}))["ok"] is True


async def test_a_message_with_too_many_bytes_in_all_is_refused(house: House, wire: Wire) -> None:
    await house.transport.close()
    await house.make(ZmqConfig(max_message_bytes=100_000)).start()
    peer = wire.dealer(house.ipc)
    reply = await peer.ask({"op": "infer", "id": "1", "model": "echo"}, b"x" * 60_000, b"x" * 60_000)
    assert (reply["code"], reply["id"]) == ("PAYLOAD_TOO_LARGE", "1")


async def test_a_frame_above_the_limit_ends_that_connection_only(house: House, wire: Wire) -> None:
    await house.transport.close()
    await house.make(ZmqConfig(max_message_bytes=100_000)).start()
    good, bad = wire.dealer(house.ipc), wire.dealer(house.ipc)
    monitor = bad.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    await bad.send({"op": "infer", "id": "1", "model": "echo"}, b"x" * 100_001)
    assert await monitor.poll(5000)
    bad.socket.disable_monitor()
    monitor.close()
    assert (await good.ask({"op": "ping"}))["ok"] is True
    assert house.transport.counters.messages_received == 1


async def test_a_header_above_the_limit_is_refused(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    reply = await peer.ask({"op": "ping", "client": "x" * 70_000})
    assert reply["code"] == "PAYLOAD_TOO_LARGE"


async def _stuck(house: House, wire: Wire, count: int, **config: Any) -> Peer:
    """A peer that has asked for `count` echoes of 64 KiB, and reads none."""
    await house.transport.close()
    await house.make(ZmqConfig(send_hwm=2, event_heartbeat_s=60, **config)).start()
    peer = wire.dealer(house.tcp, rcvhwm=1, rcvbuf=4096, sndhwm=0)
    inputs = [{"name": "x", "datatype": "UINT8", "shape": [1 << 16]}]
    data = os.urandom(1 << 16)
    for number in range(count):
        header = json.dumps({"op": "infer", "id": str(number), "model": "echo", "inputs": inputs}).encode()
        peer.socket.send_multipart([b"AIP1", header, data])
    await until(lambda: len(house.service.requests) == count and not house.service.waiting)
    return peer


async def test_answers_wait_for_a_slow_peer_and_all_arrive(house: House, wire: Wire) -> None:
    peer = await _stuck(house, wire, 200)
    assert house.transport.counters.replies_delayed > 0
    assert [(await peer.reply())["id"] for _ in range(200)] == [str(number) for number in range(200)]
    assert house.transport.counters.replies_dropped == 0
    await house.transport.drain(1.0)
    assert not house.transport._busy()


async def test_answers_to_a_slow_peer_leave_even_if_no_wake_up_comes(house: House, wire: Wire) -> None:
    peer = await _stuck(house, wire, 100)
    channel = house.transport._channel
    assert channel is not None
    asyncio.get_running_loop().remove_reader(channel._fd)
    assert len([await peer.reply() for _ in range(100)]) == 100


async def test_a_long_outbox_leaves_burst_by_burst_without_another_wake_up(
    house: House, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    # few enough that the connection never fills, so that libzmq has nothing to tell us
    monkeypatch.setattr("appliance.transports.zmq.channel.BURST_MESSAGES", 4)
    peer = wire.dealer(house.ipc, routing_id=b"slow")
    await peer.ask({"op": "ping"})
    channel = house.transport._channel
    assert channel is not None
    for _ in range(12):
        channel._put(b"slow", [b"slow", b"AIP1", b'{"ok":true}'])
    assert channel._retry is not None
    channel._retry.cancel()  # so that only the flush itself can go on
    channel._flush()
    assert len([await peer.reply() for _ in range(12)]) == 12


async def test_a_peer_that_never_reads_costs_its_outbox_and_nothing_else(
    house: House, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await _stuck(house, wire, 240, outbox_bytes=1 << 20)
        await until(lambda: house.transport.counters.replies_dropped > 0)
    channel = house.transport._channel
    assert channel is not None
    assert sum(box.nbytes for box in channel._outboxes.values()) <= 1 << 20
    assert house.reports[0][0] == "zmq.reply_dropped"
    assert 0 < len(caplog.records) <= 3  # one line a second, not one for each reply
    assert (await wire.dealer(house.ipc).ask({"op": "ping"}))["ok"] is True


async def test_a_peer_that_never_reads_and_then_goes_is_forgotten(house: House, wire: Wire) -> None:
    peer = await _stuck(house, wire, 200, outbox_bytes=1 << 20)
    peer.socket.close()
    channel = house.transport._channel
    assert channel is not None
    await until(lambda: channel.idle)
    assert house.transport.counters.peers_gone >= 1


async def test_routing_ids_appear_in_no_reply_event_or_log(
    house: House, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    secret = b"Rtng-9c1f"
    with caplog.at_level(logging.DEBUG):
        peer = wire.dealer(house.tcp, routing_id=secret)
        subscriber = wire.socket(zmq.SUB, house.events)
        subscriber.subscribe(b"")
        seen = [await peer.ask(b"{"), await peer.ask({"op": "stats"}), await peer.ask({"op": "snapshot"})]
        await peer.infer("1")
        seen.append(await peer.reply())
        event = await asyncio.wait_for(subscriber.recv_multipart(), 5)
    assert secret.decode() not in repr(seen) + repr(event) + caplog.text + repr(house.reports)


async def test_a_connection_that_says_nothing_is_closed(house: House) -> None:
    await house.transport.close()
    await house.make(ZmqConfig(handshake_timeout_ms=100)).start()
    host, port = house.tcp.removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await asyncio.wait_for(reader.read(), 5)  # the greeting, then the end
    writer.close()
    await writer.wait_closed()
