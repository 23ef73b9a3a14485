"""Generated nonsense over both transports: no crash, no 5xx for a client's fault, memory flat, good clients served meanwhile."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
from collections import Counter
from urllib.parse import urlsplit

import psutil
import pytest
import zmq

from tests.e2e.house import LONG_S, House
from tests.e2e.test_adversity import Load

PATH = "/v2/models/echo/infer"


def mutated(source: random.Random, good: bytes) -> bytes:
    """The good bytes, damaged: cut, flipped, repeated, or replaced by noise."""
    data = bytearray(good)
    for _ in range(source.randrange(1, 4)):
        how = source.randrange(5)
        at = source.randrange(len(data)) if data else 0
        if how == 0:
            del data[at:]
        elif how == 1 and data:
            data[at] = source.randrange(256)
        elif how == 2:
            data[at:at] = data[at : at + source.randrange(1, 64)] * source.randrange(1, 8)
        elif how == 3:
            data[at:at] = source.choice(
                [b"[[[[[", b"{", b'"', b"9" * 400, b"-1", b"1e999", b"\xff\xfe", b"null", b"\0"]
            )
        else:
            data = bytearray(source.randbytes(source.randrange(200)))
    return bytes(data)


class HttpAttacker:
    """Sends bodies that are no requests, over connections that it opens again when they are cut."""

    def __init__(self, house: House, seed: int) -> None:
        parts = urlsplit(house.http)
        self._address = (parts.hostname or "", parts.port or 0)
        self._source = random.Random(seed)
        self._socket: socket.socket | None = None
        self.statuses: Counter[int] = Counter()
        text = json.dumps(
            {"inputs": [{"name": "data", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
        ).encode()
        tensor = {"name": "data", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
        self._json = text
        self._head = json.dumps({"inputs": [tensor]}).encode()

    def attack(self) -> None:
        """One body."""
        binary = self._source.random() < 0.5
        head, body = "", mutated(self._source, self._json)
        if binary:
            length = self._source.choice([len(self._head), 0, 1, len(self._head) + 1, 10**9, -1])
            head = f"Inference-Header-Content-Length: {length}\r\n"
            body = self._source.choice([self._head, mutated(self._source, self._head)]) + self._source.randbytes(16)
        if self._source.random() < 0.1:
            head += f"Content-Encoding: {self._source.choice(['gzip', 'deflate', 'br', 'x'])}\r\n"
        request = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.statuses[self._send(request)] += 1

    def _send(self, request: bytes) -> int:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=LONG_S)
        try:
            self._socket.sendall(request)
            reply = b""
            while b"\r\n\r\n" not in reply:
                part = self._socket.recv(65_536)
                if not part:
                    raise ConnectionError
                reply += part
            head, _, body = reply.partition(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            while len(body) < length:
                body += self._socket.recv(65_536)
            # an answer in binary begins with a document, too, but does not end with it
            assert b"octet-stream" in head or json.loads(body).keys() & {"error", "outputs"}
        except ConnectionError:
            self.close()
            return 0
        if b"connection: close" in head.lower():
            self.close()
        return int(head.split()[1])

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def attack_zmq(house: House, count: int, seed: int) -> Counter[str]:
    """Messages that are no requests; every one that has an envelope is answered."""
    source = random.Random(seed)
    header = json.dumps(
        {
            "op": "infer",
            "id": "1",
            "model": "echo",
            "inputs": [{"name": "data", "datatype": "FP32", "shape": [1, 4], "frame": 0}],
        }
    ).encode()
    good = [b"AIP1", header, struct.pack("<4f", 1, 2, 3, 4)]
    codes: Counter[str] = Counter()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(house.ipc)
        for _ in range(count):
            frames = list(good)
            if source.random() < 0.2:
                frames = frames[: source.randrange(1, 3)] + [b"x"] * source.randrange(3)
            else:
                frames[source.choice([1, 1, 2])] = mutated(source, source.choice(frames[1:]))
            dealer.send_multipart(frames)
            assert dealer.poll(LONG_S * 1000), "a message was never answered"
            answer = json.loads(dealer.recv_multipart()[1])
            codes["OK" if answer["ok"] else answer["code"]] += 1
    return codes


def garbage(house: House, count: int) -> None:
    house.loopback("echo", shape="4")
    house.start()
    front = psutil.Process(house.pid)
    attacker = HttpAttacker(house, seed=1)
    with (
        contextlib.closing(attacker),
        Load(house, "echo", "http") as good,
        Load(house, "echo", "zmq") as good_zmq,
    ):
        for _ in range(count // 5):
            attacker.attack()
        codes = attack_zmq(house, count // 5, seed=2)
        before = front.memory_info().rss
        for _ in range(count - count // 5):
            attacker.attack()
        codes += attack_zmq(house, count - count // 5, seed=3)
        grown = front.memory_info().rss - before
    assert set(good.answers) == {"200"}, good.answers
    assert set(good_zmq.answers) == {"OK"}, good_zmq.answers
    # 501 is our word for an encoding or an extension that we do not have; it is the client's fault all the same
    assert {status for status in attacker.statuses if status >= 500} <= {501}, attacker.statuses
    assert sum(attacker.statuses.values()) == count
    assert set(codes) <= {
        "OK",
        "INVALID_ARGUMENT",
        "UNSUPPORTED",
        "NOT_FOUND",
        "PAYLOAD_TOO_LARGE",
        "DEADLINE_EXCEEDED",
    }, codes
    assert grown < 8 << 20, f"{grown / 1e6:.1f} MB more"
    assert house.stop() == 0


def test_garbage_harms_nobody(house: House) -> None:
    garbage(house, 1000)


@pytest.mark.slow
def test_100_000_pieces_of_garbage_each_way_harm_nobody(house: House) -> None:
    garbage(house, 100_000)
