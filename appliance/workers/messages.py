"""What front, template and workers say to each other: small MessagePack structs on SOCK_SEQPACKET, one message a packet.

Tensors never travel here; they lie in shared memory, whose descriptors come beside a message by SCM_RIGHTS. Nothing is pickled.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from appliance.core.assembly import Place, SlotLayout
from appliance.engines.base import EngineOptions, EngineTraits

MAX_MESSAGE_BYTES = 1 << 18
"""A packet's limit. Only descriptions of models come near it; a run and its answer take some dozen bytes."""

SOCKET_BUFFER_BYTES = 1 << 20


class Load(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Front to worker: load this model under this handle."""

    handle: int
    options: EngineOptions


class Attach(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Front to worker, with the arena's descriptor: where slots lie. Then warm up with batches of `sizes` rows."""

    handle: int
    slots: int
    layout: SlotLayout
    sizes: tuple[int, ...]
    max_output_bytes: int
    busy_poll_us: int


class Run(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Front to worker: run the batch in that slot. `inputs` is empty for a static layout; with `spilled` they lie in the
    memory whose descriptor comes along.
    """

    handle: int
    batch: int
    slot: int
    rows: int
    inputs: tuple[Place, ...] = ()
    spilled: bool = False


class Unload(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Front to worker: forget this handle."""

    handle: int


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Worker to front: what was loaded."""

    handle: int
    traits: EngineTraits


RefusalKind: TypeAlias = Literal["file", "memory", "missing"]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Worker to front: loading or warming failed, in the engine's words. The worker lives on.

    `kind`: what is at fault, the file ("file"), want of memory ("memory"), or something that is not installed ("missing").
    """

    handle: int
    message: str
    kind: RefusalKind = "file"


class Warmed(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Worker to front: ready. Seconds per batch size; whether outputs really have their declared shapes and batch axis;
    the engine's details as they are now.
    """

    handle: int
    batch_s: dict[int, float]
    static_outputs: bool
    unbatched_reason: str
    details: dict[str, str] = {}


class Done(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """Worker to front: the batch has run. `outputs` is empty for a static layout; with `spilled` they lie in the memory whose
    descriptor comes along. Nanoseconds by phase.
    """

    handle: int
    batch: int
    outputs: tuple[Place, ...] = ()
    spilled: bool = False
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Worker to front: the engine refused this batch, in its words. The worker lives on."""

    handle: int
    batch: int
    message: str


class Fork(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Front to template, with the worker's end of its socket: start a worker."""

    worker: int
    title: str


class Forked(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Template to front, with a pidfd: the worker runs."""

    worker: int
    pid: int


class Exited(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Template to front: the worker has ended. `status` as `os.waitstatus_to_exitcode` gives it: negative for a signal."""

    worker: int
    pid: int
    status: int


class Faulted(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """Worker to front, its last words: the device is lost to it, which showed while it worked on this handle."""

    handle: int
    reason: str


ToWorker: TypeAlias = Load | Attach | Run | Unload
FromWorker: TypeAlias = Loaded | Refused | Warmed | Done | Failed | Faulted
FromTemplate: TypeAlias = Forked | Exited

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_to_template = msgspec.msgpack.Decoder(Fork).decode
decode_from_template = msgspec.msgpack.Decoder(FromTemplate).decode
