"""The Python client: numpy in, numpy out, over ZeroMQ.

    with Client("tcp://127.0.0.1:5570") as client:
        result = client.infer("digits", {"image": image}, timeout_s=0.5)
        result.outputs["scores"]

`AsyncClient` is the same for asyncio. Everything that goes wrong is an `ApplianceError` with a code.
"""

from appliance.client.aio import AsyncClient
from appliance.client.arrays import Description, Result
from appliance.client.sync import Client
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.protocols.zmq_wire import WireEvent

__all__ = ["ApplianceError", "AsyncClient", "Client", "Description", "ErrorCode", "Result", "WireEvent"]
