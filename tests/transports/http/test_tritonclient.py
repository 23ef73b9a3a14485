"""tritonclient, as it comes from its package, sync and asyncio, against a server in a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as sync_client
import tritonclient.http.aio as aio_client
from tritonclient.utils import InferenceServerException

from tests.transports.http.server_process import FakeServer

COMPRESSIONS = [None, "gzip", "deflate"]
ROWS = np.arange(4000, dtype=np.float32).reshape(-1, 4)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[sync_client.InferenceServerClient]:
    client = sync_client.InferenceServerClient(server.address)
    yield client
    client.close()


@pytest.fixture
async def aio(server: FakeServer) -> AsyncIterator[aio_client.InferenceServerClient]:
    async with aio_client.InferenceServerClient(server.address) as client:
        yield client


def the_input(array: np.ndarray = ROWS, datatype: str = "FP32", *, binary: bool = True) -> sync_client.InferInput:
    wanted = sync_client.InferInput("x", list(array.shape), datatype)
    wanted.set_data_from_numpy(array, binary_data=binary)
    return wanted


class TestSync:
    def test_health(self, client: sync_client.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("echo")
        assert client.is_model_ready("echo", "1")
        assert not client.is_model_ready("nope")

    def test_metadata_configuration_and_statistics(self, client: sync_client.InferenceServerClient) -> None:
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        assert client.get_model_metadata("echo")["inputs"][0]["shape"] == [-1, 4]
        assert client.get_model_config("echo")["input"][0]["dims"] == [4]
        assert client.get_inference_statistics("echo")["model_stats"][0]["version"] == "1"
        assert client.get_inference_statistics()["model_stats"][0]["name"] == "echo"

    def test_the_repository(self, client: sync_client.InferenceServerClient) -> None:
        client.unload_model("echo")
        assert not client.is_model_ready("echo")
        assert client.get_model_repository_index()[0]["state"] == "UNAVAILABLE"
        client.load_model("echo")
        assert client.get_model_repository_index()[0]["state"] == "READY"
        with pytest.raises(InferenceServerException, match="failed to load 'nope'"):
            client.load_model("nope")
        with pytest.raises(InferenceServerException, match="repository folder"):
            client.load_model("echo", config="{}")

    def test_shared_memory_is_absent_politely(self, client: sync_client.InferenceServerClient) -> None:
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()
        assert client.get_system_shared_memory_status() == []
        with pytest.raises(InferenceServerException, match="not offered"):
            client.register_system_shared_memory("r", "/r", 4)

    @pytest.mark.parametrize("sent", COMPRESSIONS)
    @pytest.mark.parametrize("asked", COMPRESSIONS)
    @pytest.mark.parametrize("binary", [True, False])
    def test_inference(
        self, client: sync_client.InferenceServerClient, sent: str | None, asked: str | None, binary: bool
    ) -> None:
        result = client.infer(
            "echo",
            [the_input(binary=binary)],
            outputs=[sync_client.InferRequestedOutput("x", binary_data=binary)],
            request_id="7",
            request_compression_algorithm=sent,
            response_compression_algorithm=asked,
        )
        assert np.array_equal(result.as_numpy("x"), ROWS)
        assert result.get_response()["id"] == "7"

    def test_all_outputs_come_when_none_is_named(self, client: sync_client.InferenceServerClient) -> None:
        assert np.array_equal(client.infer("echo", [the_input()]).as_numpy("x"), ROWS)

    @pytest.mark.parametrize(
        ("array", "datatype"),
        [
            (np.array([["one", "zwei \u00fc"], ["", "4"]], dtype=object), "BYTES"),
            (np.array([1.5, np.nan, np.inf], np.float32), "FP32"),
            (np.array([1.5, -2], np.float16), "FP16"),
            (np.array([1.5, -2], ml_dtypes.bfloat16), "BF16"),
            (np.array([True, False]), "BOOL"),
            (np.zeros((0, 4), np.int64), "INT64"),
        ],
    )
    def test_datatypes(self, client: sync_client.InferenceServerClient, array: np.ndarray, datatype: str) -> None:
        result = client.infer("echo", [the_input(array, datatype)])
        found = result.as_numpy("x")
        if datatype == "BYTES":
            array = np.char.encode(array.astype(str)).astype(object)
        assert result.get_output("x")["shape"] == list(array.shape)
        assert np.array_equal(found.reshape(array.shape), array, equal_nan=datatype == "FP32")

    def test_not_a_number_comes_as_json_too(self, client: sync_client.InferenceServerClient) -> None:
        outputs = [sync_client.InferRequestedOutput("x", binary_data=False)]
        array = np.array([[np.nan, np.inf, -np.inf, 1]], np.float32)
        found = client.infer("echo", [the_input(array)], outputs=outputs).as_numpy("x")
        assert np.array_equal(found, array, equal_nan=True)

    def test_json_and_binary_inputs_together(self, client: sync_client.InferenceServerClient) -> None:
        a, b = the_input(binary=False), sync_client.InferInput("y", [2], "INT32")
        b.set_data_from_numpy(np.array([1, 2], np.int32))
        result = client.infer("echo", [a, b])
        assert np.array_equal(result.as_numpy("x"), ROWS)
        assert result.as_numpy("y").tolist() == [1, 2]

    def test_priority_timeout_and_parameters(self, client: sync_client.InferenceServerClient) -> None:
        result = client.infer("echo", [the_input()], priority=2, timeout=500_000, parameters={"mine": "1", "n": 3})
        assert np.array_equal(result.as_numpy("x"), ROWS)
        with pytest.raises(InferenceServerException, match="sequences are not supported"):
            client.infer("echo", [the_input()], sequence_id=5)

    def test_errors_are_errors(self, client: sync_client.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="Request for unknown model") as caught:
            client.infer("nope", [the_input()])
        assert caught.value.status() == "404"

    def test_async_infer(self, client: sync_client.InferenceServerClient) -> None:
        waiting = [client.async_infer("echo", [the_input()], request_id=str(number)) for number in range(8)]
        assert [result.get_result().get_response()["id"] for result in waiting] == [str(n) for n in range(8)]

    def test_bodies_made_by_the_client_are_read_and_ours_are_read_by_it(self) -> None:
        body, length = sync_client.InferenceServerClient.generate_request_body([the_input()])
        assert length is not None
        assert body[length:] == ROWS.tobytes()


class TestAio:
    async def test_health_metadata_and_repository(self, aio: aio_client.InferenceServerClient) -> None:
        assert await aio.is_server_live()
        assert await aio.is_server_ready()
        assert await aio.is_model_ready("echo")
        assert (await aio.get_model_metadata("echo"))["platform"] == "loopback"
        assert (await aio.get_model_config("echo"))["max_batch_size"] == 8
        assert (await aio.get_model_repository_index())[0]["name"] == "echo"

    @pytest.mark.parametrize("algorithm", COMPRESSIONS)
    @pytest.mark.parametrize("binary", [True, False])
    async def test_inference(self, aio: aio_client.InferenceServerClient, algorithm: str | None, binary: bool) -> None:
        result = await aio.infer(
            "echo",
            [the_input(binary=binary)],
            outputs=[sync_client.InferRequestedOutput("x", binary_data=binary)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert np.array_equal(result.as_numpy("x"), ROWS)

    async def test_errors_are_errors(self, aio: aio_client.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="Request for unknown model"):
            await aio.infer("nope", [the_input()])
