"""The gate over a plan that takes fewer rows than the reference: golden inputs come in batches that both take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from appliance.building.verification import VerifyOrder, verify
from appliance.core.manifest import BuildManifest, ModelManifest, OnnxRuntimeManifest, ShapeRange
from appliance.engines.base import EngineOptions
from tests.building import graphs
from tests.fakes import cuda_stub
from tests.fakes.cuda_stub import Stub


@pytest.mark.parametrize("most", [1, 8])
def test_golden_inputs_and_samples_are_cut_to_what_the_plan_takes(stub: Stub, tmp_path: Path, most: int) -> None:
    (tmp_path / "golden").mkdir()
    rows = np.random.default_rng(1).random((32, 4), np.float32)
    np.savez(tmp_path / "golden" / "a.npz", data=rows, target=rows)
    model = graphs.write(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["data"], ["result"])],
        {"data": (TensorProto.FLOAT, ["batch", 4])},
        {"result": (TensorProto.FLOAT, ["batch", 4])},
    )
    plan = cuda_stub.plan(tmp_path / "m.plan", profiles=[{"data": [[1, 4], [most, 4], [most, 4]]}])
    manifest = ModelManifest(
        engine="tensorrt",
        device="cuda",
        build=BuildManifest(shapes={"data": ShapeRange(min=(1, 4), max=(most, 4))}),
    )
    options = EngineOptions("tensorrt", plan, "cuda", 0, 1, OnnxRuntimeManifest(), {})
    found = verify(VerifyOrder("m", "1", "tensorrt", str(model), options, manifest, (), str(tmp_path)))
    assert (found.passed, found.failures, found.rows) == (True, (), 32)
    assert bool(found.invariance) == (most > 1)
