"""kserve's InferenceRESTClient against a server: `kserve_rest.py URL MODEL`, run in kserve's own environment."""

import asyncio
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def request(model: str, spec: dict, outputs: list, binary: bool) -> tuple:
    shape = [1 if size < 0 else size for size in spec["shape"]]
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 100
    tensor = InferInput(spec["name"], shape, spec["datatype"])
    tensor.set_data_from_numpy(array, binary_data=binary)
    wanted = [RequestedOutput(output["name"], {"binary_data": binary}) for output in outputs]
    return array, InferRequest(model, [tensor], request_id="42", request_outputs=wanted)


async def main(url: str, model: str) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=20))
    assert await client.is_server_live(url) is True
    assert await client.is_server_ready(url) is True
    assert await client.is_model_ready(url, model) is True
    assert await client.is_model_ready(url, "nope") is False
    async with httpx.AsyncClient() as plain:
        metadata = (await plain.get(f"{url}/v2/models/{model}")).json()
    answers = []
    for binary in (False, True):
        sent, body = request(model, metadata["inputs"][0], metadata["outputs"], binary)
        answer = await client.infer(url, body, model_name=model)
        assert (answer.id, answer.model_name) == ("42", model), answer
        array = answer.outputs[0].as_numpy()
        assert array.dtype == np.float32, array.dtype
        assert list(array.shape) == answer.outputs[0].shape
        if model == "echo":
            assert np.array_equal(array, sent)
        answers.append(array)
    assert np.array_equal(*answers), "JSON and binary differ"
    try:
        await client.infer(url, body, model_name="nope")
    except httpx.HTTPStatusError as error:
        assert str(error).startswith("Request for unknown model"), error
        assert error.response.status_code == 404
    else:
        raise AssertionError("an unknown model answered")
    await client.close()
    sys.stdout.write(f"{model}: all good\n")


asyncio.run(main(*sys.argv[1:]))
