"""The TensorRT engine without a GPU: what is said where there is none, and its suite over a stub driver and a fake runtime."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.core.manifest import OnnxRuntimeManifest
from appliance.engines import registry
from appliance.engines.base import EngineError, EngineOptions
from tests.fakes import cuda_stub


def options(engine: str, device: str = "cuda") -> EngineOptions:
    return EngineOptions(engine, "", device, 0, 1, OnnxRuntimeManifest(), {})


def test_the_engine_does_its_work_over_a_stub_driver_and_a_fake_runtime(tmp_path: Path) -> None:
    """In a process of its own: one process has one libcuda and one TensorRT for good."""
    folder = cuda_stub.build(tmp_path / "stub")
    suites = [
        cuda_stub.HERE.parent / "engines" / "over_stub",
        cuda_stub.HERE.parent / "contract" / "test_engine_contract.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, suites)],
        cwd=cuda_stub.ROOT,
        env=cuda_stub.environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 40, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_without_a_driver_the_error_names_what_is_missing_before_the_library_is_touched(flavour: str) -> None:
    code = (
        "import sys\n"
        "from appliance.core.manifest import OnnxRuntimeManifest\n"
        "from appliance.engines import registry\n"
        "from appliance.engines.base import EngineError, EngineOptions\n"
        "try:\n"
        f"    registry.load(EngineOptions({flavour!r}, 'm.plan', 'cuda', 0, 1, OnnxRuntimeManifest(), {{}}))\n"
        "except EngineError as error:\n"
        "    print(error)\n"
        "assert not [name for name in sys.modules if name.startswith('tensorrt')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = ("no NVIDIA driver on this machine: libcuda.so.1", "cuda-bindings is not installed")
    if not any(words in done.stdout for words in said):
        pytest.skip(f"this machine has an NVIDIA driver: {done.stdout.strip()}")


def test_a_plan_asks_for_a_gpu() -> None:
    with pytest.raises(EngineError, match='not on "cpu": set device = "cuda"'):
        registry.load(options("tensorrt", "cpu"))


def test_an_unknown_engine_is_told_all_that_there_are() -> None:
    with pytest.raises(EngineError, match="onnxruntime, tensorrt, tensorrt_rtx and loopback"):
        registry.load(options("openvino"))
