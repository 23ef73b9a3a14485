"""A batch that looks like one before, with other outputs or in another arena: what an engine remembers must not be used."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from appliance.core.admission import Admission
from appliance.core.manifest import OnnxRuntimeManifest
from appliance.core.request import InferenceRequest, ModelName
from appliance.core.tensor import DataType, Tensor
from appliance.engines.base import EngineOptions
from appliance.workers.supervisor import Supervisor
from tests.workers.test_supervisor import MANIFEST, Owner, supervisor

__all__ = ["supervisor"]  # the fixture


async def test_a_model_that_keeps_one_row_is_served_unbatched_for_the_true_reason(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    """Declared with a free first axis on both sides; the warm-up's second size shows that it is another one."""
    graph = helper.make_graph(
        [helper.make_node("Compress", ["data", "first"], ["result"], axis=0)],
        "g",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, ["m", 4])],
        [helper.make_tensor("first", TensorProto.BOOL, [1], [True])],
    )
    file = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    options = EngineOptions("onnxruntime", str(file), "cpu", 4, 1, OnnxRuntimeManifest(), {})
    instance = await supervisor.open_instance("m:1", options, MANIFEST)
    assert "does not follow the batch axis" in instance.traits.unbatched_reason
    assert instance.layout is not None
    owner = instance.owner = Owner()
    for batch in range(4):
        row = np.full((1, 4), batch + 1, np.float32)
        data = Tensor("data", DataType.FP32, row.shape, row.tobytes())
        fitted = Admission(instance.layout).fit(InferenceRequest(ModelName("m"), (data,)))
        instance.dispatch(batch, [fitted], 1, time.monotonic())
        assert await owner.next() == ("done", row.tobytes())
