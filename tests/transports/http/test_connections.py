"""The life of a connection: kept alive, pipelined, upgraded, on a unix socket, drained."""

from __future__ import annotations

import asyncio
import socket
import stat
from pathlib import Path

import pytest
import uvloop
from aiohttp import http_parser

from appliance.config import HttpConfig
from appliance.transports.http import HttpTransport
from tests.fakes.service import FakeService
from tests.transports.http.conftest import FOUR_FLOATS, House, infer_binary, infer_json, message, until


async def test_these_tests_run_on_the_loop_of_the_daemon() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


MEGABYTE = 1 << 20


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class TestKeepAlive:
    async def test_a_connection_serves_one_request_after_another(self, house: House) -> None:
        client = await house.connect()
        for _ in range(5):
            assert (await client.ask("GET", "/v2")).status == 200
            assert (await client.ask("POST", "/v2/models/echo/infer", infer_json())).status == 200
            assert (await client.ask("POST", "/v2/models/nope/infer", infer_json())).status == 404

    async def test_who_asks_for_the_end_gets_it(self, house: House) -> None:
        client = await house.connect()
        reply = await client.ask("GET", "/v2", Connection="close")
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.ended() == b""

    @pytest.mark.parametrize(("line", "kept"), [(b"", False), (b"Connection: keep-alive\r\n", True)])
    async def test_http_1_0_is_kept_alive_only_on_request(self, house: House, line: bytes, kept: bool) -> None:
        client = await house.connect()
        client.send(b"GET /v2 HTTP/1.0\r\n" + line + b"\r\n")
        assert (await client.reply()).headers["connection"] == ("keep-alive" if kept else "close")
        if kept:
            assert (await client.ask("GET", "/v2")).status == 200
        else:
            assert await client.ended() == b""

    @pytest.mark.parametrize(("upgrade", "kept"), [("h2c", True), ("websocket", False)])
    async def test_another_protocol_is_not_spoken_and_the_request_is_answered(
        self, house: House, upgrade: str, kept: bool
    ) -> None:
        client = await house.connect()
        assert (await client.ask("GET", "/v2", None, Connection="Upgrade", Upgrade=upgrade)).status == 200
        if kept:
            assert (await client.ask("GET", "/v2")).status == 200
        else:
            assert await client.ended() == b""


class TestPipelining:
    async def test_answers_come_in_the_order_of_the_requests(self, house: House) -> None:
        client = await house.connect()
        client.send(b"".join(message("POST", "/v2/models/echo/infer", infer_json(id=str(n))) for n in range(200)))
        assert [(await client.reply()).json["id"] for _ in range(200)] == [str(n) for n in range(200)]

    async def test_a_request_waits_for_the_one_before_it(self, house: House) -> None:
        house.service.hold()
        client = await house.connect()
        client.send(message("POST", "/v2/models/echo/infer", infer_json(id="1")) + message("GET", "/v2"))
        await until(lambda: house.service.waiting)
        assert len(house.service.requests) == 1
        house.service.release()
        assert (await client.reply()).json["id"] == "1"
        assert (await client.reply()).json["name"] == "appliance"

    async def test_a_client_that_sends_and_does_not_read_stops_being_served(self, house: House) -> None:
        client = await house.connect()
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        body, length = infer_binary(bytes(128 << 10))
        for _ in range(400):
            client.request("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
        await until(lambda: any(connection.writing_paused for connection in house.transport._connections))
        for _ in range(20):  # turns of the loop in which a server that goes on reading would have read on
            assert (await house.ask("GET", "/v2")).status == 200
        assert len(house.service.requests) < 400
        assert max(len(connection._messages) for connection in house.transport._connections) <= 8
        assert client.writer.transport.get_write_buffer_size() > MEGABYTE
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(400):
            assert (await client.reply()).body.endswith(bytes(1000))


class TestUnixSocket:
    async def test_it_serves_and_is_for_the_group(self, house: House) -> None:
        client = await house.connect_unix()
        assert (await client.ask("GET", "/v2")).status == 200
        body, length = infer_binary()
        reply = await client.ask("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
        assert reply.body.endswith(FOUR_FLOATS)
        mode = (house.folder / "http.sock").stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o660)
        assert house.transport.addresses[1] == f"unix:{house.folder}/http.sock"

    async def test_it_is_gone_at_the_end(self, house: House) -> None:
        await house.transport.close()
        assert not (house.folder / "http.sock").exists()

    async def test_a_stale_one_is_replaced(self, bare: House) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(bare.folder / "http.sock"))
        await bare.start()
        assert (await (await bare.connect_unix()).ask("GET", "/v2")).status == 200

    async def test_a_living_one_is_not_stolen_and_not_removed(self, house: House) -> None:
        path = house.folder / "http.sock"
        second = HttpTransport(FakeService(), HttpConfig(port=0), unix_socket=str(path), metrics=lambda: b"")
        with pytest.raises(FileExistsError, match="another process listens"):
            await second.start()
        await second.close()
        assert (await (await house.connect_unix()).ask("GET", "/v2")).status == 200

    async def test_a_file_of_another_kind_is_not_removed(self, bare: House) -> None:
        path = bare.folder / "http.sock"
        path.write_text("precious")
        with pytest.raises(FileExistsError, match="is no socket"):
            await bare.start()
        await bare.close()
        assert path.read_text() == "precious"

    async def test_a_successors_socket_is_not_removed(self, house: House) -> None:
        path = house.folder / "http.sock"
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
            await house.transport.close()
            assert path.exists()


class TestStartAndEnd:
    async def test_given_sockets_are_listened_on_and_no_others(self, tmp_path: Path) -> None:
        tcp = socket.create_server(("127.0.0.1", 0))
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(tmp_path / "given.sock"))
        unix.listen()
        transport = HttpTransport(
            FakeService(), HttpConfig(), unix_socket=None, metrics=lambda: b"", sockets=[tcp, unix]
        )
        await transport.start()
        assert transport.addresses == [f"http://127.0.0.1:{tcp.getsockname()[1]}", f"unix:{tmp_path}/given.sock"]
        for reader, writer in (
            await asyncio.open_connection(*tcp.getsockname()),
            await asyncio.open_unix_connection(tmp_path / "given.sock"),
        ):
            writer.write(message("GET", "/v2", None, Connection="close"))
            assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
            writer.close()
        await transport.close()
        assert (tmp_path / "given.sock").exists()

    async def test_an_address_in_use_is_an_error_and_leaves_nothing(self, house: House, tmp_path: Path) -> None:
        before = descriptors()
        second = HttpTransport(FakeService(), HttpConfig(port=house.port), unix_socket=None, metrics=lambda: b"")
        with pytest.raises(OSError, match="in use"):
            await second.start()
        await second.close()
        await asyncio.sleep(0)
        assert descriptors() == before

    async def test_the_parser_in_python_is_not_accepted(self, bare: House, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
        with pytest.raises(RuntimeError, match="C parser"):
            await bare.start()

    async def test_draining_closes_idle_connections_and_answers_open_requests(self, house: House) -> None:
        house.service.hold()
        idle, busy = await house.connect(), await house.connect()
        assert (await idle.ask("GET", "/v2")).status == 200
        busy.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: house.service.waiting)
        drained = asyncio.create_task(house.transport.drain())
        assert await idle.ended() == b""
        with pytest.raises(ConnectionRefusedError):
            await house.connect()
        assert not drained.done()
        house.service.release()
        reply = await busy.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        await asyncio.wait_for(drained, 5)

    async def test_closing_ends_what_is_still_open(self, house: House) -> None:
        house.service.hold()
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: house.service.waiting)
        await house.transport.close()
        assert await client.ended() == b""
        await until(lambda: house.service.cancelled)

    async def test_closing_without_a_start_is_nothing(self) -> None:
        transport = HttpTransport(FakeService(), HttpConfig(), unix_socket="/nonexistent/x", metrics=lambda: b"")
        await transport.close()
