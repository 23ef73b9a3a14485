"""`doctor` on memory: what the configured models take, against what box, GPUs and the unit's limits leave them, in numbers.

With a running appliance its own ledger counts; without one the same rule is applied to the models folder: the last measured peak
where one was kept, else an estimate from the file. Changes nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import psutil

from appliance.building.version_files import weights_bytes
from appliance.cli.findings import Finding, Grade, Patient
from appliance.config import Config
from appliance.core.memory_budget import HOST, MIB, estimate, size
from appliance.core.version_policy import aspired_versions
from appliance.host.cgroup import MemoryLimits, memory_limits
from appliance.lifecycle.compilation import engines_path
from appliance.lifecycle.memory import Peaks, read_peaks
from appliance.lifecycle.repository import ModelFolder, Repository, VersionFolder

TIGHT_SHARE = 0.9
"""Of what there is: models that take more leave nothing for a second version beside the first while it is switched."""

FRONT_BYTES = 192 * MIB
"""The front and the process that workers are made from, beside the models, within the unit's limits."""

LOW_SHARE = 0.05
ASK_S = 60.0
UNIT = "appliance.service"
TOTALS = """
import json, time
from appliance.core import quantities as q
from appliance.sensors.nvml import NvmlSampler
part = NvmlSampler().sample(time.monotonic())
values = {gpu.index: part.readings.get(q.GPU_MEMORY_TOTAL.name(gpu.index)) for gpu in part.gpus if not gpu.integrated}
print(json.dumps({f"gpu:{index}": reading.value for index, reading in values.items() if reading and reading.value}))
"""


class Want(msgspec.Struct, frozen=True):
    """What one model version takes, by device; of all its instances together. `known`: reserved or measured, not estimated."""

    name: str
    bytes_by_device: Mapping[str, int]
    instances: int = 1
    known: bool = False


def memory(patient: Patient) -> Iterator[Finding]:
    """The check."""
    config = patient.config
    wants = wanted(patient)
    limits = _limits(patient)
    capacity = _capacity(patient, limits, wants)
    devices = sorted({device for want in wants for device in want.bytes_by_device} | ({HOST} & capacity.keys()))
    for device in devices:
        yield judge(device, wants, capacity.get(device), config)
    if limits.tightest_bytes is not None:
        yield against_limits(wants, limits)
    yield from _now(patient)


# --- what is wanted -------------------------------------------------------------------------------------------------------


def wanted(patient: Patient) -> list[Want]:
    """Everything that the configuration loads, and what is loaded beyond it."""
    status = patient.status or {}
    unified = {f"gpu:{gpu['index']}" for gpu in status.get("gpus") or () if gpu["integrated"]}
    found = {want.name: _on_host(want, unified) for want in expected(patient.config)}
    ledger = status.get("memory") or {}
    held: dict[str, dict[str, int]] = {}
    for device, account in ledger.items():
        for owner, nbytes in account["owners"].items():
            held.setdefault(owner, {})[device] = int(nbytes)
    for owner, bytes_by_device in held.items():
        # an owner is name/version@fingerprint, and +key for a built engine
        name = owner.partition("@")[0].replace("/", " version ")
        instances = found[name].instances if name in found else 1
        found[name] = Want(name, bytes_by_device, instances, known=True)
    return list(found.values())


def _on_host(want: Want, unified: set[str]) -> Want:
    """What it takes of GPUs that share the host's memory is the host's."""
    total: dict[str, int] = {}
    for device, nbytes in want.bytes_by_device.items():
        place = HOST if device in unified else device
        total[place] = total.get(place, 0) + nbytes
    return msgspec.structs.replace(want, bytes_by_device=total)


def expected(config: Config) -> list[Want]:
    """What the configuration loads at a start, each by its kept peak or an estimate. Nothing if the folder cannot be read."""
    try:
        folders = Repository(Path(config.repository.path)).scan()
        peaks = read_peaks(engines_path(config) / "memory-peaks.json")
    except (OSError, msgspec.DecodeError):
        return []  # the permissions' check says so
    chosen = folders if config.repository.load == "all" else {*config.repository.models} & {*folders}
    return [
        _want(folders[name], folders[name].versions[number], peaks)
        for name in folders
        if name in chosen and not folders[name].problem
        for number in aspired_versions(folders[name].versions, folders[name].manifest.versions)
    ]


def _want(folder: ModelFolder, version: VersionFolder, peaks: Peaks) -> Want:
    manifest = folder.manifest
    owner = f"{folder.name}/{version.version}@{version.fingerprint[:16]}"
    kept = [
        peak
        for key, peak in peaks.items()
        if key.startswith((f"{owner}/", f"{owner}+")) and key.endswith(manifest.device)
    ]
    kind, _, index = manifest.device.partition(":")
    need = estimate(
        device=HOST if kind == "cpu" else f"gpu:{index or 0}",
        file_bytes=weights_bytes(version.model_file),
        instances=manifest.worker.instances,
        measured=kept[-1] if kept else None,
    )
    name = f"{folder.name} version {version.version}"
    return Want(name, need.bytes_by_device, manifest.worker.instances, known=bool(kept))


# --- what there is --------------------------------------------------------------------------------------------------------


def _limits(patient: Patient) -> MemoryLimits:
    """Of the running appliance's control groups, or else what its unit is given."""
    if patient.workers:
        return memory_limits(int(patient.workers[0]["pid"]))
    program = shutil.which("systemctl")
    if program is None:
        return MemoryLimits()
    asked = (program, "show", UNIT, "-p", "MemoryMax", "-p", "MemoryHigh")
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return MemoryLimits()
    given = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    numbers = [
        int(text) if text.isdecimal() else None for text in (given.get("MemoryMax", ""), given.get("MemoryHigh", ""))
    ]
    # systemd says 2**64 - 1 where there is none
    most, high = (number if number is not None and number < 1 << 60 else None for number in numbers)
    return MemoryLimits(most, high)


def _capacity(patient: Patient, limits: MemoryLimits, wants: list[Want]) -> dict[str, int]:
    """What models may take, by device."""
    ledger = (patient.status or {}).get("memory")
    if ledger:
        return {device: int(account["capacity_bytes"]) for device, account in ledger.items()}
    config = patient.config.memory
    total = int(psutil.virtual_memory().total)
    tightest = limits.tightest_bytes
    host = total if tightest is None else min(total, tightest)
    found = {HOST: max(0, host - config.host_reserve_mb * MIB)}
    if any(device != HOST for want in wants for device in want.bytes_by_device):
        found |= {device: max(0, nbytes - config.gpu_reserve_mb * MIB) for device, nbytes in _gpu_totals().items()}
    return found


def _gpu_totals() -> dict[str, int]:
    """In a process of its own: a driver may hang."""
    try:
        done = subprocess.run(  # noqa: S603  our own interpreter and words
            [sys.executable, "-c", TOTALS], capture_output=True, text=True, timeout=ASK_S, check=True
        )
        return {device: int(nbytes) for device, nbytes in json.loads(done.stdout).items()}
    except (subprocess.SubprocessError, ValueError):
        return {}


# --- the judgement --------------------------------------------------------------------------------------------------------


def judge(device: str, wants: list[Want], capacity: int | None, config: Config) -> Finding:
    """What all want on one device against what they may take there."""
    parts = {want.name: want.bytes_by_device[device] for want in wants if want.bytes_by_device.get(device)}
    total = sum(parts.values())
    guessed = sum(not want.known for want in wants if want.name in parts)
    told = (
        f"1 model version takes {size(total)}" if len(parts) == 1 else f"{len(parts)} model versions take {size(total)}"
    )
    if guessed:
        told += f" ({guessed} of them estimated from the file)"
    if capacity is None:
        return Finding("memory", "note", f"{device}: {told}; how much there is cannot be told now")
    text = f"{device}: {told} of {size(capacity)} that models may take"
    if total <= capacity * TIGHT_SHARE or not parts:
        return Finding("memory", "good", text)
    name, largest = max(parts.items(), key=lambda part: part[1])
    instances = next(want.instances for want in wants if want.name == name)
    missing = total - int(capacity * TIGHT_SHARE)
    ways = []
    if instances > 1:
        fewer = min(instances - 1, -(-missing * instances // largest))
        ways.append(f"worker.instances = {instances - fewer} instead of {instances} for {name} ({size(largest)} now)")
    ways.append(f"unload {name} ({size(largest)})" if instances == 1 else f"unload a model of {size(missing)} or more")
    key, reserve_mb = (
        ("host_reserve_mb", config.memory.host_reserve_mb)
        if device == HOST
        else ("gpu_reserve_mb", config.memory.gpu_reserve_mb)
    )
    if 0 < missing <= reserve_mb * MIB:
        ways.append(f"memory.{key} = {reserve_mb - -(-missing // MIB)} instead of {reserve_mb}")
    grade: Grade = "error" if total > capacity else "warning"
    over = f"{size(total - capacity)} too much" if total > capacity else f"only {size(capacity - total)} left"
    return Finding("memory", grade, f"{text}: {over}", f"free {size(missing)}: " + ", or ".join(ways))


def against_limits(wants: list[Want], limits: MemoryLimits) -> Finding:
    """What the processes take together against what their unit is allowed."""
    models = sum(want.bytes_by_device.get(HOST, 0) for want in wants)
    total = models + FRONT_BYTES
    keys = (
        ("MemoryMax", limits.max_bytes, "ends a worker"),
        ("MemoryHigh", limits.high_bytes, "slows everything down"),
    )
    for key, limit, what in keys:
        if limit is not None and total > limit * TIGHT_SHARE:
            grade: Grade = "error" if total > limit and key == "MemoryMax" else "warning"
            text = f"the models take {size(models)}, the front {size(FRONT_BYTES)}, and {key}= is {size(limit)}"
            enough = -(-int(total / TIGHT_SHARE) // MIB)
            less = size(int(total - limit * TIGHT_SHARE))
            fix = f"{key}={enough}M or more (systemctl edit {UNIT.partition('.')[0]}), or {less} less of models"
            return Finding("memory limits", grade, f"{text}: above it the kernel {what}", fix)
    told = " and ".join(f"{key}={size(limit)}" for key, limit, _ in keys if limit is not None)
    return Finding("memory limits", "good", f"the appliance takes {size(total)} of {told}")


def _now(patient: Patient) -> Iterator[Finding]:
    """How the box stands at this moment, whoever takes it."""
    found = psutil.virtual_memory()
    resident = sum(int(worker["rss_bytes"]) for worker in patient.workers)
    text = f"{size(found.available)} of {size(found.total)} available now"
    if resident:
        text += f", workers hold {size(resident)}"
    low = found.available < found.total * LOW_SHARE
    fix = "find what takes the memory (appliance ps, then top), or unload a model"
    yield Finding("memory", "warning" if low else "good", text, fix if low else "")
    reserve = patient.config.memory.host_reserve_mb * MIB
    if reserve > found.total // 2:
        fix = f"memory.host_reserve_mb is {patient.config.memory.host_reserve_mb}"
        yield Finding("memory", "error", "more than half of the memory is kept from the models", fix)
    swap = psutil.swap_memory()
    if swap.used > found.total * LOW_SHARE:
        text = f"{size(swap.used)} are swapped out: answers will be late"
        fix = "find what takes the memory (appliance ps), then swapoff -a && swapon -a"
        yield Finding("memory", "warning", text, fix)
