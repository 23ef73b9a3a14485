"""The programs that the GPU tests and the GPU benchmark run, as far as a stub can take them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.house import ROOT
from tests.fakes import cuda_stub
from tests.gpu import machine, programs
from tests.gpu.machine import run_json


@pytest.fixture
def plan(tmp_path: Path) -> tuple[str, str]:
    return cuda_stub.plan(tmp_path / "m.plan", op="affine"), "tensorrt"


def test_graphs_on_and_off(plan: tuple[str, str]) -> None:
    found = run_json(programs.GRAPHS_ON_AND_OFF, *plan)
    assert found == {"worst": 0, "true": "3 captured, 0 refused", "false": "off"}


def test_memory_comes_back(plan: tuple[str, str]) -> None:
    assert run_json(programs.MEMORY_COMES_BACK, *plan, "3") == [0, 0, 0]
    assert machine.memory_used_bytes() == 0


def test_a_bogus_address(plan: tuple[str, str]) -> None:
    found = run_json(programs.BOGUS_ADDRESS, *plan)
    assert "CUDA_ERROR_INVALID_VALUE" in found["said"]
    assert (found["same"], found["lost"]) == (True, False)


def test_over_the_stub_no_gpu_test_claims_a_gpu() -> None:
    assert machine.missing("tensorrt") == "this process runs over the stub driver"


def test_the_benchmark_of_the_gpu_measures_every_way(plan: tuple[str, str]) -> None:
    command = ["tools/bench_gpu.py", plan[0], "--rows", "1", "4", "--rounds", "1", "--seconds", "0.02", "--json"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert (small["rows"], large["rows"]) == (1, 4)
    assert large["details"]["cuda_graphs"] == "1 captured, 0 refused"
    assert large["details"]["host_memory"] == "pinned"
    for way in ("raw", "copies", "engine", "eager"):
        assert large[way]["runs"] > 0
        assert large[way]["p99_us"] >= large[way]["median_us"] > 0
