"""What a client may cost: time, connections, bytes, chunks, log lines. Each limit answers, and hurts nobody else."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.transports.http import connection as connections
from appliance.transports.http.transport import EXCESS
from tests.transports.http.conftest import Client, House, infer_binary, infer_json, message, until

SOON = 0.05
MEGABYTE = 1 << 20


class TestDeadlines:
    @pytest.mark.parametrize("sent", [b"", b"P", b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: a\r\n"])
    async def test_headers_that_do_not_come_end_in_408(self, bare: House, sent: bytes) -> None:
        await bare.start(header_timeout_s=SOON)
        client = await bare.connect()
        client.send(sent)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert "headers" in reply.error
        assert await client.ended() == b""
        assert bare.transport.refusals == {"header_deadline": 1}

    async def test_headers_that_come_byte_by_byte_end_in_408_too(self, bare: House) -> None:
        await bare.start(header_timeout_s=SOON)
        client = await bare.connect()
        client.send(b"GET /v2 HTTP/1.1\r\nHost: a\r\nSlow: ")

        async def drip() -> None:
            while True:
                client.send(b"a")
                await asyncio.sleep(SOON / 10)

        dripping = asyncio.create_task(drip())
        try:
            assert (await client.reply()).status == 408
        finally:
            dripping.cancel()

    @pytest.mark.parametrize("length", [1000, 1_000_000])
    async def test_a_body_that_does_not_come_ends_in_408(self, bare: House, length: int) -> None:
        await bare.start(body_timeout_s=SOON)
        client = await bare.connect()
        client.send(message("POST", "/v2/models/echo/infer", None, Content_Length=length) + b"some")
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert "body" in reply.error
        client.send(b"more")  # nobody reads it, and nothing breaks
        assert await client.ended() == b""
        assert bare.transport.refusals == {"body_deadline": 1}
        assert bare.transport.bytes_in_flight == 0

    async def test_an_idle_connection_is_closed_without_a_word(self, bare: House) -> None:
        await bare.start(idle_timeout_s=SOON)
        client = await bare.connect()
        assert (await client.ask("GET", "/v2")).status == 200
        assert await client.ended() == b""

    async def test_a_long_inference_is_no_idle_connection(self, bare: House) -> None:
        await bare.start(idle_timeout_s=SOON, header_timeout_s=SOON, body_timeout_s=SOON, write_timeout_s=SOON)
        bare.service.hold()
        client = await bare.connect()
        client.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: bare.service.waiting)
        bystander = await bare.connect()
        assert (await bystander.ask("GET", "/v2")).status == 200
        assert await bystander.ended() == b""  # so the deadlines have been looked at meanwhile
        bare.service.release()
        assert (await client.reply()).status == 200

    async def test_a_client_that_does_not_read_is_dropped(self, bare: House) -> None:
        await bare.start(write_timeout_s=SOON)
        client = await bare.connect()
        client.writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body, length = infer_binary(bytes(16 * MEGABYTE))
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.request("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
        await until(lambda: bare.service.requests)
        await until(lambda: bare.transport.connections == 0)
        assert bare.transport.refusals == {"write_deadline": 1}

    async def test_a_slow_reader_that_gets_on_is_not_dropped(self, bare: House) -> None:
        await bare.start(write_timeout_s=0.2)
        client = await bare.connect()
        body, length = infer_binary(bytes(2 * MEGABYTE))
        for _ in range(6):  # together longer than the deadline; each answer is well within it
            client.request("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
        received = 0
        async with asyncio.timeout(5):
            while received < 6 * 2 * MEGABYTE:
                received += len(await client.reader.read(256 << 10))
                await asyncio.sleep(0.005)
        assert bare.transport.refusals == {}


class TestConnections:
    async def test_one_too_many_is_told_so_and_closed(self, bare: House) -> None:
        await bare.start(max_connections=2)
        first, second = await bare.connect(), await bare.connect()
        for client in (first, second):
            assert (await client.ask("GET", "/v2")).status == 200
        third = await bare.connect()
        third.request("GET", "/v2")
        reply = await third.reply()
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert "too many connections" in reply.error
        assert await third.ended() == b""
        assert bare.transport.refusals == {"connections": 1}
        first.close()
        third.close()
        await until(lambda: bare.transport.connections == 1)
        assert (await bare.ask("GET", "/v2")).status == 200

    async def test_a_flood_of_connections_is_dropped_without_a_word(self, bare: House) -> None:
        await bare.start(max_connections=1)
        keeper = await bare.connect()
        assert (await keeper.ask("GET", "/v2")).status == 200
        flood = [await bare.connect() for _ in range(EXCESS + 20)]
        await until(lambda: bare.transport.refusals.get("connections", 0) >= EXCESS + 20)
        assert bare.transport.connections <= EXCESS + 2
        assert (await keeper.ask("GET", "/v2")).status == 200
        for client in flood:
            client.close()


class TestBytes:
    @pytest.mark.parametrize("length", [1001, 1 << 40, (1 << 63) - 1])
    async def test_a_length_beyond_the_limit_is_refused_before_the_body_comes(self, bare: House, length: int) -> None:
        await bare.start(max_body_bytes=1000)
        client = await bare.connect()
        client.request("POST", "/v2/models/echo/infer", None, Content_Length=length)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        assert "1000 bytes" in reply.error
        assert bare.transport.refusals == {"body_too_large": 1}

    async def test_a_client_that_sends_everything_first_still_reads_the_refusal(self, bare: House) -> None:
        await bare.start(max_body_bytes=1000)
        client = await bare.connect()
        client.request("POST", "/v2/models/echo/infer", bytes(8 * MEGABYTE))
        await client.writer.drain()
        assert (await client.reply()).status == 413
        client.writer.write_eof()
        assert await client.ended() == b""

    async def test_a_refused_client_that_never_stops_sending_is_cut_off(
        self, bare: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connections, "LINGER_S", SOON)
        await bare.start(max_body_bytes=1000, header_timeout_s=SOON)
        client = await bare.connect()
        client.request("POST", "/v2/models/echo/infer", None, Content_Length=1 << 40)
        with pytest.raises(OSError):  # noqa: PT012 - the loop is what raises, some day
            async with asyncio.timeout(5):
                while True:
                    client.send(bytes(65536))
                    await client.writer.drain()

    async def test_a_chunked_body_is_refused_when_it_passes_the_limit(self, bare: House) -> None:
        await bare.start(max_body_bytes=100_000)
        client = await bare.connect()
        client.request("POST", "/v2/models/echo/infer", None, Transfer_Encoding="chunked")
        for _ in range(30):
            client.send(b"1000\r\n" + bytes(4096) + b"\r\n")
        assert (await client.reply()).status == 413
        assert bare.transport.bytes_in_flight == 0

    async def test_a_small_document_route_takes_no_large_body(self, house: House) -> None:
        client = await house.connect()
        client.request("POST", "/v2/repository/index", None, Transfer_Encoding="chunked")
        for _ in range(30):
            client.send(b"1000\r\n" + bytes(4096) + b"\r\n")
        assert (await client.reply()).status == 413

    async def test_tiny_chunks_are_refused_early(self, house: House) -> None:
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", None, Transfer_Encoding="chunked")
        begun = time.process_time()
        client.send(b"1\r\na\r\n" * 1_000_000)
        reply = await client.reply()
        assert reply.status == 400
        assert "chunks" in reply.error
        assert time.process_time() - begun < 1.0  # a million chunks parsed take more
        assert house.transport.refusals == {"tiny_chunks": 1}

    async def test_a_body_of_ordinary_chunks_is_no_flood(self, house: House) -> None:
        body = infer_json(id="7", pad="x" * 200_000)
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", None, Transfer_Encoding="chunked")
        for at in range(0, len(body), 64):
            client.send(b"%x\r\n%b\r\n" % (len(body[at : at + 64]), body[at : at + 64]))
        client.send(b"0\r\n\r\n")
        assert (await client.reply()).json["id"] == "7"

    @pytest.mark.parametrize("nbytes", [400_000, 100_000])
    async def test_bytes_in_flight_are_bounded_over_all_connections(self, bare: House, nbytes: int) -> None:
        await bare.start(max_bytes_in_flight=int(nbytes * 2.5))
        bare.service.hold()
        body, length = infer_binary(bytes(nbytes // 16 * 16))
        clients = [await bare.connect() for _ in range(3)]
        for number, client in enumerate(clients):
            client.request("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
            if number < 2:
                await until(lambda number=number: len(bare.service.waiting) == number + 1)
        reply = await clients[2].reply()
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        bare.service.release()
        for client in clients[:2]:
            assert (await client.reply()).status == 200
        assert bare.transport.bytes_in_flight == 0
        assert bare.transport.refusals == {"bytes_in_flight": 1}

    async def test_what_a_pipelining_client_sends_ahead_stays_in_its_socket(self, house: House) -> None:
        house.service.hold()
        body, length = infer_binary(bytes(16 * MEGABYTE))
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: house.service.waiting)
        client.request("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
        # another connection's turns of the loop; the first one's bytes have had their chance by then
        for _ in range(20):
            assert (await house.ask("GET", "/v2")).status == 200
        assert client.writer.transport.get_write_buffer_size() > 4 * MEGABYTE
        house.service.release()
        assert (await client.reply()).status == 200
        assert (await client.reply()).body.endswith(bytes(1000))


class TestDepth:
    @pytest.mark.parametrize("depth", [250_000, 1_500_000])
    async def test_deep_json_is_refused_at_once(self, house: House, depth: int) -> None:
        begun = time.process_time()
        assert (await house.infer(b"[" * depth)).status == 400
        assert (await house.infer(b'{"inputs":' * (depth // 10))).status == 400
        assert time.process_time() - begun < 1.0

    async def test_json_beyond_its_limit_is_refused(self, bare: House) -> None:
        await bare.start(max_json_bytes=1000)
        reply = await bare.infer(infer_json(id="a" * 1000))
        assert (reply.status, "1000" in reply.error) == (413, True)


MALFORMED = [
    b"\r\n\r\nnonsense\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5_0\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999999999999999\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 200 + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n",
]


class TestMalformed:
    @pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
    async def test_what_is_not_http_is_400_in_json_and_the_end(self, house: House, data: bytes) -> None:
        client = await house.connect()
        client.send(data)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (400, "close")
        assert "HTTP" in reply.error
        client.writer.write_eof()
        assert await client.ended() == b""

    @pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nabcdeX", b"1" * 20 + b"\r\n"])
    async def test_a_body_that_breaks_its_framing_later_is_400_too(self, house: House, rest: bytes) -> None:
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", None, Transfer_Encoding="chunked")
        client.send(b"3\r\nabc\r\n")
        await until(lambda: any(c.phase is connections.Phase.BODY for c in house.transport._connections))
        client.send(rest)
        assert (await client.reply()).status == 400

    async def test_nonsense_after_a_good_request_does_not_take_its_answer_away(self, house: House) -> None:
        house.service.hold()
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: house.service.waiting)
        client.send(b"nonsense\r\n\r\n")
        await until(lambda: any(c._broken for c in house.transport._connections))
        house.service.release()
        assert (await client.reply()).status == 200
        assert (await client.reply()).status == 400

    async def test_a_thousand_bad_clients_are_one_line_in_the_log(
        self, house: House, caplog: pytest.LogCaptureFixture
    ) -> None:
        begun = time.monotonic()
        for _ in range(1000 // 20):
            clients = [await house.connect() for _ in range(20)]
            for client in clients:
                client.send(b"\x00nonsense\r\n\x1b[31m forged\r\n\r\n")
            for client in clients:
                assert (await client.reply()).status == 400
                client.close()
        lines = [record for record in caplog.records if record.message == "http.malformed"]
        assert 1 <= len(lines) <= 1 + int(time.monotonic() - begun + 1)
        assert len(caplog.records) == len(lines)
        assert all("\n" not in vars(line)["fields"]["error"] for line in lines)

    async def test_a_thousand_clients_that_leave_in_the_middle_are_no_line(
        self, house: House, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(200):
            client = await house.connect()
            client.request("POST", "/v2/models/echo/infer", None, Content_Length=1000)
            client.close()
        await until(lambda: house.transport.connections == 0)
        assert caplog.records == []

    @given(data=st.binary(max_size=60), cut=st.integers(0, 200), tail=st.binary(max_size=20))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    async def test_any_bytes_leave_the_server_well(self, house: House, data: bytes, cut: int, tail: bytes) -> None:
        client = await house.connect()
        client.send(message("POST", "/v2/models/echo/infer", infer_json())[:cut] + data)
        client.send(tail)
        client.writer.write_eof()
        answer = await client.ended()
        assert answer == b"" or answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4", b"HTTP/1.1 501"))
        client.close()
        house.service.requests.clear()
        assert (await house.ask("GET", "/v2")).status == 200

    async def test_a_bug_in_the_parsing_ends_one_connection_and_no_other(
        self, house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        bystander = await house.connect()
        assert (await bystander.ask("GET", "/v2")).status == 200
        monkeypatch.setattr(house.transport.application, "check", broken())
        client = await house.connect()
        client.request("GET", "/v2")
        assert (await client.reply()).status == 500
        monkeypatch.undo()
        assert (await bystander.ask("GET", "/v2")).status == 200
        assert caplog.messages == ["http.bug"]

    async def test_a_bug_in_the_sweep_does_not_end_the_deadlines(
        self, bare: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        await bare.start(header_timeout_s=SOON)
        first = await bare.connect()
        await until(lambda: bare.transport._connections)
        (victim,) = bare.transport._connections
        monkeypatch.setattr(victim, "overdue", broken())
        assert await first.ended() == b""
        assert (await (await bare.connect()).reply()).status == 408
        assert "http.sweep_failed" in caplog.messages


def broken() -> Callable[..., int]:
    def raises(*_: object) -> int:
        raise KeyError("planted")

    return raises


async def test_errors_name_nothing_inside(house: House) -> None:
    """No path, address or process number in any answer to a bad request."""
    forbidden = ("/dev/", "/proc", "0x", "/work", "/home", "/tmp", "Traceback", ".py")
    client: Client = await house.connect()
    for fields in (
        {"id": 1},
        {"inputs": 3},
        {"inputs": [{"name": "x" * 2000}]},
        {"outputs": [{}]},
        {"parameters": [1]},
    ):
        reply = await client.ask("POST", "/v2/models/echo/infer", infer_json(**fields))
        assert reply.status == 400
        assert not any(word in json.dumps(reply.json) for word in forbidden)
