"""The appliance on a real NVIDIA GPU. Where there is none, each test says exactly what is missing."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from appliance.cli.connection import Appliance
from appliance.client import Client
from appliance.core.manifest import OnnxRuntimeManifest
from appliance.engines.base import EngineBatch, EngineOptions, EngineTensor
from tests.e2e.house import LONG_S, ROOT, House
from tests.gpu import programs
from tests.gpu.machine import compiled, memory_used_bytes, need, run_json

pytestmark = pytest.mark.gpu

GOLDEN = dict(np.load(ROOT / "models" / "digits" / "golden" / "batch_32.npz"))
MIB = 1 << 20
flavours = pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A plan of the example model for this GPU, and the flavour it is for."""
    need(request.param)
    return str(compiled(tmp_path_factory.mktemp(request.param), request.param)), request.param


def test_onnx_runtime_runs_the_example_on_the_gpu_as_on_the_cpu() -> None:
    need("onnxruntime-gpu")
    from appliance.engines.onnxruntime import OnnxRuntimeEngine

    found = {}
    for device in ("cpu", "cuda"):
        file = str(ROOT / "models" / "digits" / "1" / "model.onnx")
        engine = OnnxRuntimeEngine(EngineOptions("onnxruntime", file, device, 0, 1, OnnxRuntimeManifest(), {}))
        image = np.array(GOLDEN["image"], order="C")
        target = np.zeros_like(GOLDEN["scores"])
        spots = [
            EngineTensor(
                spec.name, spec.datatype, array.shape, memoryview(array).cast("B"), array.__array_interface__["data"][0]
            )
            for spec, array in ((engine.traits.inputs[0], image), (engine.traits.outputs[0], target))
        ]
        batch = EngineBatch(1, 32, (spots[0],), (spots[1],))
        # twice with the same key: what is bound to a device is copied there once for each run, or it is the old picture
        image[:] = 0
        assert engine.run(batch) is None
        image[:] = GOLDEN["image"]
        assert engine.run(batch) is None
        found[device] = (engine.traits.provider, target)
        engine.close()
    assert found["cuda"][0] == "CUDAExecutionProvider"
    np.testing.assert_allclose(found["cuda"][1], found["cpu"][1], atol=1e-4)


@flavours
def test_the_appliance_builds_a_plan_and_serves_it_with_the_golden_answers(house: House, flavour: str) -> None:
    need(flavour)
    house.digits()
    manifest = house.models / "digits" / "model.toml"
    manifest.write_text(f'engine = "{flavour}"\ndevice = "cuda"\n{manifest.read_text()}')
    before = memory_used_bytes()
    house.start()
    while house.worker_pids("digits") == [] or "TensorRT" not in provider(house):
        house.wait_for("model.state", model="digits", state="READY")
    with Client(house.ipc, timeout_s=LONG_S) as client:
        for rows in (1, 32, 5, 5, 5):
            scores = client.infer("digits", {"image": GOLDEN["image"][:rows]}).outputs["scores"]
            np.testing.assert_allclose(scores, GOLDEN["scores"][:rows], atol=5e-3)
    [pid] = house.worker_pids("digits")
    worker = psutil.Process(pid)
    Appliance(house.http).post("/v2/repository/models/digits/unload")
    psutil.wait_procs([worker], timeout=LONG_S)
    assert memory_used_bytes() - before < 8 * MIB, "an unload gives everything back, since the process ends"


def provider(house: House) -> str:
    return str(Appliance(house.http).get("/v2/appliance/workers")[0]["provider"])


def test_graphs_change_nothing_but_the_time(plan: tuple[str, str]) -> None:
    found = run_json(programs.GRAPHS_ON_AND_OFF, *plan)
    assert found["worst"] == 0, "the same kernels in the same order"
    assert found["true"].startswith("3 captured, 0 refused")
    assert found["false"] == "off"


def test_engines_opened_and_closed_in_one_process_leave_no_memory_behind(plan: tuple[str, str]) -> None:
    used = run_json(programs.MEMORY_COMES_BACK, *plan, "20")
    # the first turns fill the libraries' own pools
    assert used[-1] - used[4] < 4 * MIB, used


def test_a_kernel_that_faults_ends_this_process_s_use_of_the_device_and_the_next_one_works(
    plan: tuple[str, str],
) -> None:
    words = run_json(programs.TRAP, *plan, status=75)
    assert all("the GPU is lost to this process" in said for said in words), words
    assert run_json(programs.MEMORY_COMES_BACK, *plan, "1")


def test_an_address_that_is_none_is_refused_by_the_driver_and_the_context_lives(plan: tuple[str, str]) -> None:
    found = run_json(programs.BOGUS_ADDRESS, *plan)
    assert "CUDA_ERROR_INVALID_VALUE" in found["said"]
    assert found["same"]
    assert not found["lost"]
