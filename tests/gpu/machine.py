"""What a test that needs an NVIDIA GPU asks of the machine, and the exact word for what is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.house import ROOT
from tests.fakes import cuda_stub

BUILD_LIMIT_S = 900.0

LIBRARIES = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


def missing(*needs: str) -> str:
    """Why this machine cannot run a test with these needs (of LIBRARIES, or onnxruntime-gpu); empty if it can."""
    if cuda_stub.active():
        return "this process runs over the stub driver"
    if not list(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/nvhost-gpu").exists():
        return "no GPU: there is no /dev/nvidia* here"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no driver: {error}"
    if importlib.util.find_spec("cuda") is None:
        return "the Python package cuda-bindings is not installed"
    for need in needs:
        if need == "onnxruntime-gpu":
            os.environ["ORT_DISABLE_TELEMETRY"] = "1"
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                return f"no onnxruntime-gpu: onnxruntime {onnxruntime.__version__} has no CUDA provider"
        elif not any(importlib.util.find_spec(name) for name in LIBRARIES[need]):
            return f"no {need}: none of {', '.join(LIBRARIES[need])} is installed"
    return ""


def need(*needs: str) -> None:
    """Skip with the reason unless everything is there."""
    reason = missing(*needs)
    if reason:
        pytest.skip(reason)


def memory_used_bytes(index: int = 0) -> int:
    """Bytes in use on the device, by whomever; asked in a process of its own, whose context does not count afterwards."""
    code = (
        "from appliance.engines import cuda\n"
        f"device = cuda.Device({index})\n"
        "device.open()\n"
        "free, total = device.memory_info()\n"
        "print(total - free)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    return int(done.stdout)


def run_json(script: str, *arguments: str, limit_s: float = 300.0, status: int = 0) -> Any:
    """Run Python code in a process of its own; what its last line says. The exit status must be `status`."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit_s)
    assert done.returncode == status, f"exit {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def compiled(folder: Path, engine: str) -> Path:
    """The plan of the example model, made by `appliance compile` in a repository of its own."""
    repository = folder / "models"
    shutil.copytree(ROOT / "models" / "digits", repository / "digits")
    manifest = repository / "digits" / "model.toml"
    manifest.write_text(f'engine = "{engine}"\ndevice = "cuda"\n{manifest.read_text()}')
    base = [sys.executable, "-m", "appliance"]
    compile_ = [*base, "compile", "digits", "--repository", str(repository), "--no-load", "--json"]
    done = subprocess.run(compile_, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = subprocess.run(
        [*base, "engines", "list", "--repository", str(repository), "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    [entry] = json.loads(listed.stdout)
    return Path(entry["folder"]) / entry["model_file"]
