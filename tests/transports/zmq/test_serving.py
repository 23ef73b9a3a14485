"""Requests over real sockets: framing, order, limits, cancellation."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from appliance.config import ZmqConfig
from appliance.core.errors import ApplianceError, ErrorCode
from tests.transports.zmq.conftest import FOUR_FLOATS, House, Wire, until


@pytest.mark.parametrize("face", ["ipc", "tcp"])
async def test_a_dealer_gets_its_answer(house: House, wire: Wire, face: str) -> None:
    peer = wire.dealer(getattr(house, face))
    await peer.infer("42", priority=3, stream="cam1", ttl_ms=50, idem=False, version="1", parameters={"lot": "A7"})
    reply = await peer.reply()
    assert reply.pop("frames") == [FOUR_FLOATS]
    assert reply == {
        "id": "42",
        "ok": True,
        "model": "echo",
        "version": "1",
        "outputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "frame": 0}],
        "timing_us": {"queue": 12, "compute": 310},
        "boot": "boot-1",
    }
    (request,) = house.service.requests
    assert (request.priority, request.stream, request.timeout_s, request.idempotent) == (3, "cam1", 0.05, False)
    assert (request.version, request.parameters) == ("1", {"lot": "A7"})


@pytest.mark.parametrize("options", [{}, {"req_correlate": 1, "req_relaxed": 1}])
@pytest.mark.parametrize("face", ["ipc", "tcp"])
async def test_a_req_gets_its_answer(house: House, wire: Wire, face: str, options: dict[str, int]) -> None:
    peer = wire.req(getattr(house, face), **options)
    for request_id in ("1", "2"):
        await peer.infer(request_id)
        assert (await peer.reply())["id"] == request_id


async def test_a_dealer_that_writes_the_delimiter_of_a_req_gets_it_back(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    await peer.socket.send_multipart([b"", b"AIP1", b'{"op":"ping"}'])
    assert (await peer.frames())[:2] == [b"", b"AIP1"]


async def test_requests_may_be_in_flight_together_and_answers_come_by_id(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    for number in range(100):
        await peer.infer(str(number))
    assert {(await peer.reply())["id"] for _ in range(100)} == {str(number) for number in range(100)}


async def test_more_messages_than_one_burst_are_all_served_without_another_wake_up(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc, sndhwm=0)
    house.service.hold()
    for number in range(200):
        await peer.infer(str(number))
    await until(lambda: len(house.service.waiting) == 200)
    house.service.release()
    assert len([await peer.reply() for _ in range(200)]) == 200


async def test_large_tensors_come_back_whole(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.tcp)
    data = bytes(range(256)) * 8192  # 2 MiB: used in place on the way in, sent without a copy on the way out
    header = {"op": "infer", "model": "echo", "inputs": [{"name": "x", "datatype": "UINT8", "shape": [len(data)]}]}
    assert (await peer.ask(header, data))["frames"] == [data]
    assert isinstance(house.service.requests[0].inputs[0].data, memoryview)


async def test_a_superseded_request_is_answered_so(house: House, wire: Wire) -> None:
    house.service.failure = ApplianceError(ErrorCode.SUPERSEDED, "a newer frame of stream 'cam1' came")
    peer = wire.dealer(house.ipc)
    await peer.infer("1", stream="cam1")
    reply = await peer.reply()
    assert (reply["ok"], reply["code"], reply["id"]) == (False, "SUPERSEDED", "1")
    assert "retry_after_ms" not in reply
    assert house.service.requests[0].stream == "cam1"


async def test_a_full_queue_is_answered_with_when_to_come_back(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    house.service.refusal = ApplianceError(ErrorCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after_s=0.25)
    await peer.infer("1")
    reply = await peer.reply()
    assert (reply["code"], reply["retry_after_ms"], reply["message"]) == (
        "RESOURCE_EXHAUSTED",
        250,
        "the queue is full",
    )


async def test_while_draining_requests_are_answered_unavailable_and_the_endpoint_stays(
    house: House, wire: Wire
) -> None:
    peer = wire.dealer(house.ipc)
    house.service.draining = True
    await house.transport.drain(1.0)
    await peer.infer("1")
    reply = await peer.reply()
    assert (reply["code"], reply["retry_after_ms"] > 0) == ("UNAVAILABLE", True)
    assert (await wire.dealer(house.ipc).ask({"op": "ping"}))["ready"] is False


async def test_drain_waits_for_what_is_in_flight(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    house.service.hold()
    await peer.infer("1")
    await until(lambda: house.service.waiting)
    drain = asyncio.create_task(house.transport.drain(5.0))
    assert not (await asyncio.wait({drain}, timeout=0.03))[0]
    house.service.release()
    await asyncio.wait_for(drain, 1.0)
    assert (await peer.reply())["ok"] is True


async def test_cancel_ends_the_senders_own_requests_only(house: House, wire: Wire) -> None:
    mine, other = wire.dealer(house.ipc), wire.dealer(house.ipc)
    house.service.hold()
    await mine.infer("1")
    await mine.infer("2")
    await other.infer("1")
    await until(lambda: len(house.service.waiting) == 3)
    await mine.send({"op": "cancel", "id": "c", "ids": ["1", "7"]})
    replies = {reply["id"]: reply for reply in (await mine.reply(), await mine.reply())}
    assert replies["1"]["code"] == "CANCELLED"
    assert replies["c"]["cancelled"] == ["1"]
    assert len(house.service.cancelled) == 1
    house.service.release()
    assert (await mine.reply())["id"] == "2"
    assert (await other.reply())["ok"] is True


async def test_peers_behind_one_proxy_cannot_cancel_each_others_requests(house: House, wire: Wire) -> None:
    proxy = wire.dealer(house.ipc)
    house.service.hold()
    infer = {"op": "infer", "id": "1", "model": "echo", "inputs": [{"name": "x", "datatype": "UINT8", "shape": [1]}]}
    await proxy.socket.send_multipart([b"a", b"", b"AIP1", json.dumps(infer).encode(), b"x"])
    await until(lambda: house.service.waiting)
    cancel = json.dumps({"op": "cancel", "ids": ["1"]}).encode()
    await proxy.socket.send_multipart([b"b", b"", b"AIP1", cancel])
    frames = await proxy.frames()
    assert (frames[:3], json.loads(frames[3])["cancelled"]) == ([b"b", b"", b"AIP1"], [])
    await proxy.socket.send_multipart([b"a", b"", b"AIP1", cancel])
    assert json.loads((await proxy.frames())[3])["code"] == "CANCELLED"


async def test_a_peer_that_disappears_has_the_rest_of_its_requests_cancelled(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.tcp)
    house.service.hold()
    for number in range(50):
        await peer.infer(str(number))
    await until(lambda: len(house.service.waiting) == 50)
    peer.socket.close()

    def gone() -> bool:
        # only an answer finds out that nobody is there, and the first ones may still meet an open connection
        if len(house.service.waiting) > 1:
            house.service._finish(house.service.waiting.pop(0))
        return house.transport.counters.peers_gone > 0

    await until(gone)
    await until(lambda: not house.service.waiting)
    assert house.service.cancelled
    assert house.transport.counters.peers_gone == 1
    assert (await wire.dealer(house.tcp).ask({"op": "ping"}))["ok"] is True


async def test_one_peer_may_have_only_so_many_requests_in_flight(house: House, wire: Wire) -> None:
    await house.transport.close()
    await house.make(ZmqConfig(max_peer_in_flight=2)).start()
    house.service.hold()
    peer = wire.dealer(house.ipc)
    for number in range(3):
        await peer.infer(str(number))
    reply = await peer.reply()
    assert (reply["id"], reply["code"], reply["retry_after_ms"] > 0) == ("2", "RESOURCE_EXHAUSTED", True)
    other = wire.dealer(house.ipc)
    await other.infer("1")
    await until(lambda: len(house.service.waiting) == 3)
    house.service.release()
    assert (await other.reply())["ok"]
    await peer.reply()
    await peer.reply()
    await peer.infer("again")
    assert (await peer.reply())["ok"]


async def test_all_peers_together_may_have_only_so_many_bytes_in_flight(house: House, wire: Wire) -> None:
    await house.transport.close()
    await house.make(ZmqConfig(max_bytes_in_flight=300)).start()
    house.service.hold()
    peer, other = wire.dealer(house.ipc), wire.dealer(house.ipc)
    await peer.infer("1")
    await until(lambda: house.service.waiting)
    await other.infer("2", parameters={"padding": "x" * 200})
    reply = await other.reply()
    assert (reply["code"], house.transport.counters.requests_busy) == ("RESOURCE_EXHAUSTED", 1)
    house.service.release()
    assert (await peer.reply())["ok"]
    for number in range(5):
        await other.infer(str(number))
        assert (await other.reply())["ok"]


async def test_every_other_operation_answers(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    hello = await peer.ask({"op": "hello", "id": "h", "proto": [1, 3], "client": "test"})
    assert (hello["proto"], hello["boot"], hello["id"]) == (1, "boot-1", "h")
    assert hello["limits"]["max_in_flight"] == 256
    assert hello["events"] == house.transport.endpoints[2:]
    assert (await peer.ask({"op": "ping"}))["ready"] is True
    assert (await peer.ask({"op": "ping", "model": "echo"}))["model_ready"] is True
    models = (await peer.ask({"op": "models"}))["models"]
    assert models == [{"name": "echo", "version": "1", "state": "READY", "reason": ""}]
    description = (await peer.ask({"op": "describe", "model": "echo"}))["description"]
    assert description["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert description["labels"] == ["a", "b", "c", "d"]
    stats = await peer.ask({"op": "stats", "model": "echo"})
    assert stats["stats"][0]["success"] == {"count": 0, "ns": 0}
    assert stats["transport"]["messages_received"] >= 6
    assert (await peer.ask({"op": "snapshot"}))["snapshot"]["seq"] == 0


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({"op": "fly", "id": "1"}, "UNSUPPORTED"),
        ({"id": "1"}, "INVALID_ARGUMENT"),
        ({"op": "hello", "id": "1", "proto": [2, 3]}, "UNSUPPORTED"),
        ({"op": "describe", "id": "1"}, "INVALID_ARGUMENT"),
        ({"op": "describe", "id": "1", "model": "nope"}, "NOT_FOUND"),
        ({"op": "stats", "id": "1", "model": "nope"}, "NOT_FOUND"),
        ({"op": "ping", "id": "1", "model": "nope"}, "NOT_FOUND"),
        ({"op": "infer", "id": "1", "model": "echo"}, "INVALID_ARGUMENT"),
        ({"op": "infer", "id": "1", "model": 7}, "INVALID_ARGUMENT"),
    ],
)
async def test_what_cannot_be_served_is_answered_with_its_code(
    house: House, wire: Wire, header: dict[str, Any], code: str
) -> None:
    reply = await wire.dealer(house.ipc).ask(header)
    assert (reply["ok"], reply["id"], reply["code"], reply["boot"]) == (False, "1", code, "boot-1")


async def test_unknown_fields_are_ignored(house: House, wire: Wire) -> None:
    peer = wire.dealer(house.ipc)
    await peer.infer("1", colour="blue", deep={"er": [1, {"x": None}]})
    assert (await peer.reply())["ok"] is True


async def test_a_bug_in_the_service_is_answered_internal_without_its_details(
    house: House, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(house.service, "index", broken)
    peer = wire.dealer(house.ipc)
    reply = await peer.ask({"op": "models", "id": "1"})
    assert (reply["code"], "secret" in json.dumps(reply["message"])) == ("INTERNAL", False)
    assert (await peer.ask({"op": "ping"}))["ok"] is True


async def test_an_answer_that_cannot_be_written_is_answered_internal(
    house: House, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError

    monkeypatch.setattr("appliance.protocols.zmq_wire.encode_response", fail)
    peer = wire.dealer(house.ipc)
    await peer.infer("1")
    assert (await peer.reply())["code"] == "INTERNAL"


async def test_two_clients_in_turn_are_served_while_one_of_them_floods(house: House, wire: Wire) -> None:
    flood, good = wire.dealer(house.ipc, sndhwm=0), wire.dealer(house.tcp)
    for _ in range(1000):
        flood.socket.send_multipart([b"AIP1", b'{"op":"ping"}'])
    assert (await good.ask({"op": "ping"}))["ok"] is True
    assert len([await flood.frames() for _ in range(1000)]) == 1000
