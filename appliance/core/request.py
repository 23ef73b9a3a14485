"""A request, its answer, and what a caller may ask of each output: values shared by every transport.

They know no wire format. Times are seconds on the monotonic clock unless a name says otherwise.
"""

from __future__ import annotations

from typing import NewType, TypeAlias

import msgspec

from appliance.core.tensor import Tensor

ModelName = NewType("ModelName", str)
Version = NewType("Version", str)
RequestId = NewType("RequestId", str)

Parameter: TypeAlias = str | int | float | bool


class RequestedOutput(msgspec.Struct, frozen=True):
    """An output the caller names. `classification` > 0 asks for the top so many classes instead of the tensor."""

    name: str
    classification: int = 0


class InferenceRequest(msgspec.Struct, frozen=True):
    """One inference. Empty `version`: the newest that is ready. Empty `outputs`: all, or classification of all.

    `timeout_s` runs from receipt. `priority` 0 is the model's default, 1 the highest. A newer request of the same `stream`
    supersedes a queued older one. `idempotent` false forbids a second run after a worker died.
    `classification` > 0 asks for the top classes of every output when none is named.
    """

    model: ModelName
    inputs: tuple[Tensor, ...]
    version: Version = Version("")
    id: RequestId = RequestId("")
    outputs: tuple[RequestedOutput, ...] = ()
    priority: int = 0
    timeout_s: float | None = None
    stream: str = ""
    idempotent: bool = True
    classification: int = 0
    parameters: dict[str, Parameter] = {}


class Timing(msgspec.Struct, frozen=True, gc=False):
    """Where a request's time went, in microseconds: waiting, and in the engine (its batch's run)."""

    queue_us: int = 0
    compute_us: int = 0


class InferenceResponse(msgspec.Struct, frozen=True):
    """The answer. Output buffers are owned by the response: they stay valid."""

    model: ModelName
    version: Version
    id: RequestId
    outputs: tuple[Tensor, ...]
    timing: Timing = Timing()
    parameters: dict[str, Parameter] = {}
