"""Load generators: one process each, cheap enough to share two cores with the server they measure.

A generator keeps a number of requests in flight (closed loop) or sends at given times (open loop), and checks every reply. It
reads a plan from stdin and writes its result to stdout, both MessagePack. It knows requests only as bytes: what they mean is the
business of `bench`, which drives it (`python -m appliance.cli.load`).
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import msgspec
import zmq

REPLY_TIMEOUT_S = 10.0
"""Without any reply for so long, a closed loop gives up."""
DRAIN_S = 5.0
"""An open loop waits so long after its end for what is still on its way."""
PRECISE_BELOW_S = 1.0
RECEIVE_BYTES = 65_536
COPY_LIMIT_BYTES = 65_536
"""ZeroMQ messages above this are sent without a copy; below it, copying is cheaper."""


class Plan(msgspec.Struct, frozen=True):
    """What to send, and how. `rate_per_s` 0: closed loop with `concurrency` in flight; else Poisson arrivals at that rate.

    `address` is http://host:port, unix:/path or a ZeroMQ endpoint; `request` is one whole HTTP request, `frames` one message.
    An open loop over HTTP opens `concurrency` connections; over ZeroMQ it uses one socket without a bound.
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
    """What came of it. Latencies in seconds, ascending; `kept` are some replies, to be compared with the truth.

    `replies` and `seconds` are those after the warm-up, `total` counts all; `client_cpu_s` is of the whole process, imports too.
    """

    replies: int
    total: int
    errors: int
    seconds: float
    latencies: list[float]
    kept: list[bytes]
    unanswered: int = 0
    first_error: str = ""
    client_cpu_s: float = 0.0


class Meter:
    """Counts replies, and measures those after the warm-up."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.begins = self.ends = 0.0
        self.unanswered = 0
        self._total = 0
        self._latencies: list[float] = []
        self._errors = 0
        self._first_error = ""
        self._kept: list[bytes] = []
        self._before = self._last = 0.0

    def begin(self) -> float:
        """The clock starts; the time."""
        now = time.perf_counter()
        self.begins = now + self._plan.warm_up_s
        self.ends = self.begins + self._plan.seconds
        self._before = self.begins if self._plan.rate_per_s else now
        self._last = self._before
        return now

    def count(self, now: float, latency: float, good: bool, payload: bytes) -> None:
        """One reply: its time, its latency in seconds, whether it was a good one, and what it carried."""
        self._total += 1
        if not good:
            self._errors += 1
            self._first_error = self._first_error or bytes(payload[-300:]).decode(errors="replace")
        elif len(self._kept) < self._plan.keep:
            self._kept.append(bytes(payload))
        if now < self.begins:
            if not self._plan.rate_per_s:
                self._before = now
        elif now <= self.ends or self._plan.rate_per_s or len(self._latencies) < self._plan.concurrency:
            self._latencies.append(latency)
            self._last = now

    def result(self) -> Result:
        """What came of it. A closed loop's time runs from the last reply before the window to the last in it."""
        self._latencies.sort()
        return Result(
            replies=len(self._latencies),
            total=self._total,
            errors=self._errors,
            seconds=max(self._last - self._before, 1e-9),
            latencies=self._latencies,
            kept=self._kept,
            unanswered=self.unanswered,
            first_error=self._first_error,
            client_cpu_s=time.process_time(),
        )


class HttpChannel:
    """One HTTP/1.1 connection with one request in flight."""

    def __init__(self, address: str, request: bytes) -> None:
        self._address = address
        self._request = request
        self.socket = self._connect()
        self.started = 0.0
        self._unsent = memoryview(b"")
        self._buffer = b""
        self._start = 0
        self._need = -1

    def _connect(self) -> socket.socket:
        if self._address.startswith("unix:"):
            made = socket.socket(socket.AF_UNIX)
            made.connect(self._address.removeprefix("unix:"))
        else:
            parts = urlsplit(self._address)
            made = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=REPLY_TIMEOUT_S)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.settimeout(REPLY_TIMEOUT_S)
        return made

    def block(self) -> None:
        """Wait in the kernel, at most REPLY_TIMEOUT_S (BlockingIOError): Python's own timeout would poll before each call."""
        self.socket.setblocking(True)
        seconds, rest = divmod(REPLY_TIMEOUT_S, 1.0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))

    def reconnect(self) -> None:
        """A new connection in place of one that the server closed."""
        self.socket.close()
        self._buffer, self._need, self._unsent = b"", -1, memoryview(b"")
        self.socket = self._connect()

    def start(self, at: float) -> bool:
        """Begin a request, whose latency counts from `at`; whether it is sent whole. A blocking socket sends it whole."""
        self.started = at
        self._unsent = memoryview(self._request)
        return self.flush()

    def flush(self) -> bool:
        """Send what is left of the request, as far as the kernel takes it; whether nothing is left."""
        while self._unsent:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except BlockingIOError:
                return False
        return True

    def receive(self) -> tuple[bool, bytes] | None:
        """Read once: None until the reply is whole, then whether it is good, and its body (or all of it, if not).

        ConnectionError if the server closed; OSError as the socket raises it.
        """
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer = self._buffer + data if self._buffer else data
        if self._need < 0 and not self._read_head():
            return None
        if len(self._buffer) < self._need:
            return None
        whole, self._buffer, self._need = self._buffer, b"", -1
        good = whole[9:12] == b"200"
        return good, whole[self._start :] if good else whole

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        at = self._buffer.find(b"\r\nContent-Length: ", 0, end)
        if at < 0:
            at = self._buffer[:end].lower().find(b"\r\ncontent-length: ")
        if at < 0:
            raise ConnectionError("a reply without Content-Length")
        self._start = end + 4
        self._need = self._start + int(self._buffer[at + 18 : self._buffer.find(b"\r\n", at + 2)])
        return True


class HttpPool:
    """Channels on one epoll: what was started comes back from `poll` when it is answered."""

    def __init__(self, plan: Plan) -> None:
        self._epoll = select.epoll()
        self._by_fd: dict[int, HttpChannel] = {}
        for _ in range(plan.concurrency):
            self._add(HttpChannel(plan.address, plan.request))

    @property
    def channels(self) -> list[HttpChannel]:
        """All of them."""
        return list(self._by_fd.values())

    def _add(self, channel: HttpChannel) -> None:
        channel.socket.setblocking(False)
        self._by_fd[channel.socket.fileno()] = channel
        self._epoll.register(channel.socket.fileno(), select.EPOLLIN)

    def start(self, channel: HttpChannel, at: float) -> None:
        """Send a request on an idle channel; its latency counts from `at`."""
        # a connection that the server has closed meanwhile is found by the next poll
        with contextlib.suppress(ConnectionError):
            if not channel.start(at):
                self._epoll.modify(channel.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def poll(self, timeout_s: float) -> list[tuple[HttpChannel, bool, bytes]] | None:
        """Wait for something to happen; the channels that were answered, good or not. None after a wait in vain."""
        # epoll rounds its wait up to a millisecond, by which an arrival would be late; select does not, and costs a call more
        if timeout_s < PRECISE_BELOW_S and not select.select([self._epoll], (), (), timeout_s)[0]:
            return None
        events = self._epoll.poll(timeout_s)
        if not events:
            return None
        answered = []
        for descriptor, mask in events:
            channel = self._by_fd[descriptor]
            try:
                if mask & select.EPOLLOUT and channel.flush():
                    self._epoll.modify(descriptor, select.EPOLLIN)
                reply = channel.receive() if mask & ~select.EPOLLOUT else None
            except OSError as error:
                # the answer to this request is gone: that counts as a bad one, and the channel goes on
                del self._by_fd[descriptor]
                channel.reconnect()
                channel.socket.setblocking(False)
                self._add(channel)
                reply = False, str(error).encode()
            if reply is not None:
                answered.append((channel, *reply))
        return answered

    def close(self) -> None:
        """Close all."""
        self._epoll.close()
        for channel in self._by_fd.values():
            channel.socket.close()


def run_http(plan: Plan) -> Result:
    """Closed loop over `concurrency` connections."""
    return _http_alone(plan) if plan.concurrency == 1 else _http_many(plan)


def _http_alone(plan: Plan) -> Result:
    """One in flight: blocking calls, since a poll before each would be measured too."""
    channel, meter = HttpChannel(plan.address, plan.request), Meter(plan)
    channel.block()
    now = meter.begin()
    while now < meter.ends:
        try:
            channel.start(now)
            while (reply := channel.receive()) is None:
                continue
        except BlockingIOError:
            meter.unanswered = 1
            break
        except OSError as error:
            channel.reconnect()
            channel.block()
            reply = False, str(error).encode()
        now = time.perf_counter()
        meter.count(now, now - channel.started, *reply)
    channel.socket.close()
    return meter.result()


def _http_many(plan: Plan) -> Result:
    pool, meter = HttpPool(plan), Meter(plan)
    meter.begin()
    for channel in pool.channels:
        pool.start(channel, time.perf_counter())
    pending = plan.concurrency
    while pending:
        answered = pool.poll(REPLY_TIMEOUT_S)
        if answered is None:
            meter.unanswered = pending
            break
        for channel, good, payload in answered:
            now = time.perf_counter()
            meter.count(now, now - channel.started, good, payload)
            if now < meter.ends:
                pool.start(channel, now)
            else:
                pending -= 1
    pool.close()
    return meter.result()


def arrivals(plan: Plan, meter: Meter) -> Iterator[float]:
    """Scheduled times, exponentially apart, from now to the meter's end; then infinity, once."""
    source = random.Random(plan.seed)  # noqa: S311  arrival times are no secret
    at = meter.begin()
    while (at := at + source.expovariate(plan.rate_per_s)) < meter.ends:
        yield at
    yield float("inf")


def _wait_s(following: float, now: float) -> float:
    """Until the next arrival, but never for long: an end has to be noticed."""
    return min(max(0.0, following - now), 0.1)


def run_http_open(plan: Plan) -> Result:
    """Poisson arrivals, each on an idle connection or waiting for one; latency from the scheduled arrival."""
    pool, meter = HttpPool(plan), Meter(plan)
    idle, waiting = pool.channels, deque[float]()
    schedule = arrivals(plan, meter)
    following = next(schedule)
    while True:
        now = time.perf_counter()
        while following <= now:
            waiting.append(following)
            following = next(schedule)
        while waiting and idle:
            pool.start(idle.pop(), waiting.popleft())
        busy = plan.concurrency - len(idle) + len(waiting)
        if following == float("inf") and not busy:
            break
        if now > meter.ends + DRAIN_S:
            meter.unanswered = busy
            break
        for channel, good, payload in pool.poll(_wait_s(following, now)) or ():
            now = time.perf_counter()
            meter.count(now, now - channel.started, good, payload)
            idle.append(channel)
    pool.close()
    return meter.result()


def _dealer(plan: Plan, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.SNDHWM, 100_000)
    dealer.setsockopt(zmq.RCVHWM, 100_000)
    dealer.setsockopt(zmq.RCVTIMEO, int(REPLY_TIMEOUT_S * 1000))
    dealer.connect(plan.address)
    return dealer


def run_zmq(plan: Plan) -> Result:
    """One DEALER, closed loop; a reply is taken for that of the oldest request, since each is like the others."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer, meter = _dealer(plan, context), Meter(plan)
    frames = list(plan.frames)
    copy = sum(map(len, frames)) <= COPY_LIMIT_BYTES
    started: deque[float] = deque()
    meter.begin()
    for _ in range(plan.concurrency):
        started.append(time.perf_counter())
        dealer.send_multipart(frames, copy=copy)
    try:
        while started:
            reply = dealer.recv_multipart()
            now = time.perf_counter()
            # a bare echo gives back the header it got; the appliance says ok
            good = b'"ok":true' in reply[1] or reply[1] == frames[1]
            meter.count(now, now - started.popleft(), good, reply[-1] if good else reply[1])
            if now < meter.ends:
                started.append(now)
                dealer.send_multipart(frames, copy=copy)
    except zmq.Again:
        meter.unanswered = len(started)
    dealer.close()
    context.term()
    return meter.result()


def run_zmq_open(plan: Plan) -> Result:
    """Poisson arrivals on one DEALER; replies carry the request's id, since they may overtake."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer, meter = _dealer(plan, context), Meter(plan)
    header = json.loads(plan.frames[1])
    schedule = arrivals(plan, meter)
    following = next(schedule)
    started: dict[str, float] = {}
    number = 0
    while True:
        now = time.perf_counter()
        while following <= now:
            number += 1
            started[str(number)] = following
            header["id"] = str(number)
            dealer.send_multipart([plan.frames[0], json.dumps(header).encode(), *plan.frames[2:]])
            following = next(schedule)
        if following == float("inf") and not started:
            break
        if now > meter.ends + DRAIN_S:
            meter.unanswered = len(started)
            break
        try:
            reply = dealer.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            # not the socket's own poll, which waits whole milliseconds; its descriptor tells of news after the last look only
            select.select([dealer.fileno()], (), (), _wait_s(following, now))
            continue
        now = time.perf_counter()
        good = b'"ok":true' in reply[1]
        meter.count(now, now - started.pop(json.loads(reply[1])["id"]), good, reply[-1] if good else reply[1])
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
