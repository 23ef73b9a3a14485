"""The load generators against small servers of known behaviour."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from appliance.cli import load
from appliance.cli.load import LoadError, Meter, Plan, generate, percentile, poisson, run

REQUEST = b"POST / HTTP/1.1\r\nHost: bench\r\nContent-Length: 3\r\n\r\n"
FRAMES = (b"AIP1", b'{"op": "infer", "id": "?"}')


@contextlib.contextmanager
def http_server(answer: Callable[[bytes], bytes], *, pieces: int = 1) -> Iterator[str]:
    """Answers each 3-byte body with what `answer` makes of it, in so many pieces."""
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                reply = answer(await reader.readexactly(length))
                size = math.ceil(len(reply) / pieces)
                for start in range(0, len(reply), size):
                    writer.write(reply[start : start + size])
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24))
    port = server.sockets[0].getsockname()[1]

    async def stop() -> None:
        server.close()
        # the clients have hung up: every connection's task ends by itself
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))

    thread = threading.Thread(target=loop.run_forever, name="http server")
    thread.start()
    yield f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@contextlib.contextmanager
def zmq_server(
    tmp_path: Path, answer: Callable[[list[list[bytes]]], list[list[bytes]]], *, batch: int = 1
) -> Iterator[str]:
    """Collects `batch` messages, or what there is when no more come, and answers them with what `answer` makes of them."""
    context = zmq.Context()
    address = f"ipc://{tmp_path}/s.ipc"
    ready, stop = threading.Event(), threading.Event()

    def serve() -> None:
        router = context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.bind(address)
        ready.set()
        held: list[list[bytes]] = []
        while not stop.is_set():
            more = router.poll(20)
            if more:
                held.append(router.recv_multipart())
            if len(held) >= batch or not more:
                for frames in answer(held):
                    router.send_multipart(frames)
                held = []
        router.close()

    thread = threading.Thread(target=serve, name="zmq server")
    thread.start()
    assert ready.wait(10)
    yield address
    stop.set()
    thread.join(10)
    context.term()


def ok(body: bytes) -> bytes:
    # the longer name comes first: a careless search takes it for the length
    head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 1\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def zmq_ok(held: list[list[bytes]]) -> list[list[bytes]]:
    replies = []
    for peer, protocol, header, data in held:
        reply = {"id": json.loads(header)["id"], "ok": True}
        replies.append([peer, protocol, json.dumps(reply, separators=(",", ":")).encode(), data])
    return replies


def http_plan(address: str, concurrency: int = 1, **more: object) -> Plan:
    requests = tuple((REQUEST + body,) for body in (b"aaa", b"bbb", b"ccc"))
    return Plan(address, requests, concurrency, seconds=0.1, warm_up_s=0.02, **more)  # type: ignore[arg-type]


def zmq_plan(address: str, concurrency: int = 1, **more: object) -> Plan:
    requests = tuple((*FRAMES, data) for data in (b"aaa", b"bbb", b"ccc"))
    return Plan(address, requests, concurrency, seconds=0.1, warm_up_s=0.02, **more)  # type: ignore[arg-type]


def assert_each_reply_belongs_to_its_request(result: load.Result) -> None:
    assert result.errors == result.unanswered == 0
    assert result.kept
    assert all(kept.payload == (b"aaa", b"bbb", b"ccc")[kept.request] for kept in result.kept)
    assert result.latencies == sorted(result.latencies)
    assert result.replies == len(result.latencies) > 0
    assert result.answered >= result.replies


@pytest.mark.parametrize("concurrency", [1, 5])
@pytest.mark.parametrize("rate", [0.0, 300.0])
@pytest.mark.parametrize("pieces", [1, 3])
def test_http_replies_are_counted_and_belong_to_their_requests(concurrency: int, rate: float, pieces: int) -> None:
    with http_server(ok, pieces=pieces) as address:
        assert_each_reply_belongs_to_its_request(run(http_plan(address, concurrency, rate_per_s=rate)))


@pytest.mark.parametrize("concurrency", [1, 5])
@pytest.mark.parametrize("rate", [0.0, 300.0])
def test_zmq_replies_are_counted_and_belong_to_their_requests(tmp_path: Path, concurrency: int, rate: float) -> None:
    with zmq_server(tmp_path, zmq_ok) as address:
        assert_each_reply_belongs_to_its_request(run(zmq_plan(address, concurrency, rate_per_s=rate)))


def test_zmq_replies_that_overtake_each_other_are_matched_by_id(tmp_path: Path) -> None:
    with zmq_server(tmp_path, lambda held: zmq_ok(held)[::-1], batch=3) as address:
        assert_each_reply_belongs_to_its_request(run(zmq_plan(address, 3)))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_http_request_larger_than_the_kernel_takes_at_once_arrives(concurrency: int) -> None:
    body = bytes(8 << 20)
    request = REQUEST.replace(b"Content-Length: 3", b"Content-Length: %d" % len(body)) + body
    with http_server(lambda got: ok(str(len(got)).encode())) as address:
        result = run(Plan(address, ((request,),), concurrency, seconds=0.05, warm_up_s=0.0))
    assert result.errors == 0
    assert {kept.payload for kept in result.kept} == {str(len(body)).encode()}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_refusals_are_errors_and_the_first_one_is_told(tmp_path: Path, concurrency: int) -> None:
    with http_server(lambda _: b"HTTP/1.1 429 Busy\r\ncontent-length: 4\r\n\r\nbusy") as address:
        over_http = run(http_plan(address, concurrency))
    with zmq_server(
        tmp_path, lambda held: [[p, a, h.replace(b"}", b',"code":"BUSY"}')] for p, a, h, _ in held]
    ) as address:
        over_zmq = run(zmq_plan(address, concurrency))
    assert over_http.errors == over_http.answered > 0
    assert over_http.first_error == "busy"
    assert over_zmq.errors == over_zmq.answered > 0
    assert '"code":"BUSY"' in over_zmq.first_error
    assert over_http.kept == over_zmq.kept == []


@pytest.mark.parametrize("rate", [0.0, 100.0])
def test_silence_ends_the_run_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    monkeypatch.setattr(load, "GIVE_UP_S", 0.1)
    with zmq_server(tmp_path, lambda _: []) as address:
        result = run(zmq_plan(address, 3, rate_per_s=rate))
    assert (result.replies, result.unanswered > 0) == (0, True)


def test_server_that_hangs_up_ends_the_generator_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        hang_up = threading.Thread(target=lambda: listener.accept()[0].close(), name="hang up")
        hang_up.start()
        with pytest.raises(LoadError, match=address):
            generate(http_plan(address))
        hang_up.join(10)


def test_generator_in_a_process_of_its_own_finds_the_same(tmp_path: Path) -> None:
    with zmq_server(tmp_path, zmq_ok) as address:
        assert_each_reply_belongs_to_its_request(generate(zmq_plan(address, 3)))


def meter(plan: Plan) -> Meter:
    """A meter whose window is from 10 to 12."""
    made = Meter(plan)
    made.begin()
    made.opens, made.closes = 10.0, 12.0
    return made


def test_batches_that_come_whole_are_not_counted_for_more_than_they_are() -> None:
    counting = meter(Plan("", ((b"",),), concurrency=8))
    # eight replies every 0.5 s, with the window's edges in the middle of two batches
    for tick in range(1, 30):
        for _ in range(8):
            counting.count(8.25 + tick / 2, 8.25 + tick / 2 - 0.5, (0, True, b""))
    assert counting.result().per_second == pytest.approx(16.0)


def test_slow_server_is_measured_until_every_slot_has_answered_once() -> None:
    counting = meter(Plan("", ((b"",),), concurrency=2))
    assert counting.count(13.0, 9.0, (0, True, b""))
    assert counting.count(14.0, 9.0, (1, True, b""))
    assert not counting.count(17.0, 13.0, (0, True, b""))
    assert counting.result().replies == 2


def test_open_loop_counts_by_arrival_and_from_it() -> None:
    counting = meter(Plan("", ((b"",),), rate_per_s=1.0))
    counting.count(10.5, 9.9, (0, True, b""))  # arrived during the warm-up
    counting.count(14.0, 11.0, (0, True, b""))  # arrived in the window, answered long after
    assert counting.result().latencies == [3.0]


def test_kept_replies_are_of_every_phase_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "KEPT_BYTES", 100_000)
    counting = meter(Plan("", ((b"",),)))
    for number in range(50_000):
        counting.count(11.0, 10.9, (0, True, b"%05d" % number))
    numbers = [int(kept.payload) for kept in counting.result().kept]
    assert len(numbers) < 200
    assert numbers[:4] == [0, 1, 2, 3]
    assert numbers[-1] > 40_000


def test_percentiles_are_nearest_ranks() -> None:
    hundred = [float(value) for value in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.5, 0.9, 0.99, 0.999)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([7.0], 0.5) == 7.0
    assert math.isnan(percentile([], 0.5))


def test_arrivals_have_the_rate_and_are_the_same_for_the_same_seed() -> None:
    plan = Plan("", ((b"",),), rate_per_s=1000.0)
    arrivals = list(poisson(plan, 5.0, 25.0))
    assert arrivals == list(poisson(plan, 5.0, 25.0))
    assert arrivals != list(poisson(msgspec.structs.replace(plan, seed=2), 5.0, 25.0))
    assert 5.0 < arrivals[0] < arrivals[-1] < 25.0
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
