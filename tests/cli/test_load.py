"""The load generators against small servers of their own: what they count, what they keep, what they do when it goes wrong."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import msgspec
import pytest
import zmq

from appliance.cli.load import Meter, Plan, Result, arrivals, run_http, run_http_open, run_zmq, run_zmq_open, runner

BODY = b"x" * 100
REQUEST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n" + BODY
FRAMES = (b"AIP1", b'{"op":"infer","id":"1","model":"m"}', b"data")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
REFUSED = b'HTTP/1.1 429 Too Many Requests\r\ncontent-length: 16\r\n\r\n{"error":"busy"}'


def read_request(connection: socket.socket, size: int) -> bool:
    """Whether a request of so many bytes came, rather than the end of the connection."""
    left = size
    while left:
        data = connection.recv(left)
        if not data:
            return False
        left -= len(data)
    return True


@contextmanager
def http_server(answer: Callable[[socket.socket], bool], request: bytes = REQUEST) -> Iterator[str]:
    """One thread per connection, which answers each request by `answer` until that says to close."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while read_request(connection, len(request)) and answer(connection):
                    pass
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=serve, args=(connection,), name="connection")
            threads.append(thread)
            thread.start()

    acceptor = threading.Thread(target=accept, name="acceptor")
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(10)
        for thread in threads:
            thread.join(10)


def replying(reply: bytes) -> Callable[[socket.socket], bool]:
    """Sends the same reply each time."""

    def answer(connection: socket.socket) -> bool:
        connection.sendall(reply)
        return True

    return answer


@contextmanager
def router(reply: Callable[[list[bytes]], list[list[bytes]]]) -> Iterator[str]:
    """A ROUTER in a thread; after each message it sends the answers that `reply` makes of it, none or several."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = context.socket(zmq.ROUTER)
    port = server.bind_to_random_port("tcp://127.0.0.1")

    def serve() -> None:
        # the end of the context ends the wait
        with contextlib.suppress(zmq.ContextTerminated):
            while True:
                frames = server.recv_multipart()
                for answer in reply(frames[1:]):
                    server.send_multipart([frames[0], *answer])
        server.close(0)

    thread = threading.Thread(target=serve, name="router")
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        context.term()
        thread.join(10)


def good(frames: list[bytes]) -> list[list[bytes]]:
    """The appliance's answer to a message."""
    return [[b"AIP1", b'{"id":"' + json.loads(frames[1])["id"].encode() + b'","ok":true}', b"scores"]]


def http_plan(address: str, **changes: object) -> Plan:
    return msgspec.structs.replace(Plan(address, 1, 0.15, warm_up_s=0.05, request=REQUEST), **changes)


def zmq_plan(address: str, **changes: object) -> Plan:
    return msgspec.structs.replace(Plan(address, 1, 0.15, warm_up_s=0.05, frames=FRAMES), **changes)


def assert_clean(result: Result, payload: bytes) -> None:
    """Replies, and nothing but good ones; the warm-up's are counted apart."""
    assert result.replies > 10
    assert result.total >= result.replies
    assert (result.errors, result.unanswered, result.first_error) == (0, 0, "")
    assert len(result.latencies) == result.replies
    assert result.latencies == sorted(result.latencies)
    assert result.latencies[0] > 0
    assert result.kept == [payload] * 4


@pytest.mark.parametrize("concurrency", [1, 3])
def test_http_closed_loop_counts_good_replies(concurrency: int) -> None:
    with http_server(replying(OK)) as address:
        assert_clean(run_http(http_plan(address, concurrency=concurrency)), b"hello")


def test_http_closed_loop_keeps_the_given_number_in_flight() -> None:
    gate, first = threading.Barrier(3, timeout=5), threading.local()

    def answer(connection: socket.socket) -> bool:
        # nobody is answered before three have asked: with fewer in flight, the gate breaks and the connection is closed
        if not hasattr(first, "passed"):
            try:
                gate.wait()
            except threading.BrokenBarrierError:
                return False
            first.passed = True
        connection.sendall(OK)
        return True

    with http_server(answer) as address:
        result = run_http(http_plan(address, concurrency=3, seconds=0.02, warm_up_s=0.0))
    assert (result.errors, result.unanswered) == (0, 0)
    assert result.total >= 3


@pytest.mark.parametrize("concurrency", [1, 2])
def test_http_refusals_are_errors_with_their_text(concurrency: int) -> None:
    with http_server(replying(REFUSED)) as address:
        result = run_http(http_plan(address, concurrency=concurrency))
    assert result.errors == result.total > 0
    assert '{"error":"busy"}' in result.first_error
    assert result.kept == []


@pytest.mark.parametrize("concurrency", [1, 2])
def test_http_reply_in_pieces_is_put_together(concurrency: int) -> None:
    def answer(connection: socket.socket) -> bool:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(OK), 7):
            connection.sendall(OK[at : at + 7])
        return True

    with http_server(answer) as address:
        result = run_http(http_plan(address, concurrency=concurrency))
    assert result.errors == 0
    assert set(result.kept) == {b"hello"}


@pytest.mark.parametrize("concurrency", [1, 2])
def test_http_connection_closed_by_the_server_is_an_error_and_a_new_one_is_made(concurrency: int) -> None:
    def answer(connection: socket.socket) -> bool:
        connection.sendall(OK)
        return False

    with http_server(answer) as address:
        result = run_http(http_plan(address, concurrency=concurrency))
    assert result.errors > 0
    assert result.total - result.errors > 0
    assert result.first_error


def test_http_request_larger_than_the_kernel_takes_is_sent_in_parts() -> None:
    request = b"POST / HTTP/1.1\r\nContent-Length: 8000000\r\n\r\n" + bytes(8_000_000)
    with http_server(replying(OK), request) as address:
        result = run_http(http_plan(address, concurrency=2, request=request))
    assert result.errors == 0
    assert result.total >= 2


def test_http_open_loop_measures_from_the_scheduled_arrival() -> None:
    served = threading.Semaphore(0)

    def answer(connection: socket.socket) -> bool:
        # one connection and 5 ms each for 1,000 requests a second: they queue, and the wait is theirs
        served.acquire(timeout=0.005)
        connection.sendall(OK)
        return True

    with http_server(answer) as address:
        result = run_http_open(http_plan(address, rate_per_s=1000.0, warm_up_s=0.0, seconds=0.1))
    assert result.unanswered == 0
    assert result.total > 50
    assert result.latencies[-1] > 0.2


def test_http_open_loop_sends_what_was_scheduled() -> None:
    with http_server(replying(OK)) as address:
        plan = http_plan(address, rate_per_s=300.0, concurrency=4)
        result = run_http_open(plan)
    assert (result.errors, result.unanswered) == (0, 0)
    meter = Meter(plan)
    assert result.total == sum(1 for at in arrivals(plan, meter) if at < meter.ends)


@pytest.mark.parametrize("concurrency", [1, 5])
def test_zmq_closed_loop_counts_good_replies(concurrency: int) -> None:
    with router(good) as address:
        assert_clean(run_zmq(zmq_plan(address, concurrency=concurrency)), b"scores")


def test_zmq_closed_loop_takes_a_bare_echo_for_good() -> None:
    with router(lambda frames: [frames]) as address:
        assert_clean(run_zmq(zmq_plan(address)), b"data")


def test_zmq_refusals_are_errors_with_their_text() -> None:
    with router(lambda _: [[b"AIP1", b'{"id":"1","ok":false,"code":"RESOURCE_EXHAUSTED"}']]) as address:
        result = run_zmq(zmq_plan(address, concurrency=2))
    assert result.errors == result.total > 0
    assert "RESOURCE_EXHAUSTED" in result.first_error


def test_zmq_silence_ends_the_loop_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.cli.load.REPLY_TIMEOUT_S", 0.05)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    silent = context.socket(zmq.ROUTER)
    port = silent.bind_to_random_port("tcp://127.0.0.1")
    result = run_zmq(zmq_plan(f"tcp://127.0.0.1:{port}", concurrency=3))
    silent.close(0)
    context.term()
    assert (result.unanswered, result.replies) == (3, 0)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_http_silence_ends_the_loop_and_is_told(concurrency: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.cli.load.REPLY_TIMEOUT_S", 0.05)
    with http_server(lambda _: True) as address:
        result = run_http(http_plan(address, concurrency=concurrency))
    assert (result.unanswered, result.replies) == (concurrency, 0)


def test_zmq_open_loop_matches_replies_that_overtake() -> None:
    plan = zmq_plan("", rate_per_s=300.0, warm_up_s=0.0)
    meter = Meter(plan)
    expected = sum(1 for at in arrivals(plan, meter) if at < meter.ends)
    held: list[list[bytes]] = []

    def first_last(frames: list[bytes]) -> list[list[bytes]]:
        held.append(frames)
        if len(held) == 1:
            return []
        return good(frames) + (good(held[0]) if len(held) == expected else [])

    with router(first_last) as address:
        result = run_zmq_open(msgspec.structs.replace(plan, address=address))
    assert (result.errors, result.unanswered, result.total) == (0, 0, expected)
    # the first waited for the whole run, whatever the others took
    assert result.latencies[-1] > 0.1
    assert result.latencies[-1] > 2 * result.latencies[-2]


def test_arrivals_are_seeded_and_exponentially_apart() -> None:
    def gaps(seed: int) -> list[float]:
        plan = Plan("", 1, 2.0, warm_up_s=0.0, rate_per_s=1000.0, seed=seed)
        times = list(arrivals(plan, Meter(plan)))
        assert times[-1] == float("inf")
        return [after - before for before, after in pairwise(times[:-1])]

    found, source = gaps(3), random.Random(3)
    source.expovariate(1000.0)
    assert found == pytest.approx([source.expovariate(1000.0) for _ in found], abs=1e-6)
    assert gaps(4)[:5] != pytest.approx(found[:5])


def test_runner_is_chosen_by_transport_and_loop() -> None:
    plan = Plan("", 1, 1.0)
    frames, rate = (b"",), 1.0
    replace = msgspec.structs.replace
    assert runner(plan) is run_http
    assert runner(replace(plan, rate_per_s=rate)) is run_http_open
    assert runner(replace(plan, frames=frames)) is run_zmq
    assert runner(replace(plan, frames=frames, rate_per_s=rate)) is run_zmq_open


def test_plan_in_and_result_out_through_a_process() -> None:
    with http_server(replying(OK)) as address:
        done = subprocess.run(
            [sys.executable, "-m", "appliance.cli.load"],
            input=msgspec.msgpack.encode(http_plan(address)),
            capture_output=True,
            check=True,
            timeout=30,
        )
    result = msgspec.msgpack.decode(done.stdout, type=Result)
    assert_clean(result, b"hello")
    assert result.client_cpu_s > 0
