"""What an engine is: the contract between a worker and the library that runs the model.

One engine instance is driven by one thread. It reads inputs where they lie and writes outputs where it is told, in shared
memory, if it can; it never sees a socket, a queue or a deadline. Libraries are imported inside the engine's own module only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import msgspec

from appliance.core.manifest import OnnxRuntimeManifest
from appliance.core.tensor import Buffer, DataType, Shape, TensorSpec


class EngineOptions(msgspec.Struct, frozen=True):
    """What a worker is told to load. `cores` is what this worker may use; `max_batch_size` 0 leaves the choice to the model.

    `device` is a contract ("cpu", "cuda", "cuda:1"): the engine runs there or refuses, unless `fallback` is "cpu".
    """

    engine: str
    model_file: str
    device: str
    max_batch_size: int
    cores: int
    onnxruntime: OnnxRuntimeManifest
    parameters: dict[str, str]
    fallback: str = ""


class EngineTraits(msgspec.Struct, frozen=True):
    """What was loaded. `batched`: every input and output has a free first axis; otherwise `unbatched_reason` says why not.

    `max_batch_size` is what the engine proposes when the manifest leaves it open. `device` is where it really runs ("cpu",
    "cuda:0"), whatever was asked for.
    """

    platform: str
    backend: str
    provider: str
    device: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    max_batch_size: int
    unbatched_reason: str = ""
    details: dict[str, str] = {}


class EngineTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor at its place: `view` over its bytes, and the address they start at."""

    name: str
    datatype: DataType
    shape: Shape
    view: memoryview
    address: int


class EngineBatch(msgspec.Struct, frozen=True):
    """One batch to run. Equal `key` means equal places and shapes (so bindings may be kept); None means: never again.

    `outputs` are where to write, or None if their sizes are not known before the run.
    """

    key: Hashable
    rows: int
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...] | None


class EngineOutput(msgspec.Struct, frozen=True):
    """An output the engine allocated: its shape and its wire form (valid until the next run)."""

    shape: Shape
    data: Buffer


class EngineError(Exception):
    """The engine refused this load or this batch; the text is the library's own. The engine can go on."""


class DeviceFaultError(EngineError):
    """The device, or this process's context on it, is lost: nothing can run here any more, and the worker must end.

    Sticky CUDA errors (illegal address, launch failure, uncorrectable ECC, device lost) answer every later call with themselves.
    """


class OutOfMemoryError(EngineError):
    """The device, or the host, has no room for this now. Nothing is said against the file: the same may succeed later."""


class MissingError(EngineError):
    """A library, a driver or a device that this needs is not here. Nothing is said against the file."""


class OutputMismatchError(EngineError):
    """An output did not have the shape the model declared; the caller runs the batch again with `outputs` None."""


class Engine(Protocol):
    """A loaded model."""

    traits: EngineTraits

    def attach_memory(self, address: int, size: int) -> None:
        """The memory that batches will mostly lie in, instead of any named before; mapped until the next such call or `close`."""

    def run(self, batch: EngineBatch) -> Sequence[EngineOutput] | None:
        """Run one batch. None: everything was written to `batch.outputs`. EngineError: this batch is refused."""

    def close(self) -> None:
        """Give everything back. Nothing is called afterwards."""
