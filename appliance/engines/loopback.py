"""An engine without a library: it gives back what it got, and misbehaves on command. For tests, soak runs and demonstrations.

The model has one input `data` and one output `data`; with `commands = "true"` in the manifest's parameters also an input
`command`, BYTES of one element per row. Commands, executed row by row before the echo: `delay MS`, `fail`, `crash` (SIGSEGV),
`exit`, `hang`, `fault` (the device is lost), `allocate BYTES` (kept until the worker ends), `grow N` (the row count of the output
is multiplied: a data-dependent shape), and nothing for an empty string. `write PATH`, `read PATH`, `connect PORT` and
`run PROGRAM` are no worker's business: the request fails with what the kernel says to that. Manifest parameters: `datatype`
(FP32), `shape` of one row as numbers separated by commas (-1 for any), `delay_ms` per batch, `batched` ("true").
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Sequence

from appliance.core.tensor import DATATYPES, DataType, TensorSpec
from appliance.engines.base import DeviceFaultError, EngineBatch, EngineError, EngineOptions, EngineOutput, EngineTraits

KNOWN_PARAMETERS = frozenset({"datatype", "shape", "commands", "delay_ms", "batched", "load"})


class LoopbackEngine:
    """Echo, with a whip."""

    def __init__(self, options: EngineOptions) -> None:
        parameters = options.parameters
        unknown = sorted(set(parameters) - KNOWN_PARAMETERS)
        if unknown:
            raise EngineError(
                f"loopback knows no parameter {unknown[0]!r}; use one of {', '.join(sorted(KNOWN_PARAMETERS))}"
            )
        _misbehave_at_load(parameters.get("load", ""))
        datatype = DATATYPES.get(parameters.get("datatype", "FP32"))
        if datatype is None:
            raise EngineError(f"loopback: unknown datatype {parameters['datatype']!r}")
        try:
            row = tuple(int(size) for size in parameters.get("shape", "-1").split(",") if size.strip())
            self._delay_s = float(parameters.get("delay_ms", "0")) / 1000
        except ValueError as error:
            raise EngineError(f"loopback: {error}") from error
        batched = parameters.get("batched", "true") == "true" and options.max_batch_size != 1
        shape = (-1, *row) if batched else row
        specs = [TensorSpec("data", datatype, shape)]
        self._commands = parameters.get("commands", "false") == "true"
        if self._commands:
            specs.append(TensorSpec("command", DataType.BYTES, (-1, 1) if batched else (1,)))
        self.traits = EngineTraits(
            platform="loopback",
            backend="loopback",
            provider="loopback",
            device="cpu",
            inputs=tuple(specs),
            outputs=(TensorSpec("data", datatype, shape),),
            batched=batched,
            max_batch_size=(options.max_batch_size or 32) if batched else 1,
            unbatched_reason="" if batched else "the manifest says so",
        )
        self._allocated: list[bytearray] = []
        self._growth = 1

    def attach_memory(self, address: int, size: int) -> None:
        """Nothing is to be prepared."""

    def run(self, batch: EngineBatch) -> Sequence[EngineOutput] | None:
        """Obey, then echo."""
        self._growth = 1
        if self._delay_s:
            time.sleep(self._delay_s)
        if self._commands:
            for command in _strings(batch.inputs[1].view):
                self._obey(command)
        data = batch.inputs[0]
        if batch.outputs is not None and self._growth == 1:
            batch.outputs[0].view[:] = data.view
            return None
        shape = (data.shape[0] * self._growth, *data.shape[1:]) if data.shape else data.shape
        return (EngineOutput(shape, bytes(data.view) * self._growth),)

    def _obey(self, command: str) -> None:
        word, _, argument = command.partition(" ")
        if not word:
            return
        if word == "delay":
            time.sleep(float(argument) / 1000)
        elif word == "fail":
            raise EngineError("loopback was told to fail")
        elif word == "fault":
            raise DeviceFaultError("loopback was told that its device is lost")
        elif word == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif word == "exit":
            os._exit(int(argument or 1))
        elif word == "hang":
            signal.pause()
        elif word == "allocate":
            self._allocated.append(bytearray(int(argument)))
        elif word == "grow":
            self._growth = int(argument)
        elif word in TRESPASSES:
            _trespass(word, argument)
        else:
            raise EngineError(f"loopback does not know the command {word!r}")

    def close(self) -> None:
        """Give back what was allocated."""
        self._allocated.clear()


TRESPASSES = frozenset({"write", "read", "connect", "run"})


def _trespass(word: str, argument: str) -> None:
    """Try what a worker is not there for. EngineError says what came of it, in the kernel's words."""
    outcome = "was possible"
    try:
        if word == "write":
            os.close(os.open(argument, os.O_WRONLY | os.O_CREAT, 0o600))
        elif word == "read":
            os.close(os.open(argument, os.O_RDONLY))
        elif word == "connect":
            socket.create_connection(("127.0.0.1", int(argument)), timeout=1).close()
        else:
            os.posix_spawn(argument, [argument], {})
    except OSError as error:
        outcome = f"ended with {errno.errorcode.get(error.errno or 0, str(error))}"
    raise EngineError(f"loopback was told to {word}, which {outcome}")


def _misbehave_at_load(how: str) -> None:
    """What the manifest's `load` parameter asks for: a model that cannot be loaded, in five ways."""
    if how == "fail":
        raise EngineError("loopback was told to fail at load")
    if how == "fault":
        raise DeviceFaultError("loopback was told at load that its device is lost")
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        os._exit(1)
    if how == "hang":
        signal.pause()


def _strings(view: memoryview) -> list[str]:
    found = []
    offset = 0
    while offset < len(view):
        length = int.from_bytes(view[offset : offset + 4], "little")
        found.append(bytes(view[offset + 4 : offset + 4 + length]).decode(errors="replace"))
        offset += 4 + length
    return found
