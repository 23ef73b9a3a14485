"""One suite over both transports: the same request has the same outcome, whichever way it came."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from appliance.cli.connection import Appliance
from appliance.cli.output import CommandError
from appliance.core.errors import ErrorCode
from appliance.protocols.status import HTTP_STATUS
from tests.e2e.house import House

Ask = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""Model and request to HTTP status (or what the table makes of the code) and the first output's data, or the message."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("contract"))
    made.loopback("echo", shape="2")
    made.loopback("whip", "[worker]\nrun_budget_ms = 10000\n", shape="2", commands="true")
    made.loopback("tiny", "[batching]\nmax_queue_size = 1\n", shape="2", delay_ms="1")
    made.loopback("broken", load="fail")
    made.start()
    yield made
    made.finish()


@pytest.fixture(params=["http", "zmq"])
def ask(request: pytest.FixtureRequest, house: House) -> Ask:
    return over_http(house) if request.param == "http" else over_zmq(house)


def over_http(house: House) -> Ask:
    def ask(model: str, document: dict[str, Any]) -> tuple[int, Any]:
        ttl = document.pop("ttl_ms", None)
        version = document.pop("version", "")
        parameters = {"timeout": ttl * 1000} if ttl else {}
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        try:
            data = Appliance(house.http).request(
                "POST", path, json.dumps(document | {"parameters": parameters}).encode()
            )[1]
        except CommandError as error:
            status = {"NOT_READY": 0}.get(error.name)
            return (int(error.name[5:]) if status is None else -1), error.message
        return 200, json.loads(data)["outputs"][0]["data"]

    return ask


def over_zmq(house: House) -> Ask:
    import struct

    def ask(model: str, document: dict[str, Any]) -> tuple[int, Any]:
        frames: list[bytes] = []
        for tensor in document["inputs"]:
            values = tensor.pop("data")
            if tensor["datatype"] == "BYTES":
                frames.append(b"".join(struct.pack("<I", len(text)) + text.encode() for text in values))
            else:
                frames.append(struct.pack(f"<{len(values)}f", *values))
        header = {"op": "infer", "id": "1", "model": model, **document}
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(house.ipc)
            socket.send_multipart([b"AIP1", json.dumps(header).encode(), *frames])
            assert socket.poll(30_000)
            reply = socket.recv_multipart()
        answer = json.loads(reply[1])
        if answer["ok"]:
            return 200, list(struct.unpack(f"<{len(reply[2]) // 4}f", reply[2]))
        code = ErrorCode(answer["code"])
        return (-1 if HTTP_STATUS[code] in (404, 503) else HTTP_STATUS[code]), answer["message"]

    return ask


def data(*values: float, name: str = "data", shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": shape or [1, 2], "data": list(values)}


def command(text: str) -> dict[str, Any]:
    return {"name": "command", "datatype": "BYTES", "shape": [1, 1], "data": [text]}


def test_a_good_request_is_answered(ask: Ask) -> None:
    assert ask("echo", {"inputs": [data(1, 2)]}) == (200, [1, 2])


@pytest.mark.parametrize(
    ("model", "document", "status", "words"),
    [
        ("nobody", {"inputs": [data(1, 2)]}, -1, "unknown model"),
        ("echo", {"inputs": [data(1, 2)], "version": "7"}, -1, "version 7"),
        ("broken", {"inputs": [data(1, 2)]}, -1, "told to fail at load"),
        ("echo", {"inputs": [data(1, 2, name="other")]}, 400, "unknown input 'other'"),
        ("echo", {"inputs": [data(1, 2, shape=[2])]}, 400, "batch axis is missing"),
        ("echo", {"inputs": [data(*range(40), shape=[20, 2]), data(1, 2)]}, 400, "twice"),
        ("echo", {"inputs": []}, 400, "inputs"),
        ("echo", {"inputs": [data(1, 2)], "outputs": [{"name": "nothing"}]}, 400, "unknown output 'nothing'"),
        ("echo", {"inputs": [data(*range(200), shape=[100, 2])]}, 400, "1 to 32 rows"),
        ("whip", {"inputs": [data(1, 2), command("fail")]}, 500, "told to fail"),
        ("whip", {"inputs": [data(1, 2), command("crash")]}, 500, "died"),
        ("whip", {"inputs": [data(1, 2), command("delay 400")], "ttl_ms": 60}, 504, "deadline"),
    ],
)
def test_a_bad_one_has_the_same_code_and_words_everywhere(
    ask: Ask, model: str, document: dict[str, Any], status: int, words: str
) -> None:
    found, message = ask(model, json.loads(json.dumps(document)))
    assert found == status, message
    assert words in message
    assert "/" not in message.replace("and/or", ""), "a path?"


def test_messages_name_no_address_and_no_file(ask: Ask, house: House) -> None:
    _, message = ask("broken", {"inputs": [data(1, 2)]})
    assert str(house.folder) not in message
    assert "0x" not in message
    assert str(Path.cwd()) not in message
