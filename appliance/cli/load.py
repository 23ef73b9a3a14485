"""Load generators: one process each, cheap enough to share two cores with the server they measure.

A generator keeps a number of requests in flight (closed loop) or sends at given times (open loop), checks every reply and prints
one JSON object. Pure standard library and pyzmq; run as `python -m appliance.cli.load`, driven by `bench`.
"""

from __future__ import annotations

import json
import random
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import zmq


class Plan(msgspec.Struct, frozen=True):
    """What to send, and how. `rate_per_s` 0: closed loop with `concurrency` in flight; else Poisson arrivals at that rate.

    `address` is http://host:port, unix:/path or a ZeroMQ endpoint; `head` and `body` are one HTTP request, `frames` one message.
    """

    address: str
    concurrency: int
    seconds: float
    warm_up_s: float = 0.5
    rate_per_s: float = 0.0
    seed: int = 1
    request: bytes = b""
    frames: tuple[bytes, ...] = ()
    keep: int = 4


class Result(msgspec.Struct):
    """What came of it. Latencies in seconds, ascending; `kept` are some replies, to be compared with the truth."""

    replies: int
    errors: int
    seconds: float
    latencies: list[float]
    kept: list[bytes]
    unanswered: int = 0
    first_error: str = ""
    client_cpu_s: float = 0.0


class HttpChannel:
    """One HTTP/1.1 connection, one request in flight."""

    def __init__(self, address: str, request: bytes) -> None:
        self._request = request
        if address.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address[5:])
        else:
            parts = urlsplit(address)
            self.socket = socket.create_connection((parts.hostname or "", parts.port or 80))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.started = 0.0
        self._buffer = b""
        self._need = -1
        self._start = 0

    def send(self) -> None:
        """Send the request; it is small or the server reads, so this does not block for long."""
        self.socket.sendall(self._request)

    def receive(self) -> tuple[bool, bytes] | None:
        """Read once; the reply if it is whole."""
        data = self.socket.recv(262_144)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer = self._buffer + data if self._buffer else data
        if self._need < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return None
            at = self._buffer.find(b"ontent-Length: ", 0, end)
            if at < 0:
                at = self._buffer.lower().find(b"ontent-length: ", 0, end)
            stop = self._buffer.find(b"\r\n", at)
            self._start = end + 4
            self._need = self._start + int(self._buffer[at + 15 : stop])
        if len(self._buffer) < self._need:
            return None
        whole = self._buffer
        self._buffer = b""
        self._need = -1
        good = whole[9:12] == b"200"
        return good, whole if not good else whole[self._start :]


def run_http(plan: Plan) -> Result:
    """Closed loop over `concurrency` connections."""
    channels = [HttpChannel(plan.address, plan.request) for _ in range(plan.concurrency)]
    meter = Meter(plan)
    if len(channels) == 1:
        _http_alone(channels[0], meter)
    else:
        _http_many(channels, meter)
    for channel in channels:
        channel.socket.close()
    return meter.result()


def _http_alone(channel: HttpChannel, meter: Meter) -> None:
    """One in flight: blocking calls, since a poll before each would be measured too."""
    channel.socket.settimeout(10.0)
    now = meter.begin()
    while now < meter.ends:
        channel.started = now
        channel.send()
        while (reply := channel.receive()) is None:
            continue
        now = time.perf_counter()
        meter.count(now, now - channel.started, *reply)


def _http_many(channels: list[HttpChannel], meter: Meter) -> None:
    poll = select.epoll()
    by_fd = {channel.socket.fileno(): channel for channel in channels}
    for descriptor in by_fd:
        poll.register(descriptor, select.EPOLLIN)
    now = meter.begin()
    for channel in channels:
        channel.started = time.perf_counter()
        channel.send()
    pending = len(channels)
    while pending:
        ready = poll.poll(10.0)
        if not ready:
            meter.unanswered = pending
            break
        for descriptor, _ in ready:
            channel = by_fd[descriptor]
            reply = channel.receive()
            if reply is None:
                continue
            now = time.perf_counter()
            meter.count(now, now - channel.started, *reply)
            if now < meter.ends:
                channel.started = now
                channel.send()
            else:
                pending -= 1
    poll.close()


def run_http_open(plan: Plan) -> Result:
    """Poisson arrivals over as many connections as are needed, up to `concurrency`; latency from the scheduled arrival."""
    meter = Meter(plan)
    free = [HttpChannel(plan.address, plan.request) for _ in range(plan.concurrency)]
    channels = {channel.socket.fileno(): channel for channel in free}
    poll = select.epoll()
    for descriptor in channels:
        poll.register(descriptor, select.EPOLLIN)
    waiting: deque[float] = deque()
    arrivals = _arrivals(plan, meter)
    following = next(arrivals)
    busy = 0
    while True:
        now = time.perf_counter()
        while following is not None and following <= now:
            waiting.append(following)
            following = next(arrivals)
        while waiting and free:
            channel = free.pop()
            channel.started = waiting.popleft()
            channel.send()
            busy += 1
        if following is None and not busy and not waiting:
            break
        if now > meter.ends + 5.0:
            meter.unanswered = busy + len(waiting)
            break
        timeout = max(0.0, following - now) if following is not None else 0.1
        for descriptor, _ in poll.poll(timeout):
            channel = channels[descriptor]
            reply = channel.receive()
            if reply is None:
                continue
            now = time.perf_counter()
            meter.count(now, now - channel.started, *reply)
            free.append(channel)
            busy -= 1
    for channel in channels.values():
        channel.socket.close()
    poll.close()
    return meter.result()


def _arrivals(plan: Plan, meter: Meter) -> Any:
    """Scheduled arrival times, then None for ever."""
    source = random.Random(plan.seed)  # noqa: S311  arrival times are no secret
    at = meter.begin()
    while at < meter.ends:
        at += source.expovariate(plan.rate_per_s)
        yield at
    while True:
        yield None


class Meter:
    """Counts replies after the warm-up."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.begins = self.ends = 0.0
        self.unanswered = 0
        self._latencies: list[float] = []
        self._errors = 0
        self._first_error = ""
        self._kept: list[bytes] = []
        self._last = 0.0
        self._cpu = 0.0

    def begin(self) -> float:
        """The clock starts; the time."""
        now = time.perf_counter()
        self.begins = now + self._plan.warm_up_s
        self.ends = self.begins + self._plan.seconds
        self._last = self.begins
        self._cpu = time.process_time()
        return now

    def count(self, now: float, latency: float, good: bool, payload: bytes) -> None:
        """One reply."""
        if not good:
            self._errors += 1
            self._first_error = self._first_error or bytes(payload[-300:]).decode(errors="replace")
        elif len(self._kept) < self._plan.keep:
            self._kept.append(bytes(payload))
        if now >= self.begins:
            self._latencies.append(latency)
            self._last = now

    def result(self) -> Result:
        """What came of it."""
        self._latencies.sort()
        return Result(
            len(self._latencies),
            self._errors,
            max(self._last - self.begins, 1e-9),
            self._latencies,
            self._kept,
            self.unanswered,
            self._first_error,
            time.process_time() - self._cpu,
        )


def run_zmq(plan: Plan) -> Result:
    """One DEALER, closed loop; replies are matched by order, which holds as each is like the other."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, 10_000)
    dealer.connect(plan.address)
    meter = Meter(plan)
    frames = list(plan.frames)
    large = sum(map(len, frames)) > 65_536
    started: deque[float] = deque()
    now = meter.begin()
    for _ in range(plan.concurrency):
        started.append(time.perf_counter())
        dealer.send_multipart(frames, copy=not large)
    try:
        while started:
            reply = dealer.recv_multipart()
            now = time.perf_counter()
            # a bare echo gives back what it got; the appliance says ok
            good = b'"ok":true' in reply[1] or reply[1] == frames[1]
            meter.count(now, now - started.popleft(), good, reply[-1] if good else reply[1])
            if now < meter.ends:
                started.append(now)
                dealer.send_multipart(frames, copy=not large)
    except zmq.Again:
        meter.unanswered = len(started)
    dealer.close()
    context.term()
    return meter.result()


def run_zmq_open(plan: Plan) -> Result:
    """Poisson arrivals on one DEALER; replies carry the request's id, since they may overtake."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.SNDHWM, 100_000)
    dealer.connect(plan.address)
    meter = Meter(plan)
    header = json.loads(plan.frames[1])
    arrivals = _arrivals(plan, meter)
    following = next(arrivals)
    started: dict[str, float] = {}
    number = 0
    while True:
        now = time.perf_counter()
        while following is not None and following <= now:
            number += 1
            started[str(number)] = following
            header["id"] = str(number)
            dealer.send_multipart([plan.frames[0], json.dumps(header).encode(), *plan.frames[2:]])
            following = next(arrivals)
        if following is None and not started:
            break
        if now > meter.ends + 5.0:
            meter.unanswered = len(started)
            break
        timeout_ms = max(0.0, following - now) * 1000 if following is not None else 100
        if not dealer.poll(timeout_ms):
            continue
        while dealer.poll(0):
            reply = dealer.recv_multipart()
            now = time.perf_counter()
            good = b'"ok":true' in bytes(reply[1])
            at = started.pop(json.loads(reply[1])["id"])
            meter.count(now, now - at, good, reply[-1] if good else reply[1])
    dealer.close()
    context.term()
    return meter.result()


def runner(plan: Plan) -> Callable[[Plan], Result]:
    """The generator for a plan."""
    if plan.frames:
        return run_zmq_open if plan.rate_per_s else run_zmq
    return run_http_open if plan.rate_per_s else run_http


def main() -> None:
    """Read a plan (MessagePack) from stdin, run it, write the result to stdout."""
    plan = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Plan)
    result = runner(plan)(plan)
    sys.stdout.buffer.write(msgspec.msgpack.encode(result))


if __name__ == "__main__":
    main()
