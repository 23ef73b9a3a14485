"""CUDA's driver API as far as an engine needs it: the only home of `cuda.bindings`.

A device, its primary context (the one TensorRT uses), one stream, memory on both sides of the bus, copies and graphs. It knows no
tensor and no model. Every return code becomes one of two exceptions: a `DeviceFaultError` ends this process's use of the device,
after an `EngineError` it goes on. Driven by `tensorrt` and, through `facts`, by what builds engines.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from appliance.engines.base import DeviceFaultError, EngineError, MissingError, OutOfMemoryError
from appliance.engines.cuda_codes import FAULTS, OUT_OF_MEMORY

try:
    from cuda.bindings import driver
except ImportError:  # an installation without a GPU: `probe` says so
    driver = None


LOST = "the GPU is lost to this process: "
NO_DEVICE = 100
NO_DEVICE_WORDS = (
    "the NVIDIA driver knows no device "
    "(is it hidden by CUDA_VISIBLE_DEVICES, or not passed through to this container or machine?)"
)


class DeviceFacts(msgspec.Struct, frozen=True):
    """A GPU as its driver describes it. `cuda` is the newest CUDA that the installed driver can do ("13.4")."""

    name: str
    compute_capability: str
    memory_bytes: int
    multiprocessors: int
    cuda: str


def failure(call: str, code: int) -> EngineError:
    """What a return code means, as the exception to raise: DeviceFaultError if it is one of FAULTS, or OutOfMemoryError."""
    try:
        name = driver.CUresult(code).name
    except ValueError:  # of a newer driver
        name = "CUDA_ERROR"
    status, text = driver.cuGetErrorString(driver.CUresult(code)) if name != "CUDA_ERROR" else (1, None)
    said = text.decode(errors="replace") if not status and text else "no description"
    words = f"{call}: {name} ({code}), {said}"
    if code in FAULTS:
        return DeviceFaultError(f"{LOST}{words}")
    return OutOfMemoryError(words) if code == OUT_OF_MEMORY else EngineError(words)


def _got(call: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call; its failure as an exception."""
    if result[0]:
        raise failure(call, int(result[0]))
    return result[1] if len(result) > 1 else None


def probe() -> int:
    """How many devices there are, at least one. MissingError in words that name what is missing.

    To be called before TensorRT is touched: without a driver some of its flavours end the process instead of failing.
    """
    if driver is None:
        raise MissingError("the Python package cuda-bindings is not installed: install appliance[gpu]")
    try:
        _began(int(driver.cuInit(0)[0]))
    except EngineError:
        raise
    except RuntimeError as error:  # the binding's own way to say that it finds no libcuda.so.1, or an odd one
        words = " ".join(str(error).split())[:300]
        raise MissingError(f"no NVIDIA driver on this machine: libcuda.so.1 cannot be used ({words})") from error
    count = int(_got("cuDeviceGetCount", driver.cuDeviceGetCount()))
    if count == 0:
        raise MissingError(NO_DEVICE_WORDS)
    return count


def _began(code: int) -> None:
    """What `cuInit` says. Nothing ran on a device yet, so none can have been lost to us: it is one that cannot be had."""
    if code == NO_DEVICE:
        raise MissingError(NO_DEVICE_WORDS)
    if code:
        error = failure("cuInit", code)
        words = str(error).removeprefix(LOST)
        raise (
            error if isinstance(error, OutOfMemoryError) else MissingError(f"the NVIDIA driver cannot be used: {words}")
        )


def facts(index: int) -> DeviceFacts:
    """What that device is; takes no memory on it. EngineError if it is not there."""
    handle = _device(index)
    attribute = driver.CUdevice_attribute
    ask = functools.partial(_attribute, handle)
    version = int(_got("cuDriverGetVersion", driver.cuDriverGetVersion()))
    name = _got("cuDeviceGetName", driver.cuDeviceGetName(256, handle))
    return DeviceFacts(
        name=name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=(
            f"{ask(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)}."
            f"{ask(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)}"
        ),
        memory_bytes=int(_got("cuDeviceTotalMem", driver.cuDeviceTotalMem(handle))),
        multiprocessors=ask(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


def _device(index: int) -> Any:
    count = probe()
    if not 0 <= index < count:
        raise MissingError(f"there is no cuda:{index}: this machine has {count}, from cuda:0 to cuda:{count - 1}")
    return _got("cuDeviceGet", driver.cuDeviceGet(index))


def _attribute(handle: Any, attribute: Any) -> int:
    return int(_got("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(attribute, handle)))


class PinnedMemory:
    """Host memory that the device reads and writes at full speed: `view` over its bytes, and its `address`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.view = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class Device:
    """One device with its primary context, one stream and everything that was allocated here, which `close` gives back.

    `open` first. To be used by one thread; the context is current to it from `open` on.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.stream_handle = 0
        self._handle: Any = None
        self._context: Any = None
        self._stream: Any = None
        self._memory: set[int] = set()
        self._pinned: set[int] = set()
        self._registered: set[int] = set()
        self._graphs: dict[int, Any] = {}

    def open(self) -> None:
        """Make the context current and create the stream. EngineError if the device is not there or has no memory left."""
        self._handle = _device(self.index)
        self._context = _got("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(self._handle))
        _got("cuCtxSetCurrent", driver.cuCtxSetCurrent(self._context))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = _got("cuStreamCreate", driver.cuStreamCreate(flags))
        self.stream_handle = int(self._stream)

    def memory_info(self) -> tuple[int, int]:
        """Bytes free and in all on the device, whoever uses them."""
        free, total = _got2("cuMemGetInfo", driver.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes on the device, aligned for any use. OutOfMemoryError says what is free."""
        status, pointer = driver.cuMemAlloc(max(nbytes, 1))
        if status == OUT_OF_MEMORY:
            free, total = self.memory_info()
            raise OutOfMemoryError(
                f"the GPU has no room for {nbytes >> 10} KiB more: {free >> 20} of {total >> 20} MiB are free "
                f"(CUDA_ERROR_OUT_OF_MEMORY)"
            )
        address = int(_got("cuMemAlloc", (status, pointer)))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._memory.remove(address)
        _got("cuMemFree", driver.cuMemFree(address))

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Host memory for copies at full speed."""
        address = int(_got("cuMemHostAlloc", driver.cuMemHostAlloc(max(nbytes, 1), 0)))
        self._pinned.add(address)
        return PinnedMemory(address, max(nbytes, 1))

    def free_pinned(self, memory: PinnedMemory) -> None:
        """Give it back; nobody may look at its view any more."""
        self._pinned.remove(memory.address)
        _got("cuMemFreeHost", driver.cuMemFreeHost(memory.address))

    def register(self, address: int, nbytes: int) -> str:
        """Pin memory that exists, page by page. Why it cannot be had, in words; empty if it is done."""
        try:
            _got("cuMemHostRegister", driver.cuMemHostRegister(address, nbytes, 0))
        except DeviceFaultError:
            raise
        except EngineError as error:
            return str(error)
        self._registered.add(address)
        return ""

    def unregister(self, address: int) -> None:
        """Before registered memory is unmapped."""
        self._registered.remove(address)
        _got("cuMemHostUnregister", driver.cuMemHostUnregister(address))

    def upload(self, device: int, host: int, nbytes: int) -> None:
        """Queue a copy from host to device."""
        result = driver.cuMemcpyHtoDAsync(device, host, nbytes, self._stream)
        if result[0]:
            raise failure("cuMemcpyHtoDAsync", int(result[0]))

    def download(self, host: int, device: int, nbytes: int) -> None:
        """Queue a copy from device to host."""
        result = driver.cuMemcpyDtoHAsync(host, device, nbytes, self._stream)
        if result[0]:
            raise failure("cuMemcpyDtoHAsync", int(result[0]))

    def synchronize(self) -> None:
        """Wait for everything queued. This is where the faults of kernels show."""
        result = driver.cuStreamSynchronize(self._stream)
        if result[0]:
            raise failure("cuStreamSynchronize", int(result[0]))

    def capture(self, enqueue: Callable[[], None]) -> int:
        """Record what `enqueue` queues, without running it: a graph to launch. EngineError if it cannot be recorded.

        Whatever happens, the stream is out of its recording mode afterwards.
        """
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _got("cuStreamBeginCapture", driver.cuStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        except EngineError:
            _, half = driver.cuStreamEndCapture(self._stream)
            if half is not None and int(half):
                driver.cuGraphDestroy(half)
            raise
        graph = _got("cuStreamEndCapture", driver.cuStreamEndCapture(self._stream))
        try:
            executable = _got("cuGraphInstantiate", driver.cuGraphInstantiate(graph, 0))
        finally:
            _got("cuGraphDestroy", driver.cuGraphDestroy(graph))
        self._graphs[int(executable)] = executable
        return int(executable)

    def launch(self, graph: int) -> None:
        """Queue a recorded graph."""
        result = driver.cuGraphLaunch(self._graphs[graph], self._stream)
        if result[0]:
            raise failure("cuGraphLaunch", int(result[0]))

    def destroy(self, graph: int) -> None:
        """Forget a recorded graph."""
        _got("cuGraphExecDestroy", driver.cuGraphExecDestroy(self._graphs.pop(graph)))

    def close(self) -> None:
        """Give everything back; works after half an `open`. What fails does not keep the rest; the first failure is raised."""
        problems: list[EngineError] = []
        with _noting(problems):
            if self._stream is not None:
                self.synchronize()
        self._each(self._graphs, self.destroy, problems)
        self._each(self._registered, self.unregister, problems)
        for addresses, call in ((self._memory, "cuMemFree"), (self._pinned, "cuMemFreeHost")):
            for address in addresses:
                with _noting(problems):
                    _got(call, getattr(driver, call)(address))
            addresses.clear()
        if self._stream is not None:
            with _noting(problems):
                _got("cuStreamDestroy", driver.cuStreamDestroy(self._stream))
            self._stream = None
        if self._context is not None:
            with _noting(problems):
                _got("cuDevicePrimaryCtxRelease", driver.cuDevicePrimaryCtxRelease(self._handle))
            self._context = None
        if problems:
            raise problems[0]

    @staticmethod
    def _each(owned: Any, release: Callable[[int], None], problems: list[EngineError]) -> None:
        for one in list(owned):
            with _noting(problems):
                release(one)


def _got2(call: str, result: tuple[Any, ...]) -> tuple[Any, Any]:
    """The two values of a driver call."""
    _got(call, result)
    return result[1], result[2]


@contextlib.contextmanager
def _noting(problems: list[EngineError]) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        problems.append(error)
