"""One appliance, asked over HTTP or ZeroMQ with the same two calls: describe a model, answer arrays with arrays.

For tools that send many requests at once; the HTTP side uses threads, since the command line's connection is a blocking one.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from appliance.cli.connection import Appliance, model_path
from appliance.cli.output import CommandError, Exit
from appliance.client import AsyncClient, Description
from appliance.client.arrays import to_tensors
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.tensor import Tensor, TensorSpec, datatype_of
from appliance.protocols.tensors import to_numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]


class Asking:
    """A model at an address: http://HOST:PORT, unix:/PATH, tcp://HOST:PORT or ipc://PATH. Use it in `async with`."""

    def __init__(self, address: str, model: str, version: str, *, timeout_s: float, concurrency: int) -> None:
        self._model = model
        self._version = version
        self._timeout_s = timeout_s
        self._client: AsyncClient | None = None
        self._appliance: Appliance | None = None
        if address.startswith(("tcp://", "ipc://")):
            self._client = AsyncClient(address, timeout_s=timeout_s)
        else:
            self._appliance = Appliance(address)
        self._threads = ThreadPoolExecutor(concurrency, "asking")
        self._description: Description | None = None

    async def __aenter__(self) -> Asking:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown()
        if self._client is not None:
            await self._client.close()

    async def describe(self) -> Description:
        """Inputs, outputs and labels (over HTTP there are none). CommandError if nobody answers, or not for this model."""
        if self._client is not None:
            try:
                self._description = await self._client.describe(self._model, version=self._version)
            except ApplianceError as error:
                lost = error.code in (ErrorCode.DEADLINE_EXCEEDED, ErrorCode.UNAVAILABLE)
                raise CommandError(Exit.UNREACHABLE if lost else Exit.FAILED, str(error.code), error.message) from error
        else:
            assert self._appliance is not None
            document = self._appliance.get(model_path(self._model, *self._rest()))
            inputs, outputs = (
                tuple(TensorSpec(item["name"], datatype_of(item["datatype"]), tuple(item["shape"])) for item in items)
                for items in (document["inputs"], document["outputs"])
            )
            self._description = Description(self._model, document["versions"][-1], inputs, outputs)
        return self._description

    def _rest(self) -> tuple[str, ...]:
        return ("versions", self._version) if self._version else ()

    async def __call__(self, inputs: Arrays) -> Arrays:
        """Outputs by name. ApplianceError with the appliance's words, or UNAVAILABLE if the connection was lost."""
        if self._client is not None:
            result = await self._client.infer(self._model, inputs, version=self._version, timeout_s=self._timeout_s)
            return result.outputs
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._post, inputs)

    def _post(self, inputs: Arrays) -> Arrays:
        assert self._appliance is not None
        assert self._description is not None
        tensors = to_tensors(self._description, inputs)
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": tensor.name,
                        "datatype": tensor.datatype.value,
                        "shape": tensor.shape,
                        "parameters": {"binary_data_size": len(tensor.data)},
                    }
                    for tensor in tensors
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        try:
            response, data = self._appliance.request(
                "POST",
                model_path(self._model, *self._rest(), "infer"),
                b"".join((header, *(bytes(tensor.data) for tensor in tensors))),
                {"Inference-Header-Content-Length": str(len(header))},
                timeout_s=self._timeout_s,
            )
        except CommandError as error:
            code = {Exit.TIMEOUT: ErrorCode.DEADLINE_EXCEEDED, Exit.FAILED: ErrorCode.INVALID_ARGUMENT}
            raise ApplianceError(code.get(error.code, ErrorCode.UNAVAILABLE), error.message) from error
        return _decode(data, int(response.headers["Inference-Header-Content-Length"]))


def _decode(data: bytes, header_bytes: int) -> Arrays:
    """The outputs of an answer whose tensors are all binary."""
    found, offset = {}, header_bytes
    for output in json.loads(data[:header_bytes])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        tensor = Tensor(
            output["name"],
            datatype_of(output["datatype"]),
            tuple(output["shape"]),
            memoryview(data)[offset : offset + size],
        )
        found[tensor.name] = to_numpy(tensor)
        offset += size
    return found
