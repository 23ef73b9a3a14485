"""The classification extension: the top classes of an output instead of its tensor, as Triton writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import invalid
from appliance.core.tensor import DataType, Tensor


def classify(tensor: Tensor, count: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    """BYTES of shape (batch, k) or (k,) holding "value:index[:label]", best first, k = min(count, classes).

    Ties go to the lower index. INVALID_ARGUMENT for an output that holds no numbers numpy can order.
    """
    if tensor.datatype.numpy is None or tensor.datatype is DataType.BOOL:
        raise invalid(f"output {tensor.name!r} is {tensor.datatype.value}: classification needs numbers")
    scores: NDArray[Any] = np.frombuffer(tensor.data, dtype=tensor.datatype.numpy)
    rows = tensor.shape[0] if batched and tensor.shape else 1
    scores = scores.reshape(rows, -1) if rows else scores.reshape(0, 0)
    kept = min(count, scores.shape[1])
    order = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :kept]
    parts: list[bytes] = []
    for row, indices in zip(scores, order, strict=True):
        for index in indices.tolist():
            text = f"{float(row[index]):f}:{index}"
            if index < len(labels):
                text += f":{labels[index]}"
            encoded = text.encode()
            parts.append(len(encoded).to_bytes(4, "little"))
            parts.append(encoded)
    shape = (rows, kept) if batched else (kept,)
    return Tensor(tensor.name, DataType.BYTES, shape, b"".join(parts))
