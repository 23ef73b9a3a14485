"""What NVIDIA's driver reports by itself: XIDs, ECC storms, lost GPUs. A thread that waits for them and hands them to the loop.

Waits at most a second at a time, so that it can be ended. The same event again and again is counted and not delivered: a storm
must not fill the loop. Driven by `monitor.py`; knows nobody else.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from appliance.sensors import nvml_calls as nvml
from appliance.sensors.nvml_calls import Calls, RefusedError
from appliance.sensors.xid import Xid, xid

log = logging.getLogger(__name__)

WAIT_MS = 1000
XID = 0x8
KINDS = {
    0x1: "ecc-corrected",
    0x2: "ecc-uncorrected",
    XID: "xid",
    0x200: "ecc-storm",
    0x400: "row-retired",
    0x800: "row-retirement-failed",
    0x1000: "poison",
    0x2000: "poison-fatal",
    0x4000: "gpu-unavailable",
    0x8000: "recovery-action",
}
"""Events that are asked for, where the GPU has them; clock and P-state changes are polled."""


class DriverEvent(msgspec.Struct, frozen=True):
    """One report: `data` is the XID's number for kind "xid". `gpu` is -1 if the driver does not say. `suppressed`: how many like
    it were not delivered since the last one."""

    at_s: float
    kind: str
    gpu: int
    data: int
    suppressed: int = 0

    @property
    def xid(self) -> Xid | None:
        """The row of the XID table, for an XID."""
        return xid(self.data) if self.kind == "xid" else None


Listener: TypeAlias = Callable[[DriverEvent], None]


class StormGuard:
    """At most `limit` of a kind per window; the rest is counted. Pure: `now` is an argument."""

    def __init__(self, *, limit: int = 10, window_s: float = 60.0, kinds: int = 256) -> None:
        self._limit, self._window_s, self._kinds = limit, window_s, kinds
        self._seen: dict[tuple[str, int, int], deque[float]] = {}
        self._suppressed: dict[tuple[str, int, int], tuple[int, float]] = {}

    def admit(self, event: DriverEvent) -> DriverEvent | None:
        """The event, with how many were held back before it; None if it is held back itself."""
        key = (event.kind, event.gpu, event.data)
        if key not in self._seen and len(self._seen) >= self._kinds:
            key = ("", -1, -1)
        times = self._seen.setdefault(key, deque())
        while times and times[0] <= event.at_s - self._window_s:
            times.popleft()
        if len(times) >= self._limit:
            self._suppressed[key] = (self._suppressed.get(key, (0, 0.0))[0] + 1, event.at_s)
            return None
        times.append(event.at_s)
        return msgspec.structs.replace(event, suppressed=self._suppressed.pop(key, (0, 0.0))[0])

    def held_back(self, now_s: float) -> int:
        """How many are held back, of the kinds whose storm still goes on: one was held back within the last window."""
        return sum(count for count, newest_s in self._suppressed.copy().values() if newest_s > now_s - self._window_s)


class NvmlEvents:
    """`start` on the loop that `listener` is called on."""

    def __init__(self, listener: Listener, *, guard: StormGuard | None = None, retry_s: float = 30.0) -> None:
        self._listener = listener
        self._retry_s = retry_s
        self.guard = guard or StormGuard()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start waiting."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="sensors-nvml-events", daemon=True)
        self._thread.start()

    async def close(self, timeout_s: float) -> bool:
        """End the thread. False: it hangs in the driver, and was left behind."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is None or not thread.is_alive():
            return True
        await asyncio.to_thread(thread.join, timeout_s)
        return not thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            calls = Calls()
            try:
                calls.open()
                self._wait(calls)
            except RefusedError as error:
                log.debug("sensors.events_unavailable", extra={"fields": {"reason": str(error)}})
            calls.close()
            self._stop.wait(self._retry_s)

    def _wait(self, calls: Calls) -> None:
        """Until the end, or until the event set is of no use: RefusedError."""
        api = calls.api
        events = calls.plain(api.nvmlEventSetCreate)
        try:
            gpus = {}
            for index in range(int(calls.plain(api.nvmlDeviceGetCount))):
                if (handle := self._register(calls, index, events)) is not None:
                    gpus[_address(handle)] = index
            while gpus and not self._stop.is_set():
                self._one(calls, events, gpus)
        finally:
            calls.plain(api.nvmlEventSetFree, events)

    def _register(self, calls: Calls, index: int, events: Any) -> Any:
        api = calls.api
        try:
            handle = calls.plain(api.nvmlDeviceGetHandleByIndex, index)
            wanted = int(calls.plain(api.nvmlDeviceGetSupportedEventTypes, handle)) & sum(KINDS)
            if not wanted:
                return None
            calls.plain(api.nvmlDeviceRegisterEvents, handle, wanted, events)
        except RefusedError as error:
            log.info("sensors.no_events", extra={"fields": {"gpu": index, "reason": str(error)}})
            return None
        return handle

    def _one(self, calls: Calls, events: Any, gpus: dict[int | None, int]) -> None:
        try:
            data = calls.plain(calls.api.nvmlEventSetWait_v2, events, WAIT_MS)
        except RefusedError as error:
            if error.code == nvml.TIMEOUT:
                return
            raise
        kind = KINDS.get(int(data.eventType), f"{int(data.eventType):#x}")
        event = DriverEvent(time.monotonic(), kind, gpus.get(_address(data.device), -1), int(data.eventData))
        admitted = self.guard.admit(event)
        loop = self._loop
        if admitted is not None and loop is not None and not self._stop.is_set():
            try:
                loop.call_soon_threadsafe(self._listener, admitted)
            except RuntimeError:
                self._stop.set()  # the loop is closed: nobody listens


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
