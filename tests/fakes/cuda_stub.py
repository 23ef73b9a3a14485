"""The stub driver in use: compiled for a test run, loaded by a process of its own, made to fail, and asked what was leaked.

A process has one libcuda and one TensorRT for good, so whatever runs over the stub runs in a process started with `environment`.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MARK = "APPLIANCE_TESTS_OVER_CUDA_STUB"

LEAKS = ("device_bytes", "pinned_bytes", "registered_bytes", "graphs", "executables", "streams", "contexts")

SHIM = """from tests.fakes.tensorrt_building import *
from tests.fakes.tensorrt_runtime import *
from tests.fakes.tensorrt_runtime import __version__
"""

VERSION = "11.4.0.106"


def active() -> bool:
    """Whether this process runs over the stub."""
    return MARK in os.environ


def build(folder: Path) -> Path:
    """Compile the driver into a folder, beside a module `tensorrt` that is the fake runtime. Skips where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc) to make the stub of libcuda.so.1 with")
    pytest.importorskip("cuda.bindings.driver", reason="the Python package cuda-bindings is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1", HERE / "cuda_driver.c", "-ldl"], check=True)
    (folder / "tensorrt.py").write_text(SHIM)
    (folder / "failures").write_text("")
    (folder / "device").write_text("")
    install(folder, VERSION)
    return folder


def install(folder: Path, version: str) -> dict[str, str]:
    """Make the stand-in for TensorRT be of that version, as its package's metadata say; the environment that goes with it."""
    for old in folder.glob("tensorrt-*.dist-info"):
        shutil.rmtree(old)
    place = folder / f"tensorrt-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}\n")
    return {"TENSORRT_FAKE_VERSION": version}


def environment(folder: Path) -> dict[str, str]:
    """For a process over the stub that `build` made there."""
    paths = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    joined = {
        name: f"{value}{os.pathsep}{os.environ[name]}" if os.environ.get(name) else value
        for name, value in paths.items()
    }
    files = {"CUDA_STUB_FAILURES": str(folder / "failures"), "CUDA_STUB_DEVICE": str(folder / "device")}
    return {**os.environ, **joined, **files, MARK: "1"}


class Stub:
    """The stub as seen from a process that runs over it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.stub_count.restype = ctypes.c_long

    def reset(self) -> None:
        """A device as new, and no failures."""
        self.fail("")
        self._library.stub_reset()

    def fail(self, *rules: str) -> None:
        """From now on: "function=code" for every call, "function=code@n" for the n-th."""
        Path(os.environ["CUDA_STUB_FAILURES"]).write_text("\n".join(rules))

    def count(self, name: str) -> int:
        """How many of these there are, or were done."""
        return int(self._library.stub_count(name.encode()))

    @property
    def lost(self) -> bool:
        """Whether a sticky error has ended this process's use of the device."""
        return bool(self._library.stub_lost())

    def leaked(self) -> dict[str, int]:
        """What is still alive, by name."""
        return {name: count for name in LEAKS if (count := self.count(name))}


def tensor(name: str, shape: Sequence[int], mode: str = "input", **more: Any) -> dict[str, Any]:
    """A tensor of a plan for the fake runtime."""
    return {"name": name, "mode": mode, "shape": list(shape), **more}


def plan(path: Path, **document: Any) -> str:
    """Write a plan for the fake runtime: by default y = x for batches of 1 to 32 rows of four numbers."""
    values: dict[str, Any] = {
        "op": "identity",
        "tensors": [tensor("data", (-1, 4)), tensor("result", (-1, 4), "output")],
        "profiles": [{"data": [[1, 4], [8, 4], [32, 4]]}],
    }
    path.write_text(json.dumps(values | document))
    return str(path)
