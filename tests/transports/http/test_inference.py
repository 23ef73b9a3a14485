"""Inference through a real socket: JSON, binary, raw, large, compressed; and a client that leaves."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import zlib
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.tensor import DataType
from appliance.transports.http import compression
from tests.transports.http.conftest import FOUR_FLOATS, House, X, bomb, infer_binary, infer_json, message, until

MEGABYTE = 1 << 20


class TestBodies:
    async def test_json_in_json_out(self, house: House) -> None:
        reply = await house.infer(infer_json(id="42"))
        assert reply.headers["content-type"] == "application/json"
        assert reply.json == {
            "model_name": "echo",
            "model_version": "1",
            "id": "42",
            "outputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}],
        }

    async def test_binary_in_binary_out(self, house: House) -> None:
        reply = await house.infer(*infer_binary())
        length = int(reply.headers["inference-header-content-length"])
        assert reply.headers["content-type"] == "application/octet-stream"
        assert reply.body[length:] == FOUR_FLOATS
        assert json.loads(reply.body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 16}

    async def test_a_raw_body_is_one_input_and_is_answered_in_binary(self, house: House) -> None:
        reply = await house.infer(FOUR_FLOATS, 0)
        assert reply.body.endswith(FOUR_FLOATS)
        assert house.service.requests[0].inputs[0].shape == (1, 4)

    async def test_the_content_type_decides_nothing(self, house: House) -> None:
        reply = await house.infer(*infer_binary(), Content_Type="application/json")
        assert reply.body.endswith(FOUR_FLOATS)

    async def test_the_version_in_the_path_is_asked_for(self, house: House) -> None:
        reply = await house.ask("POST", "/v2/models/echo/versions/1/infer?x=y", infer_json())
        assert (reply.status, house.service.requests[0].version) == (200, "1")

    @pytest.mark.parametrize("value", ["x", "-1", "1.0", "+5", "9" * 20, "0x10", "", "\u0663"])
    async def test_a_header_length_that_is_no_number_is_refused(self, house: House, value: str) -> None:
        reply = await house.infer(infer_json(), Inference_Header_Content_Length=value)
        assert reply.status == 400
        assert "Inference-Header-Content-Length" in reply.error

    async def test_an_answer_that_json_cannot_hold_is_the_clients_fault(self, house: House) -> None:
        x = X | {"datatype": "FP16", "parameters": {"binary_data_size": 8}}
        text = json.dumps({"inputs": [x]}).encode()
        reply = await house.infer(text + bytes(8), len(text))
        assert reply.status == 400
        assert "Please use the binary data format" in reply.error

    @pytest.mark.parametrize("datatype", list(DataType), ids=lambda datatype: datatype.value)
    async def test_every_datatype_passes_in_binary(self, house: House, datatype: DataType) -> None:
        data = bytes(range(datatype.itemsize * 2)) if datatype.itemsize else b"\1\0\0\0a\0\0\0\0"
        x = {"name": "x", "datatype": datatype.value, "shape": [2], "parameters": {"binary_data_size": len(data)}}
        text = json.dumps({"inputs": [x], "outputs": [{"name": "x", "parameters": {"binary_data": True}}]}).encode()
        assert (await house.infer(text + data, len(text))).body.endswith(data)

    @pytest.mark.parametrize("nbytes", [16 << 10, 128 << 10, 1_228_800, 20_000_000])
    async def test_bodies_of_every_size_come_back_whole(self, house: House, nbytes: int) -> None:
        data = os.urandom(nbytes)
        client = await house.connect()
        for _ in range(3):  # the connection goes on after each
            body, length = infer_binary(data)
            reply = await client.ask("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
            assert reply.body.endswith(data)

    async def test_a_large_body_in_uneven_pieces_and_then_another_request(self, house: House) -> None:
        data = os.urandom(600_000)
        body, length = infer_binary(data)
        whole = message("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
        client = await house.connect()
        stream = whole + message("GET", "/v2") + whole
        for start, end in zip([0, 30, 250, 300_000, 600_300], [30, 250, 300_000, 600_300, None], strict=True):
            client.send(stream[start:end])
            await client.writer.drain()
            await asyncio.sleep(0)
        assert (await client.reply()).body.endswith(data)
        assert (await client.reply()).json["name"] == "appliance"
        assert (await client.reply()).body.endswith(data)

    async def test_a_chunked_body_is_put_together(self, house: House) -> None:
        body, length = infer_binary(os.urandom(1600))
        head = (
            f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
            f"Inference-Header-Content-Length: {length}\r\n\r\n"
        )
        chunks = b"".join(
            b"%x\r\n%b\r\n" % (len(body[at : at + 100]), body[at : at + 100]) for at in range(0, len(body), 100)
        )
        client = await house.connect()
        client.send(head.encode() + chunks + b"0\r\n\r\n" + message("GET", "/v2"))
        assert (await client.reply()).body.endswith(body[length:])
        assert (await client.reply()).status == 200

    async def test_who_expects_to_be_asked_is_asked(self, house: House) -> None:
        client = await house.connect()
        body = infer_json()
        whole = message("POST", "/v2/models/echo/infer", body, Expect="100-continue")
        client.send(whole[: -len(body)])
        assert (await client.reply()).status == 100
        client.send(body)
        assert (await client.reply()).status == 200

    async def test_who_expects_to_be_asked_and_is_not_wanted_is_told_before_sending(self, house: House) -> None:
        client = await house.connect()
        client.request("POST", "/v2/nope", None, Expect="100-continue", Content_Length=1000)
        assert (await client.reply()).status == 404


class TestLeaving:
    async def test_a_client_that_hangs_up_cancels_its_request(self, house: House) -> None:
        house.service.hold()
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: house.service.waiting)
        client.close()
        await until(lambda: house.service.cancelled)
        assert house.transport.connections == 0
        assert house.transport.bytes_in_flight == 0

    async def test_a_client_that_hangs_up_disturbs_nobody_else(self, house: House) -> None:
        house.service.hold()
        leaver, stayer = await house.connect(), await house.connect()
        for client in (leaver, stayer):
            client.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: len(house.service.waiting) == 2)
        leaver.close()
        await until(lambda: house.service.cancelled)
        house.service.release()
        assert (await stayer.reply()).status == 200

    async def test_an_answer_that_comes_after_all_is_dropped(self, house: House) -> None:
        house.service.hold()
        client = await house.connect()
        client.request("POST", "/v2/models/echo/infer", infer_json())
        await until(lambda: house.service.waiting)
        (ticket,) = house.service.waiting
        client.close()
        await until(lambda: house.service.cancelled)
        ticket.done(ApplianceError(ErrorCode.INTERNAL, "late"))
        assert (await house.ask("GET", "/v2")).status == 200

    async def test_a_load_goes_on_when_its_client_leaves(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def slow(_: str) -> None:
            begun.set()
            await go.wait()
            ended.set()

        monkeypatch.setattr(house.service, "load", slow)
        client = await house.connect()
        client.request("POST", "/v2/repository/models/echo/load", b"")
        await begun.wait()
        client.close()
        await until(lambda: house.transport.connections == 0)
        go.set()
        async with asyncio.timeout(5):
            await ended.wait()


ENCODERS = {"gzip": gzip.compress, "deflate": zlib.compress, "GZIP": gzip.compress, "x-gzip": gzip.compress}
DECODERS: dict[str, Any] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


class TestCompressedRequests:
    @pytest.mark.parametrize("encoding", list(ENCODERS))
    @pytest.mark.parametrize("nbytes", [16, 4 * MEGABYTE])
    async def test_the_header_length_counts_inflated_bytes(self, house: House, encoding: str, nbytes: int) -> None:
        body, length = infer_binary(np.arange(nbytes // 4, dtype="<f4").tobytes())
        reply = await house.infer(ENCODERS[encoding](body), length, Content_Encoding=encoding)
        assert reply.body.endswith(body[length:])
        assert house.transport.bytes_in_flight == 0

    async def test_identity_is_no_compression(self, house: House) -> None:
        assert (await house.infer(infer_json(), Content_Encoding="identity")).status == 200

    @pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "aes128gcm", "x" * 4000])
    async def test_another_encoding_is_501_and_says_what_is_accepted(self, house: House, encoding: str) -> None:
        reply = await house.infer(infer_json(), Content_Encoding=encoding)
        assert (reply.status, reply.headers["accept-encoding"]) == (501, "gzip, deflate")
        assert len(reply.error) < 200

    @pytest.mark.parametrize("encoding", ["gzip", "deflate"])
    async def test_a_bomb_is_refused_and_nobody_waits_for_it(self, bare: House, encoding: str) -> None:
        await bare.start(max_body_bytes=4 * MEGABYTE, max_json_bytes=MEGABYTE)
        body = ENCODERS[encoding](bytes(64 * MEGABYTE))
        for header_length in (None, 100):
            reply = await bare.infer(body, header_length, Content_Encoding=encoding)
            assert reply.status == 413
            assert "inflated" in reply.error
        small = await bare.ask("POST", "/v2/repository/index", bomb(MEGABYTE), Content_Encoding="gzip")
        assert small.status == 413

    async def test_inflating_makes_room_for_others_and_counts_as_bytes_in_flight(self, bare: House) -> None:
        await bare.start(max_body_bytes=64 * MEGABYTE, max_bytes_in_flight=8 * MEGABYTE)
        reply = await bare.infer(bomb(32 * MEGABYTE), 100, Content_Encoding="gzip")
        assert reply.status == 429
        assert bare.transport.bytes_in_flight == 0

    async def test_a_client_that_leaves_ends_the_inflating(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = 0
        inflation_step = compression.Inflation.step

        def step(self: compression.Inflation) -> bool:
            nonlocal steps
            steps += 1
            if steps == 2:
                client.close()
            inflation_step(self)
            return False

        monkeypatch.setattr(compression.Inflation, "step", step)
        client = await house.connect()
        client.request(
            *("POST", "/v2/models/echo/infer", bomb(20 * MEGABYTE)),
            Content_Encoding="gzip",
            Inference_Header_Content_Length=5,
        )
        await until(lambda: steps and house.transport.connections == 0)
        assert house.service.requests == []

    @pytest.mark.parametrize("encoding", ["gzip", "deflate"])
    async def test_a_stream_that_is_cut_or_goes_on_or_is_none_is_refused(self, house: House, encoding: str) -> None:
        whole = ENCODERS[encoding](infer_json())
        client = await house.connect()
        for body in [*(whole[:end] for end in range(len(whole))), whole + b"\0", whole + whole, infer_json()]:
            reply = await client.ask("POST", "/v2/models/echo/infer", body, Content_Encoding=encoding)
            assert reply.status == 400
            assert "not one whole" in reply.error


class TestCompressedAnswers:
    @pytest.mark.parametrize(
        ("accept", "encoding"),
        [
            ("gzip", "gzip"),
            ("deflate", "deflate"),
            ("gzip;q=0.5, deflate;q=0.8", "deflate"),
            ("gzip, deflate, br", "gzip"),
            ("br", None),
            ("identity, gzip;q=0.9", None),
            ("gzip;q=0", None),
            ("*", None),
            ("gzip;q=x", None),
            (", ;;,", None),
        ],
    )
    async def test_a_document_is_compressed_as_the_client_prefers(
        self, house: House, accept: str, encoding: str | None
    ) -> None:
        body = json.dumps({"inputs": [{"name": "x", "datatype": "INT8", "shape": [2000], "data": [1] * 2000}]}).encode()
        reply = await house.infer(body, Accept_Encoding=accept)
        assert reply.headers.get("content-encoding") == encoding
        text = DECODERS[encoding](reply.body) if encoding else reply.body
        assert json.loads(text)["outputs"][0]["data"] == [1] * 2000

    async def test_a_small_answer_is_sent_as_it_is(self, house: House) -> None:
        assert "content-encoding" not in (await house.infer(infer_json(), Accept_Encoding="gzip")).headers

    @pytest.mark.parametrize("encoding", ["gzip", "deflate"])
    @pytest.mark.parametrize("nbytes", [16_000, 3 * MEGABYTE])
    async def test_tensors_are_compressed_for_who_names_one_coding(
        self, house: House, encoding: str, nbytes: int
    ) -> None:
        body, header_length = infer_binary(bytes(nbytes))
        reply = await house.infer(body, header_length, Accept_Encoding=encoding)
        assert reply.headers["content-encoding"] == encoding
        plain = DECODERS[encoding](reply.body)
        length = int(reply.headers["inference-header-content-length"])
        assert plain[length:] == bytes(nbytes)

    async def test_tensors_are_not_compressed_for_a_librarys_usual_list(self, house: House) -> None:
        reply = await house.infer(*infer_binary(bytes(16_000)), Accept_Encoding="gzip, deflate, br")
        assert "content-encoding" not in reply.headers
