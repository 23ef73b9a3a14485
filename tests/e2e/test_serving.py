"""A real model and the loopback engine, asked over real sockets."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.http
import tritonclient.http.aio

from appliance.cli.connection import Appliance
from appliance.cli.output import CommandError
from appliance.client import Client
from appliance.core.errors import ApplianceError, ErrorCode
from tests.e2e.house import ROOT, House

GOLDEN = np.load(ROOT / "models" / "digits" / "golden" / "batch_32.npz")


def strings(*items: str) -> np.ndarray[Any, Any]:
    return np.array([[item.encode()] for item in items], dtype=object)


@pytest.mark.parametrize("which", ["ipc", "tcp"])
def test_zeromq_gives_the_golden_answers(served: House, which: str) -> None:
    endpoint = served.ipc if which == "ipc" else next(a for a in served.addresses if a.startswith("tcp://"))
    with Client(endpoint) as client:
        result = client.infer("digits", {"image": GOLDEN["image"]})
    np.testing.assert_allclose(result.outputs["scores"], GOLDEN["scores"], atol=1e-5)
    assert (result.model, result.version) == ("digits", "1")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_triton_s_client_gets_the_golden_answers(served: House, binary: bool, encoding: str | None) -> None:
    client = tritonclient.http.InferenceServerClient(served.http.removeprefix("http://"))
    tensor = tritonclient.http.InferInput("image", [32, 28, 28, 1], "FP32")
    tensor.set_data_from_numpy(GOLDEN["image"], binary_data=binary)
    wanted = [tritonclient.http.InferRequestedOutput("scores", binary_data=binary)]
    result = client.infer(
        "digits",
        [tensor],
        outputs=wanted,
        request_id="seven",
        priority=1,
        timeout=20_000_000,
        request_compression_algorithm=encoding,
        response_compression_algorithm=encoding,
    )
    np.testing.assert_allclose(result.as_numpy("scores"), GOLDEN["scores"], atol=1e-5)
    assert result.get_response()["id"] == "seven"
    client.close()


def test_triton_s_client_classifies(served: House) -> None:
    client = tritonclient.http.InferenceServerClient(served.http.removeprefix("http://"))
    tensor = tritonclient.http.InferInput("image", [32, 28, 28, 1], "FP32")
    tensor.set_data_from_numpy(GOLDEN["image"])
    result = client.infer("digits", [tensor], outputs=[tritonclient.http.InferRequestedOutput("scores", class_count=1)])
    found = [text.decode().split(":")[1] for text in result.as_numpy("scores").reshape(-1)]
    assert found == [str(scores.argmax()) for scores in GOLDEN["scores"]]
    client.close()


def test_triton_s_client_reads_every_document(served: House) -> None:
    client = tritonclient.http.InferenceServerClient(served.http.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits", "1")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("digits")["inputs"] == [
        {"name": "image", "datatype": "FP32", "shape": [-1, 28, 28, 1]}
    ]
    config = client.get_model_config("digits")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (32, [28, 28, 1])
    assert client.get_inference_statistics("digits")["model_stats"][0]["name"] == "digits"
    assert {entry["name"] for entry in client.get_model_repository_index()} == {
        "digits",
        "echo",
        "frames",
        "text",
        "whip",
    }
    assert client.get_system_shared_memory_status() == []
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    client.close()


def test_triton_s_client_loads_and_unloads(served: House) -> None:
    client = tritonclient.http.InferenceServerClient(served.http.removeprefix("http://"))
    client.unload_model("text")
    assert not client.is_model_ready("text")
    client.load_model("text")
    assert client.is_model_ready("text")
    with pytest.raises(tritonclient.utils.InferenceServerException, match="failed to load 'nobody'"):
        client.load_model("nobody")
    with pytest.raises(tritonclient.utils.InferenceServerException, match="Request for unknown model"):
        client.get_model_metadata("nobody")
    client.close()


async def test_triton_s_asynchronous_client_gets_the_golden_answers(served: House) -> None:
    async with tritonclient.http.aio.InferenceServerClient(served.http.removeprefix("http://")) as client:
        assert await client.is_server_ready()
        tensor = tritonclient.http.InferInput("image", [32, 28, 28, 1], "FP32")
        tensor.set_data_from_numpy(GOLDEN["image"])
        results = await asyncio.gather(*(client.infer("digits", [tensor]) for _ in range(4)))
    for result in results:
        np.testing.assert_allclose(result.as_numpy("scores"), GOLDEN["scores"], atol=1e-5)


def test_strings_come_back_as_they_went(served: House) -> None:
    words = np.array([[b"", "Grüße".encode()], [b"\xff\x00", b"x" * 1000]], dtype=object)
    with Client(served.ipc) as client:
        assert client.infer("text", {"data": words}).outputs["data"].tolist() == words.tolist()


def test_outputs_of_a_size_nobody_knew_come_back_even_if_they_do_not_fit_the_arena(served: House) -> None:
    row = np.arange(1000, dtype=np.float32)[np.newaxis]
    with Client(served.ipc, timeout_s=30) as client:
        for times in (3, 2000):
            found = client.infer("whip", {"data": row, "command": strings(f"grow {times}")}).outputs["data"]
            assert found.shape == (times, 1000)
            np.testing.assert_array_equal(found[-1], row[0])


def test_inputs_that_do_not_fit_the_arena_are_passed_all_the_same(served: House) -> None:
    row = np.arange(1_000_000, dtype=np.float32)[np.newaxis]
    with Client(served.ipc, timeout_s=30) as client:
        found = client.infer("whip", {"data": row, "command": strings("")}).outputs["data"]
    np.testing.assert_array_equal(found, row)


@pytest.mark.parametrize("transport", ["zmq", "http"])
def test_answered_frames_leave_nothing_for_the_garbage_collector(served: House, transport: str) -> None:
    """A circle of references would keep each frame until a collection comes by, which is thousands of requests away."""
    frame = np.zeros((1, 300_000), np.float32)
    front = psutil.Process(served.pid)
    client: Any = Client(served.ipc)
    given: Any = {"data": frame}
    if transport == "http":
        client.close()
        client = tritonclient.http.InferenceServerClient(served.http.removeprefix("http://"))
        given = [tritonclient.http.InferInput("data", [1, 300_000], "FP32").set_data_from_numpy(frame)]

    def ask(times: int) -> None:
        for _ in range(times):
            client.infer("frames", given)

    ask(20)
    before = front.memory_info().rss
    ask(100)
    grown = front.memory_info().rss - before
    client.close()
    assert grown < 40 << 20, f"the front grew by {grown / 1e6:.0f} MB while 100 frames of 1.2 MB were answered"


def test_an_engine_s_refusal_is_the_answer_and_the_worker_lives(served: House) -> None:
    before = served.worker_pids("whip")
    with Client(served.ipc) as client:
        with pytest.raises(ApplianceError, match="told to fail") as caught:
            client.infer("whip", {"data": np.zeros((1, 1), np.float32), "command": strings("fail")})
        assert caught.value.code is ErrorCode.ENGINE_FAULT
    assert served.worker_pids("whip") == before


def test_a_deadline_is_answered_while_the_engine_still_runs(served: House) -> None:
    with Client(served.ipc) as client, pytest.raises(ApplianceError) as caught:
        client.infer("whip", {"data": np.zeros((1, 1), np.float32), "command": strings("delay 300")}, ttl_ms=50)
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "parse"),
        (b"{", 400, "parse"),
        (b"[" * 100_000, 400, "nests"),
        (b'{"inputs":[]}', 400, "'image' is missing"),
        (b'{"inputs":[{"name":"image","shape":[1,28,28],"datatype":"FP32","data":[]}]}', 400, "holds 784"),
        (b'{"inputs":[{"name":"image","shape":[-1],"datatype":"FP32","data":[1]}]}', 400, "shape"),
        (b'{"inputs":[{"name":"image","shape":[16,1152921504606846978],"datatype":"FP32","data":[1]}]}', 400, ""),
        (b'{"inputs":[{"name":"nobody","shape":[1],"datatype":"FP32","data":[1]}]}', 400, "unknown input"),
        (b'{"inputs":[{"name":"image","shape":[1],"datatype":"FP31","data":[1]}]}', 400, "FP31"),
        (b'{"inputs":[{"name":"image","shape":[1],"datatype":"FP16","data":[1]}]}', 400, "binary"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(served: House, body: bytes, status: int, words: str) -> None:
    with pytest.raises(CommandError) as caught:
        Appliance(served.http).request("POST", "/v2/models/digits/infer", body)
    assert caught.value.name == f"HTTP_{status}"
    assert words in caught.value.message


def test_a_missing_batch_axis_is_named(served: House) -> None:
    document = {"inputs": [{"name": "image", "shape": [28, 28, 1], "datatype": "FP32", "data": [0] * 784}]}
    with pytest.raises(CommandError, match=r"the batch axis is missing: send \[1, 28, 28, 1\]"):
        Appliance(served.http).post("/v2/models/digits/infer", document)


def test_metrics_have_triton_s_names_and_plain_numbers(served: House) -> None:
    text = Appliance(served.http).request("GET", "/metrics")[1].decode()
    assert 'nv_inference_request_success{model="digits",version="1"} ' in text
    assert "# TYPE nv_inference_count counter" in text
    assert "e+" not in text


def test_nothing_listens_beyond_loopback_and_the_front_holds_no_engine(served: House) -> None:
    front = psutil.Process(served.pid)
    listening = [c.laddr.ip for c in front.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) == {"127.0.0.1"}
    maps = Path(f"/proc/{served.pid}/maps").read_text()
    assert "onnxruntime" not in maps


def test_the_arena_is_sealed_and_has_no_name(served: House) -> None:
    links = [str(entry.readlink()) for entry in Path(f"/proc/{served.pid}/map_files").iterdir()]
    assert any(link.startswith("/memfd:arena") for link in links)
    assert not list(Path("/dev/shm").glob("*appliance*"))


def cli(served: House, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance", *arguments, "--url", served.http],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_line_recognizes_a_digit(served: House) -> None:
    picture = ROOT / "models" / "digits" / "samples" / "3.png"
    done = cli(served, "infer", "digits", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)[0]["outputs"][0]["data"][0]
    assert best.endswith(":3:3")
    table = cli(served, "infer", "digits", str(picture)).stdout
    assert "LABEL" in table


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("ps",),
        ("models", "list"),
        ("models", "show", "digits"),
        ("bench", "echo", "--seconds", "0.2", "--concurrency", "2"),
    ],
)
def test_every_command_speaks_json_and_tables(served: House, arguments: tuple[str, ...]) -> None:
    plain = cli(served, *arguments)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip()
    assert json.loads(cli(served, *arguments, "--json").stdout)


def test_an_unknown_model_and_a_missing_appliance_have_their_exit_codes(served: House) -> None:
    done = cli(served, "models", "show", "nobody", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"]["code"] == "NOT_READY"
    nobody = subprocess.run(
        [sys.executable, "-m", "appliance", "status", "--url", "http://127.0.0.1:9"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert nobody.returncode == 3
    assert "appliance serve" in nobody.stderr


def test_events_can_be_followed_from_the_command_line(served: House) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "appliance", "events", "--follow", "--limit", "1", "--json", "--url", served.http],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        appliance = Appliance(served.http)
        while process.poll() is None:
            # until the follower is there, events pass it by; each unload and load makes some
            appliance.post("/v2/repository/models/text/unload")
            appliance.post("/v2/repository/models/text/load")
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["kind"].startswith(("model.", "operator."))
