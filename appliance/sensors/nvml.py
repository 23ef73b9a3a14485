"""NVIDIA GPUs by NVML: which there are, how they are, and what state each is in. One sampler for all, on one thread.

Quick values are read at every sample, counters and processes every second, what hardly changes every minute. A lost GPU is not
touched again until `reopen`: every call to it would fail, and some hang. Knows no loop; driven by a `lane.Lane`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from appliance.core import quantities as q
from appliance.core.quantities import Quantity
from appliance.core.readings import (
    Finding,
    Gpu,
    GpuProcess,
    GpuState,
    MigInstance,
    Part,
    Reading,
    Severity,
    measured,
    missing,
)
from appliance.sensors import nvml_calls as nvml
from appliance.sensors import nvml_tables as tables
from appliance.sensors.base import Every, UnreadableError, read_text
from appliance.sensors.drift import DriftWatch
from appliance.sensors.memory import memory_info
from appliance.sensors.nvml_calls import Calls, RefusedError, Ways


class _Card:
    """One GPU between samples."""

    def __init__(self, index: int, handle: Any, uuid: str, name: str) -> None:
        self.index, self.handle, self.uuid, self.name = index, handle, uuid, name
        self.integrated = bool(tables.INTEGRATED.search(name))
        self.readings: dict[str, Reading] = {}
        self.plans: dict[int, list[tuple[Quantity, str, float, Ways]]] = {}
        self.processes: tuple[GpuProcess, ...] = ()
        self.mig: tuple[MigInstance, ...] = ()
        self.mig_mode: bool | None = None
        self.state, self.reason, self.action = GpuState.OK, "", ""


class NvmlSampler:
    """`sample` answers for every GPU that was ever seen since `reopen`. `root`: where /proc and /sys are."""

    name = "nvml"
    period_s = 0.0

    def __init__(self, *, root: Path = Path("/"), slow_period_s: float = 60.0, retry_s: float = 10.0) -> None:
        self._root = root
        self._drift = DriftWatch(root)
        self._calls: Calls | None = None
        self._cards: list[_Card] = []
        self._driver = ""
        self._findings: dict[str, Finding] = {}
        self._retry = Every(retry_s)
        self._second = Every(1.0)
        self._slow = Every(slow_period_s)
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._reopen = False
        self._pid = 0

    def mark_lost(self, index: int, reason: str) -> None:
        """Never touch that GPU again: an event said that it is gone. From any thread."""
        with self._lock:
            self._lost[index] = reason

    def reopen(self) -> None:
        """At the next sample shut NVML down and look anew: what was lost may have been reset. From any thread."""
        with self._lock:
            self._reopen = True

    def sample(self, now_s: float) -> Part:
        """Every reading of every GPU; a machine without NVIDIA's library has none, and that is no finding."""
        with self._lock:
            again, self._reopen = self._reopen, False
            lost = dict(self._lost)
        if again or (self._calls is not None and self._pid != os.getpid()):
            self._shut()
            lost = {}
        if self._calls is None and self._retry.due(now_s):
            self._open(now_s)
        second, slow = self._second.due(now_s), self._slow.due(now_s)
        if second:
            # what has begun to fail already need not be foretold
            self._note("driver-drift", None if "driver-mismatch" in self._findings else self._drift.look())
        readings: dict[str, Reading] = {}
        for card in self._cards:
            # the driver's own word for it comes later than the first call that fails, and says more
            if card.index in lost and (card.state, card.reason) != (GpuState.LOST, lost[card.index]):
                self._lose(card, lost[card.index], now_s)
            if self._calls is not None and card.state not in (GpuState.LOST, GpuState.ABSENT):
                self._read(self._calls, card, now_s, second=second, slow=slow)
            readings.update(card.readings)
        gpus = tuple(self._gpu(card) for card in self._cards)
        return Part(readings, gpus, (*self._findings.values(), *tables.findings(gpus, readings)))

    def close(self) -> None:
        """Shut the library down."""
        self._shut()

    def _shut(self) -> None:
        calls, self._calls = self._calls, None
        if calls is not None and self._pid == os.getpid():
            calls.close()
        for period in (self._retry, self._second, self._slow):
            period.reset()
        with self._lock:
            self._lost.clear()

    def _note(self, code: str, finding: Finding | None) -> None:
        if finding is None:
            self._findings.pop(code, None)
        else:
            self._findings[code] = finding

    def _open(self, now_s: float) -> None:
        calls = Calls()
        try:
            calls.open()
            self._calls, self._pid = calls, os.getpid()
            self._driver = str(calls.plain(calls.api.nvmlSystemGetDriverVersion))
            count = int(calls.plain(calls.api.nvmlDeviceGetCount))
        except RefusedError as error:
            self._refused(error, calls, now_s)
            return
        for code in ("driver-missing", "driver-mismatch", "driver-failed"):
            self._note(code, None)
        self._slow.reset()
        before = {card.uuid: card for card in self._cards}
        self._cards = [self._found(calls, index, now_s) for index in range(min(count, tables.MAX_GPUS))]
        present = {card.uuid for card in self._cards}
        for uuid, card in before.items():
            if uuid not in present and not any(one.index == card.index for one in self._cards):
                self._end(card, GpuState.ABSENT, "the driver no longer lists this GPU", tables.LOST_ACTION, now_s)
                self._cards.append(card)

    def _refused(self, error: RefusedError, calls: Calls, now_s: float) -> None:
        if self._calls is not None:
            self._calls = None
            calls.close()
        if error.code == nvml.MISMATCH:
            code, action = "driver-mismatch", "Reboot the box: the driver was upgraded while the old one runs."
        elif error.code == nvml.NO_DRIVER:
            code, action = (
                "driver-missing",
                "Load the module (`modprobe nvidia`), or install the driver for this kernel.",
            )
        elif error.code == nvml.NO_LIBRARY:
            return  # a machine without NVIDIA
        else:
            code, action = "driver-failed", "See `journalctl -k` for NVRM lines; reboot if it stays."
        self._note(code, Finding(code, Severity.CRITICAL, "driver", str(error), action))
        for card in self._cards:
            self._end(card, GpuState.ABSENT, str(error), action, now_s)

    def _found(self, calls: Calls, index: int, now_s: float) -> _Card:
        api = calls.api
        try:
            handle = calls.plain(api.nvmlDeviceGetHandleByIndex, index)
        except RefusedError as error:
            card = _Card(index, None, "", f"GPU {index}")
            self._end(card, GpuState.LOST, str(error), tables.LOST_ACTION, now_s)
            return card
        texts = []
        for name, fallback in (("nvmlDeviceGetUUID", f"index-{index}"), ("nvmlDeviceGetName", f"GPU {index}")):
            try:
                texts.append(str(calls.plain(getattr(api, name), handle)))
            except RefusedError:
                texts.append(fallback)
        return _Card(index, handle, *texts)

    def _read(self, calls: Calls, card: _Card, now_s: float, *, second: bool, slow: bool) -> None:
        card.state, card.reason, card.action = GpuState.OK, "", ""
        try:
            if second:
                self._mig_mode(calls, card, now_s)
            self._numbers(calls, card, tables.QUICK, now_s)
            self._pair(calls, card, now_s)
            if second:
                self._numbers(calls, card, tables.EVERY_SECOND, now_s)
                self._fields(calls, card, now_s)
                self._instances(calls, card, now_s)
                self._memory(calls, card, now_s)
            if slow:
                self._numbers(calls, card, tables.EVERY_MINUTE, now_s)
                self._fans_and_rows(calls, card, now_s)
            elif second:
                self._fans_and_rows(calls, card, now_s)
        except RefusedError as error:  # only LOST comes through
            self._lose(card, str(error), now_s)

    def _refusal(self, card: _Card, error: RefusedError) -> str:
        """The reason for people. Let the end of the GPU through; take note of a needed reset."""
        if error.code == nvml.LOST:
            raise error
        if error.code == nvml.RESET_REQUIRED:
            card.state, card.reason, card.action = GpuState.RESET_REQUIRED, str(error), tables.RESET_ACTION
        return tables.MIG_REASON if card.mig_mode and error.code in nvml.PERMANENT else str(error)

    def _numbers(self, calls: Calls, card: _Card, table: Any, now_s: float) -> None:
        plan = card.plans.get(id(table))
        if plan is None:
            plan = card.plans[id(table)] = [
                (quantity, quantity.name(card.index), scale, _bound(card.handle, ways))
                for quantity, scale, ways in table
            ]
        for quantity, name, scale, ways in plan:
            if name in card.readings and calls.refuses(card.index, quantity.template, now_s):
                continue  # the reason of the last attempt stands, with its time
            try:
                raw = calls.ask(card.index, quantity.template, now_s, ways)
            except RefusedError as error:
                why = self._refusal(card, error)
                card.readings[name] = missing(quantity, why, now_s)
            else:
                card.readings[name] = measured(quantity, raw, now_s, scale=scale)

    def _group(
        self,
        calls: Calls,
        card: _Card,
        now_s: float,
        names: tuple[tuple[Quantity, Any], ...],
        *ways: tuple[str, tuple[Any, ...]],
    ) -> Any:
        """One call that answers several quantities: (quantity, attribute or position)."""
        try:
            answer = calls.ask(card.index, ways[0][0], now_s, ways)
        except RefusedError as error:
            why = self._refusal(card, error)
            for quantity, _ in names:
                card.readings[quantity.name(card.index)] = missing(quantity, why, now_s)
            return None
        for quantity, where in names:
            raw = answer[where] if isinstance(where, int) else getattr(answer, where, None)
            card.readings[quantity.name(card.index)] = measured(quantity, raw, now_s)
        return answer

    def _pair(self, calls: Calls, card: _Card, now_s: float) -> None:
        names = ((q.GPU_UTILIZATION, "gpu"), (q.GPU_MEMORY_UTILIZATION, "memory"))
        self._group(calls, card, now_s, names, ("nvmlDeviceGetUtilizationRates", (card.handle,)))

    def _memory(self, calls: Calls, card: _Card, now_s: float) -> None:
        if card.integrated:
            card.readings.update(unified_memory(card.index, card.processes, self._root, now_s))
            return
        ways = (
            ("nvmlDeviceGetMemoryInfo", (card.handle, calls.api.nvmlMemory_v2)),
            ("nvmlDeviceGetMemoryInfo", (card.handle,)),
        )
        if self._group(calls, card, now_s, tables.MEMORY, *ways) is None and card.mig:
            card.readings.update(sum_of_instances(card.index, card.mig, now_s))

    def _fans_and_rows(self, calls: Calls, card: _Card, now_s: float) -> None:
        try:
            fans = int(calls.ask(card.index, "fans", now_s, (("nvmlDeviceGetNumFans", (card.handle,)),)))
        except RefusedError as error:
            self._refusal(card, error)
            fans = 0
        table = tuple((q.GPU_FAN, fan) for fan in range(min(fans, 8)))
        for quantity, fan in table:
            name = quantity.name(card.index, fan)
            try:
                raw = calls.ask(card.index, f"fan {fan}", now_s, (("nvmlDeviceGetFanSpeed_v2", (card.handle, fan)),))
                card.readings[name] = measured(quantity, raw, now_s)
            except RefusedError as error:
                self._refusal(card, error)
                card.readings[name] = missing(quantity, str(error), now_s)
        rows = tuple((quantity, number) for number, quantity in enumerate(tables.ROWS))
        self._group(calls, card, now_s, rows, ("nvmlDeviceGetRemappedRows", (card.handle,)))

    def _fields(self, calls: Calls, card: _Card, now_s: float) -> None:
        """Field values: one call for many, each with a status of its own."""
        wanted = {
            82: (q.GPU_MEMORY_TEMPERATURE, 1.0),
            74: (q.GPU_SW_POWER_TIME, 1e-9),
            230: (q.GPU_RECOVERY_ACTION, 1.0),
        }
        numbers = tables.duration_fields(self._driver)
        if numbers is not None:
            wanted |= {number: (quantity, 1e-9) for number, quantity in zip(numbers, tables.DURATIONS, strict=True)}
        else:
            wanted[tables.THERMAL_POLICY] = q.GPU_SW_THERMAL_TIME, 1e-9
            for quantity in set(tables.DURATIONS) - {q.GPU_SW_THERMAL_TIME}:
                reason = f"nobody knows where driver {self._driver} keeps it"
                card.readings[quantity.name(card.index)] = missing(quantity, reason, now_s)
        try:
            way = ("nvmlDeviceGetFieldValues", (card.handle, list(wanted)))
            fields = {int(field.fieldId): field for field in calls.ask(card.index, "fields", now_s, (way,))}
        except RefusedError as error:
            self._refusal(card, error)
            for quantity, _ in wanted.values():
                card.readings[quantity.name(card.index)] = missing(quantity, str(error), now_s)
            return
        for number, (quantity, scale) in wanted.items():
            field = fields[number]
            if field.nvmlReturn != 0:
                reading = missing(quantity, nvml.reason(int(field.nvmlReturn)), now_s)
            else:
                reading = measured(quantity, field_value(field), now_s, scale=scale)
            card.readings[quantity.name(card.index)] = reading

    def _instances(self, calls: Calls, card: _Card, now_s: float) -> None:
        card.processes = self._processes(calls, card, card.handle, "processes", now_s)
        card.mig = ()
        if not card.mig_mode:
            return
        try:
            limit = int(calls.plain(calls.api.nvmlDeviceGetMaxMigDeviceCount, card.handle))
        except RefusedError as error:
            self._refusal(card, error)
            return
        card.mig = tuple(
            instance for number in range(min(limit, 16)) if (instance := self._slice(calls, card, number, now_s))
        )

    def _mig_mode(self, calls: Calls, card: _Card, now_s: float) -> None:
        before = card.mig_mode
        try:
            way = ("nvmlDeviceGetMigMode", (card.handle,))
            card.mig_mode = int(calls.ask(card.index, "mig", now_s, (way,))[0]) == 1
        except RefusedError as error:
            self._refusal(card, error)
            card.mig_mode = None
        if bool(before) is not bool(card.mig_mode):
            calls.forget(card.index)

    def _slice(self, calls: Calls, card: _Card, number: int, now_s: float) -> MigInstance | None:
        api = calls.api
        try:
            handle = calls.plain(api.nvmlDeviceGetMigDeviceHandleByIndex, card.handle, number)
            uuid = str(calls.plain(api.nvmlDeviceGetUUID, handle))
        except RefusedError as error:
            self._refusal(card, error)
            return None
        total = used = None
        try:
            memory = calls.plain(api.nvmlDeviceGetMemoryInfo, handle)
            total, used = int(memory.total), int(memory.used)
        except RefusedError as error:
            self._refusal(card, error)
        processes = self._processes(calls, card, handle, f"processes of slice {number}", now_s)
        return MigInstance(number, uuid, total, used, processes)

    def _processes(self, calls: Calls, card: _Card, handle: Any, what: str, now_s: float) -> tuple[GpuProcess, ...]:
        ways = (
            ("nvmlDeviceGetComputeRunningProcesses_v3", (handle,)),
            ("nvmlDeviceGetComputeRunningProcesses_v2", (handle,)),
        )
        try:
            found = calls.ask(card.index, what, now_s, ways)
        except RefusedError as error:
            self._refusal(card, error)
            return ()
        return tuple(
            GpuProcess(
                int(one.pid),
                None if one.usedGpuMemory in (None, tables.NO_VALUE) else int(one.usedGpuMemory),
                None if one.gpuInstanceId in (None, tables.NONE) else int(one.gpuInstanceId),
                None if one.computeInstanceId in (None, tables.NONE) else int(one.computeInstanceId),
            )
            for one in found
        )

    def _lose(self, card: _Card, reason: str, now_s: float) -> None:
        self._end(card, GpuState.LOST, reason, tables.LOST_ACTION, now_s)

    def _end(self, card: _Card, state: GpuState, reason: str, action: str, now_s: float) -> None:
        card.state, card.reason, card.action = state, reason, action
        card.processes, card.mig, card.mig_mode = (), (), None
        for name in card.readings:
            if found := q.quantity_of(name):
                card.readings[name] = missing(found[0], reason, now_s)

    def _gpu(self, card: _Card) -> Gpu:
        bits = card.readings.get(q.GPU_EVENT_REASONS.name(card.index))
        value = int(bits.value) if bits is not None and bits.value is not None else 0
        throttle = tuple(name for bit, name in tables.THROTTLE if value & bit)
        return Gpu(
            card.index,
            card.uuid,
            card.name,
            card.integrated,
            card.state,
            card.reason,
            card.action,
            throttle,
            card.processes,
            card.mig,
            card.mig_mode,
        )


def _bound(handle: Any, ways: Ways) -> Ways:
    """The alternatives of a call, for one GPU."""
    return tuple((name, (handle, *arguments)) for name, arguments in ways)


def field_value(field: Any) -> object:
    """The member of a field's union that its value type names; None for a type that nobody knows."""
    members = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}
    member = members.get(int(field.valueType))
    value: object = None if member is None else getattr(field.value, member)
    return value


def sum_of_instances(index: int, mig: tuple[MigInstance, ...], now_s: float) -> dict[str, Reading]:
    """The memory of a GPU that tells only that of its MIG instances; nothing where one of them does not tell."""
    known = [
        (one.total_bytes, one.used_bytes) for one in mig if one.total_bytes is not None and one.used_bytes is not None
    ]
    if len(known) < len(mig):
        return {}
    total, used = sum(total for total, _ in known), sum(used for _, used in known)
    values = ((q.GPU_MEMORY_TOTAL, total), (q.GPU_MEMORY_USED, used), (q.GPU_MEMORY_FREE, total - used))
    return {quantity.name(index): measured(quantity, value, now_s) for quantity, value in values}


def unified_memory(index: int, processes: tuple[GpuProcess, ...], root: Path, now_s: float) -> dict[str, Reading]:
    """A GPU without memory of its own: the host's total and available, and the sum of what its processes use."""
    try:
        host = memory_info(read_text(root / "proc/meminfo"))
        total, free, reason = host.get("MemTotal"), host.get("MemAvailable"), "the kernel does not say"
    except UnreadableError as error:
        total, free, reason = None, None, str(error)
    used = sum(process.memory_bytes or 0 for process in processes)
    values: tuple[tuple[Quantity, int | None], ...] = (
        (q.GPU_MEMORY_TOTAL, total),
        (q.GPU_MEMORY_FREE, free),
        (q.GPU_MEMORY_USED, used),
    )
    readings = {
        quantity.name(index): missing(quantity, reason, now_s) if value is None else measured(quantity, value, now_s)
        for quantity, value in values
    }
    reserved = q.GPU_MEMORY_RESERVED
    readings[reserved.name(index)] = missing(reserved, "the memory is the host's", now_s)
    return readings
