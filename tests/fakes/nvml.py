"""A machine with NVIDIA GPUs, for tests: compiles `nvml_stub.c` and writes the table that it answers from.

The real `pynvml` talks to the stub: in a child process by `environment()`, in this one by `install(monkeypatch)`. Needs gcc;
`StubNvml.missing()` says so in the words of a skip.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml_stub.c")
SIZE = 1 << 16
LIBRARY = "libnvidia-ml.so.1"
LOST, RESET_REQUIRED, NOT_SUPPORTED, UNKNOWN, MISMATCH, NO_DRIVER = 15, 16, 3, 999, 18, 9
XID = 8
_BUILDS: dict[tuple[str, ...], bytes] = {}

CARD: dict[str, object] = {
    "uuid": "GPU-aaaaaaaa-0000-0000-0000-000000000000",
    "name": "NVIDIA RTX 4000 SFF Ada Generation",
    "temperature": 61,
    "margin": 34,
    "threshold.0": 98,
    "threshold.1": 95,
    "threshold.3": 90,
    "clock.0": 1500,
    "clock.1": 1500,
    "clock.2": 7000,
    "clock_max.1": 2100,
    "pstate": 2,
    "reasons": 0,
    "power_mw": 48_500,
    "power_limit_mw": 70_000,
    "energy_mj": 123_456_789,
    "utilization": 37,
    "utilization_memory": 12,
    "memory.total": 20 << 30,
    "memory.used": 3 << 30,
    "memory.reserved": 300 << 20,
    "fans": 1,
    "fan.0": 45,
    "pcie.replays": 2,
    "pcie.generation": 4,
    "pcie.width": 8,
    "pcie.generation_max": 4,
    "pcie.width_max": 16,
    "ecc.corrected": 1,
    "ecc.uncorrected": 0,
    "rows.corrected": 0,
    "mig": 0,
    "events": 0xFFFF,
    "processes": f"1234:{1 << 30},77",
    "field.82": 70,
    "field.74": 5_000_000_000,
    "field.269": 3_000_000_000,
    "field.270": 2_000_000_000,
    "field.271": 1_000_000_000,
    "field.230": 0,
}
"""What GPU 0 of a healthy workstation answers."""


class StubNvml:
    """One such machine. `start()` compiles the library; `set`, `unset` and `event` change what it answers at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table: dict[str, object] = {"gpus": 1}
        self._events = 0
        self._memory: mmap.mmap | None = None

    @staticmethod
    def missing() -> str:
        """Why there can be no stub here; empty if there can."""
        return "" if shutil.which("gcc") else "needs gcc (apt-get install gcc)"

    def start(self, *, without: Iterable[str] = (), gpus: int = 1) -> StubNvml:
        """Compile (once per process and variant) and put in `gpus` healthy cards. `without`: "TEMPERATURE_V", "MEMORY_V2", …"""
        flags = tuple(f"-DWITHOUT_{name}" for name in sorted(without))
        library = self._folder / LIBRARY
        if flags not in _BUILDS:
            command = [
                "gcc",
                "-O1",
                "-shared",
                "-fPIC",
                "-pthread",
                "-Wall",
                "-Werror",
                *flags,
                f"-Wl,-soname,{LIBRARY}",
            ]
            subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True, timeout=60)
            _BUILDS[flags] = library.read_bytes()
        library.write_bytes(_BUILDS[flags])
        state = self._folder / "nvml.state"
        state.write_bytes(bytes(SIZE))
        with state.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)
        for index in range(gpus):
            self.card(index)
        self.set("gpus", gpus)
        return self

    def card(self, index: int, **changes: object) -> None:
        """Put a healthy card at that index."""
        uuid = f"GPU-{'abcdefgh'[index] * 8}-0000-0000-0000-000000000000"
        values = {**CARD, "uuid": uuid, **changes}
        self._table.update({f"{index}.{key}": value for key, value in values.items()})
        self._write()

    def set(self, key: str, value: object) -> None:
        """Let that key answer that value: `set("0.temperature", 85)`, `set("0.error", 15)`, `set("0.hang", 1)`."""
        self._table[key] = value
        self._write()

    def put(self, values: Mapping[str, object | None]) -> None:
        """Several keys at once, so that nobody sees some of them changed and others not; None takes one away."""
        for key, value in values.items():
            self._table.pop(key, None)
            if value is not None:
                self._table[key] = value
        self._write()

    def unset(self, *keys: str) -> None:
        """Take keys away: the call that reads one answers NOT_SUPPORTED, an error or a hang ends."""
        for key in keys:
            self._table.pop(key, None)
        self._write()

    def event(self, gpu: int, data: int, kind: int = XID) -> None:
        """Let the event set deliver one: an XID, if nothing else is said."""
        self.set(f"event.{self._events}", f"{gpu}:{kind}:{data}")
        self._events += 1

    def forget_events(self) -> None:
        """A process that is started now hears none of them; a driver repeats nothing."""
        self.unset(*[key for key in self._table if key.startswith("event.")])
        self._events = 0

    def environment(self) -> dict[str, str]:
        """What a child process needs in its environment so that its pynvml loads the stub."""
        return {"LD_LIBRARY_PATH": str(self._folder), "NVML_STUB_STATE": str(self._folder / "nvml.state")}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process' pynvml talk to this stub. Each folder's library is loaded anew, with a state of its own."""
        import pynvml

        monkeypatch.setenv("NVML_STUB_STATE", str(self._folder / "nvml.state"))
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(self._folder / LIBRARY)))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        # the C library reads its own copy of the environment
        os.putenv("NVML_STUB_STATE", str(self._folder / "nvml.state"))

    def close(self) -> None:
        """Let go of every hanging call."""
        self.unset(*[key for key in self._table if ".hang" in key])

    def _write(self) -> None:
        if self._memory is None:
            return
        text = "".join(f"{key}={value}\n" for key, value in self._table.items()).encode()
        assert len(text) < SIZE - 8
        sequence = int.from_bytes(self._memory[:8], "little")
        self._memory[:8] = (sequence + 1).to_bytes(8, "little")
        self._memory[8 : 8 + len(text) + 1] = text + b"\0"
        self._memory[:8] = (sequence + 2).to_bytes(8, "little")
