"""Load generators: one process each, cheap enough to share two cores with the server they measure.

A generator keeps so many requests in flight (closed loop) or sends at Poisson arrival times (open loop), checks every reply, and
keeps some for whoever can compare them with the truth. It knows no model: the bytes of its requests come from `payloads`.
Standard library and pyzmq; `bench` drives it through `generate`, which runs `python -m appliance.cli.load`.
"""

from __future__ import annotations

import json
import math
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol, TypeAlias
from urllib.parse import urlsplit

import msgspec
import zmq

GIVE_UP_S = 10.0
"""How long to wait for one reply, and for what is late at the end of an open loop."""

RECEIVE_BYTES = 65_536
ZERO_COPY_BYTES = 65_536
"""ZeroMQ messages from this size on are not copied; below it, the bookkeeping costs more than the copy."""

KEPT_BYTES = 4 << 20
"""What the kept replies may hold together."""


class Plan(msgspec.Struct, frozen=True):
    """What to send, and how. `rate_per_s` 0: closed loop with `concurrency` in flight; else Poisson arrivals at that rate.

    `address` is http://host:port, unix:/path or a ZeroMQ endpoint. `requests` are equivalent ones with different data, sent in
    turn: (whole HTTP request,) or (frame, …) with a JSON header as the second, whose `id` is set here.
    `good` stands in the header of a ZeroMQ reply that is no error.
    """

    address: str
    requests: tuple[tuple[bytes, ...], ...]
    concurrency: int = 1
    seconds: float = 2.0
    warm_up_s: float = 0.5
    rate_per_s: float = 0.0
    seed: int = 1
    good: str = '"ok":true'


class Kept(msgspec.Struct, frozen=True):
    """A good reply: the index of its request in the plan, and the HTTP body or the last frame."""

    request: int
    payload: bytes


class Result(msgspec.Struct, frozen=True):
    """What came of it.

    `replies` (errors too), `latencies` (seconds, ascending) and `seconds` are of the measured window; `answered` and `errors`
    count from the first request to the last reply, warm-up included. `unanswered` never came.
    """

    replies: int
    seconds: float
    latencies: list[float]
    answered: int
    errors: int
    unanswered: int
    first_error: str
    kept: list[Kept]

    @property
    def per_second(self) -> float:
        """Replies per second."""
        return self.replies / self.seconds

    def latency_ms(self, share: float) -> float:
        """The latency that this share of the replies did not exceed; NaN without replies."""
        return percentile(self.latencies, share) * 1e3


def percentile(ascending: list[float], share: float) -> float:
    """By nearest rank: the smallest value that at least `share` of them do not exceed. NaN of nothing."""
    if not ascending:
        return float("nan")
    return ascending[max(0, math.ceil(len(ascending) * share) - 1)]


Reply: TypeAlias = tuple[int, bool, bytes]
"""Of which slot, whether it is good, and its payload (an error's text otherwise)."""


class Client(Protocol):
    """A way to the server with numbered slots, each with one request in flight at most."""

    def send(self, slot: int) -> None:
        """Send the slot's request."""

    def replies(self) -> Iterator[Reply]:
        """Replies as they come, for ever; ends when nothing came for GIVE_UP_S."""

    def ready(self, wait_s: float) -> Iterator[Reply]:
        """The replies that are there, or that come first within `wait_s`."""

    def close(self) -> None:
        """Hang up."""


class HttpConnection:
    """One HTTP/1.1 connection, one request in flight; replies have a Content-Length."""

    def __init__(self, address: str, request: bytes, *, blocking: bool) -> None:
        self._request = memoryview(request)
        self._unsent = self._request[:0]
        self._parts: list[bytes] = []
        self._missing = 0
        if address.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address.removeprefix("unix:"))
        else:
            parts = urlsplit(address)
            self.socket = socket.create_connection((parts.hostname or "", parts.port or 80))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # the kernel's timeout: Python's own would add a poll() to each recv()
        self.socket.setblocking(blocking)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(GIVE_UP_S), 0))

    def send(self) -> bool:
        """Start the request; False if some of it has to wait until the socket is writable."""
        return self._push(self._request)

    def send_more(self) -> bool:
        """Go on sending; False as before."""
        return self._push(self._unsent)

    def _push(self, data: memoryview) -> bool:
        try:
            self._unsent = data[self.socket.send(data) :]
        except BlockingIOError:
            self._unsent = data
        return not self._unsent

    def read(self) -> tuple[bool, bytes] | None:
        """Read once; whether it is good and its body, if the reply is whole. BlockingIOError after GIVE_UP_S."""
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionError("the server closed the connection")
        if self._parts:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return None
            data = b"".join(self._parts)
            self._parts.clear()
        start = data.find(b"\r\n\r\n") + 4
        stop = start + _content_length(data, start) if start >= 4 else len(data) + 1
        if len(data) >= stop:
            return data[9:12] == b"200", data[start:stop]
        self._parts.append(data)
        self._missing = stop - len(data)
        return None


def _content_length(data: bytes, end: int) -> int:
    # with the line's end before it: there is an Inference-Header-Content-Length, too
    at = data.find(b"\r\nContent-Length: ", 0, end)
    if at < 0:
        at = data[:end].lower().find(b"\r\ncontent-length: ")
        if at < 0:
            raise ConnectionError("the server's reply has no Content-Length")
    return int(data[at + 18 : data.index(b"\r\n", at + 18)])


class HttpClient:
    """A connection for each slot. One alone blocks in its calls, since a poll before each would be measured too."""

    def __init__(self, plan: Plan) -> None:
        self._alone = plan.concurrency == 1 and not plan.rate_per_s
        self._connections = [
            HttpConnection(plan.address, plan.requests[slot % len(plan.requests)][0], blocking=self._alone)
            for slot in range(plan.concurrency)
        ]
        self._poll = select.epoll()
        self._slots = {connection.socket.fileno(): slot for slot, connection in enumerate(self._connections)}
        for descriptor in self._slots:
            self._poll.register(descriptor, select.EPOLLIN)

    def send(self, slot: int) -> None:
        """See `Client.send`."""
        connection = self._connections[slot]
        if connection.send():
            return
        if self._alone:
            while not connection.send_more():
                continue
        else:
            self._poll.modify(connection.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def replies(self) -> Iterator[Reply]:
        """See `Client.replies`."""
        if self._alone:
            yield from self._replies_alone()
            return
        while events := self._poll.poll(GIVE_UP_S):
            yield from self._handle(events)

    def _replies_alone(self) -> Iterator[Reply]:
        read = self._connections[0].read
        try:
            while True:
                reply = read()
                if reply is not None:
                    yield 0, *reply
        except BlockingIOError:
            return

    def ready(self, wait_s: float) -> Iterator[Reply]:
        """See `Client.ready`. epoll's own timeout is rounded up to milliseconds; select's is not."""
        select.select([self._poll.fileno()], [], [], wait_s)
        yield from self._handle(self._poll.poll(0))

    def _handle(self, events: list[tuple[int, int]]) -> Iterator[Reply]:
        for descriptor, event in events:
            slot = self._slots[descriptor]
            connection = self._connections[slot]
            if event & select.EPOLLOUT and connection.send_more():
                self._poll.modify(descriptor, select.EPOLLIN)
            if event & ~select.EPOLLOUT:
                reply = connection.read()
                if reply is not None:
                    yield slot, *reply

    def close(self) -> None:
        """See `Client.close`."""
        self._poll.close()
        for connection in self._connections:
            connection.socket.close()


class ZmqClient:
    """One DEALER. Replies may overtake each other, so each request's id is its slot."""

    def __init__(self, plan: Plan) -> None:
        self._good = plan.good.encode()
        self._messages = [
            _with_id(plan.requests[slot % len(plan.requests)], str(slot)) for slot in range(plan.concurrency)
        ]
        self._copy = sum(map(len, self._messages[0])) < ZERO_COPY_BYTES
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.RCVTIMEO, int(GIVE_UP_S * 1000))
        self._dealer.setsockopt(zmq.SNDTIMEO, int(GIVE_UP_S * 1000))
        self._dealer.connect(plan.address)
        self._descriptor: int = self._dealer.fileno()

    def send(self, slot: int) -> None:
        """See `Client.send`."""
        self._dealer.send_multipart(self._messages[slot], copy=self._copy)

    def replies(self) -> Iterator[Reply]:
        """See `Client.replies`."""
        try:
            while True:
                yield self._reply(self._dealer.recv_multipart())
        except zmq.Again:
            return

    def ready(self, wait_s: float) -> Iterator[Reply]:
        """See `Client.ready`. The descriptor tells of changes only: what is there already is taken first."""
        if not self._dealer.poll(0):
            select.select([self._descriptor], [], [], wait_s)
        try:
            while True:
                yield self._reply(self._dealer.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return

    def _reply(self, frames: list[bytes]) -> Reply:
        header = frames[1]
        at = header.find(b'"id":"') + 6
        if at < 6 or not header[at : at + 1].isdigit():
            raise ConnectionError(f"a reply to no request: {header[:300].decode(errors='replace')}")
        good = self._good in header
        return int(header[at : header.index(b'"', at)]), good, frames[-1] if good else header

    def close(self) -> None:
        """See `Client.close`."""
        self._dealer.close()
        self._context.term()


def _with_id(frames: tuple[bytes, ...], request_id: str) -> list[bytes]:
    header = json.dumps(json.loads(frames[1]) | {"id": request_id}, separators=(",", ":"))
    return [frames[0], header.encode(), *frames[2:]]


class Meter:
    """Counts. The window opens after the warm-up, and closes after the time asked for and one reply to each slot at least."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._open_loop = plan.rate_per_s > 0
        self.opens = self.closes = 0.0
        self.unanswered = 0
        self._answered = 0
        self._errors = 0
        self._first_error = ""
        self._latencies: list[float] = []
        self._before = self._last = 0.0
        self._kept: list[Kept] = []
        self._kept_bytes = 0
        self._keep_next = 1

    def begin(self) -> float:
        """The clock starts; its time."""
        now = time.perf_counter()
        self.opens = now + self._plan.warm_up_s
        self.closes = self.opens + self._plan.seconds
        self._before = now
        return now

    def count(self, now: float, since: float, reply: Reply) -> bool:
        """A reply to a request of that time; whether the window is still to come or open."""
        self._answered += 1
        slot, good, payload = reply
        if not good:
            self._errors += 1
            self._first_error = self._first_error or payload[:300].decode(errors="replace")
        elif self._answered >= self._keep_next:
            self._keep(slot, payload)
        # a request belongs to an open loop's window by its arrival, or the slow ones at the end would be left out
        at = since if self._open_loop else now
        if at < self.opens:
            self._before = now
            return True
        if at > self.closes and len(self._latencies) >= self._plan.concurrency:
            return False
        self._latencies.append(now - since)
        self._last = now
        return True

    def _keep(self, slot: int, payload: bytes) -> None:
        """Replies of every phase: about eight of each doubling of their number."""
        self._keep_next = self._answered + max(1, self._answered // 8)
        self._kept_bytes += len(payload)
        if self._kept_bytes <= KEPT_BYTES or not self._kept:
            self._kept.append(Kept(slot % len(self._plan.requests), payload))

    def result(self) -> Result:
        """What came of it. The time runs from the last reply before the window to the last in it, so that batches count whole."""
        self._latencies.sort()
        seconds = max(self._last, self.closes) - self.opens if self._open_loop else self._last - self._before
        return Result(
            len(self._latencies),
            max(seconds, 1e-9),
            self._latencies,
            self._answered,
            self._errors,
            self.unanswered,
            self._first_error,
            self._kept,
        )


def closed_loop(client: Client, plan: Plan, meter: Meter) -> None:
    """Every slot always has a request in flight."""
    started = [0.0] * plan.concurrency
    pending = plan.concurrency
    meter.begin()
    for slot in range(plan.concurrency):
        started[slot] = time.perf_counter()
        client.send(slot)
    for reply in client.replies():
        now = time.perf_counter()
        slot = reply[0]
        if meter.count(now, started[slot], reply):
            started[slot] = now
            client.send(slot)
        else:
            pending -= 1
            if not pending:
                break
    meter.unanswered = pending


def open_loop(client: Client, plan: Plan, meter: Meter) -> None:
    """Requests arrive when they do; one that finds no free slot waits, and its latency counts from its arrival."""
    started = [0.0] * plan.concurrency
    free = list(range(plan.concurrency))
    due: deque[float] = deque()
    meter.begin()
    arrivals = poisson(plan, meter.opens - plan.warm_up_s, meter.closes)
    upcoming = next(arrivals, None)
    while upcoming is not None or due or len(free) < plan.concurrency:
        now = time.perf_counter()
        if now > meter.closes + GIVE_UP_S:
            break
        while upcoming is not None and upcoming <= now:
            due.append(upcoming)
            upcoming = next(arrivals, None)
        while due and free:
            slot = free.pop()
            started[slot] = due.popleft()
            client.send(slot)
        wait_s = 0.1 if upcoming is None else max(0.0, upcoming - time.perf_counter())
        for reply in client.ready(wait_s):
            meter.count(time.perf_counter(), started[reply[0]], reply)
            free.append(reply[0])
    meter.unanswered = len(due) + plan.concurrency - len(free)


def poisson(plan: Plan, begins: float, ends: float) -> Iterator[float]:
    """Seeded arrival times at the plan's rate, ascending."""
    source = random.Random(plan.seed)  # noqa: S311  arrival times are no secret
    at = begins + source.expovariate(plan.rate_per_s)
    while at < ends:
        yield at
        at += source.expovariate(plan.rate_per_s)


def run(plan: Plan) -> Result:
    """Carry out the plan, here. OSError or zmq.ZMQError if the server cannot be reached or hangs up."""
    client: Client = ZmqClient(plan) if plan.address.startswith(("ipc://", "tcp://")) else HttpClient(plan)
    meter = Meter(plan)
    try:
        (open_loop if plan.rate_per_s else closed_loop)(client, plan, meter)
    finally:
        client.close()
    return meter.result()


class LoadError(Exception):
    """The generator could not carry out its plan."""


def generate(plan: Plan) -> Result:
    """Carry out the plan in a process of its own, bounded in time. LoadError with the reason if it cannot."""
    limit_s = 2 * (plan.seconds + plan.warm_up_s) + 3 * GIVE_UP_S
    command = [sys.executable, "-m", "appliance.cli.load"]
    try:
        done = subprocess.run(  # noqa: S603  our own module
            command, input=msgspec.json.encode(plan), capture_output=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"the load generator did not end within {limit_s:g} s") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise LoadError(f"the load generator ended: {reason[-1]}")
    return msgspec.json.decode(done.stdout, type=Result)


def main() -> int:
    """Read a plan as JSON from stdin, carry it out, print the result as JSON."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    try:
        result = run(plan)
    except (OSError, zmq.ZMQError) as error:
        print(f"{plan.address}: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
