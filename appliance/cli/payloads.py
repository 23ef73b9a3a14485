"""The bytes of one inference request, as the load generators send them: HTTP binary, HTTP JSON, or ZeroMQ frames.

Written out by hand rather than through the client, since a benchmark sends the same bytes over and over. Knows no socket.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from appliance.core.tensor import datatype_of


class Input(msgspec.Struct, frozen=True):
    """One input tensor, with its data as it travels."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


def noise(name: str, datatype: str, shape: Sequence[int], *, seed: int) -> Input:
    """Seeded noise: [0, 1) for floats, all of UINT8, 0 and 1 for other numbers (they may be indices), empty strings."""
    source = np.random.default_rng(seed)
    kind = datatype_of(datatype)
    count = int(np.prod(shape, dtype=np.int64))
    if kind.numpy is None:
        data = bytes((kind.itemsize or 4) * count)
    elif datatype.startswith("FP"):
        data = source.random(count, np.float32).astype(kind.numpy).tobytes()
    else:
        data = source.integers(0, 256 if datatype == "UINT8" else 2, count).astype(kind.numpy).tobytes()
    return Input(name, datatype, tuple(shape), data)


def zmq_frames(model: str, inputs: Sequence[Input]) -> tuple[bytes, ...]:
    """An AIP1 message."""
    tensors = [
        {"name": given.name, "datatype": given.datatype, "shape": given.shape, "frame": frame}
        for frame, given in enumerate(inputs)
    ]
    header = {"op": "infer", "id": "0", "model": model, "inputs": tensors}
    return b"AIP1", json.dumps(header).encode(), *(given.data for given in inputs)


def http_binary(model: str, inputs: Sequence[Input]) -> bytes:
    """An HTTP request with binary tensors, that asks for binary tensors."""
    tensors = [
        {
            "name": given.name,
            "datatype": given.datatype,
            "shape": given.shape,
            "parameters": {"binary_data_size": len(given.data)},
        }
        for given in inputs
    ]
    header = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    body = b"".join((header, *(given.data for given in inputs)))
    return _http(model, body, f"Inference-Header-Content-Length: {len(header)}\r\n")


def http_json(model: str, inputs: Sequence[Input]) -> bytes:
    """An HTTP request with all numbers in JSON. ValueError for datatypes that have no numbers."""
    tensors: list[dict[str, Any]] = []
    for given in inputs:
        kind = datatype_of(given.datatype)
        if kind.numpy is None:
            raise ValueError(f"{given.datatype} has no numbers for JSON")
        values = np.frombuffer(given.data, kind.numpy).tolist()
        tensors.append({"name": given.name, "datatype": given.datatype, "shape": given.shape, "data": values})
    return _http(model, json.dumps({"inputs": tensors}).encode(), "")


def _http(model: str, body: bytes, head: str) -> bytes:
    path = f"/v2/models/{quote(model, safe='')}/infer"
    return f"POST {path} HTTP/1.1\r\nHost: bench\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
