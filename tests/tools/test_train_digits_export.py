"""Tidying an exported graph and comparing it with the network it came from, on small hand-made graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tools.digits import export
from tools.digits.errors import QualityError

WEIGHTS = np.random.default_rng(3).normal(size=(784, 10)).astype(np.float32)


def exported_like_keras() -> bytes:
    """A network (n, 28, 28, 1) → (n, 10) with the exporter's habits: needless casts, transposes that cancel, a number as name."""
    nodes = [
        helper.make_node("Cast", ["picture"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 3, 1, 2]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[0, 2, 3, 1]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "weights"], ["e"]),
        helper.make_node("Cast", ["e"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["f"], ["56"]),
    ]
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["batch", 28, 28, 1])],
        [helper.make_tensor_value_info("56", TensorProto.FLOAT, ["Softmax56_dim_0", 10])],
        [numpy_helper.from_array(WEIGHTS, "weights")],
    )
    opsets = [helper.make_opsetid("", export.OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def expected_scores(images: np.ndarray) -> np.ndarray:
    logits = images.reshape(len(images), -1) @ WEIGHTS
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def tidied() -> bytes:
    return export.tidy(exported_like_keras())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(4).random((16, 28, 28, 1), dtype=np.float32)


def test_casts_and_transposes_that_do_nothing_are_gone(tidied):
    operators = [node.op_type for node in onnx.load_from_string(tidied).graph.node]
    assert "Cast" not in operators
    assert "Transpose" not in operators
    assert operators[-1] == "Softmax"


def test_the_tidied_graph_has_our_names_a_free_batch_axis_and_only_the_standard_operator_set(tidied):
    model = onnx.load_from_string(tidied)
    (given_input,), (given_output,) = model.graph.input, model.graph.output
    assert given_input.name == "image"
    assert given_output.name == "scores"
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (given_input, given_output)] == [
        "batch",
        "batch",
    ]
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", export.OPSET)]


def test_tidying_changes_no_score(tidied, images):
    before = onnxruntime.InferenceSession(exported_like_keras(), providers=["CPUExecutionProvider"])
    after = onnxruntime.InferenceSession(tidied, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        after.run(["scores"], {"image": images})[0], before.run(["56"], {"picture": images})[0], atol=1e-7
    )


def test_tidying_twice_gives_the_same_bytes(tidied):
    assert export.tidy(exported_like_keras()) == tidied


def test_parity_reports_the_difference_at_batch_1_7_and_all(tidied, images):
    parity = export.check_parity(tidied, images, expected_scores(images))
    assert list(parity.max_abs_diff) == [1, 7, 16]
    assert parity.worst < 1e-5


def test_one_differing_score_fails_the_parity(tidied, images):
    expected = expected_scores(images)
    expected[15, 3] += 2e-4
    with pytest.raises(QualityError, match=r"differ by 0\.0002"):
        export.check_parity(tidied, images, expected)


def test_a_score_that_is_not_a_number_fails_the_parity(tidied, images):
    expected = expected_scores(images)
    expected[0, 0] = np.nan
    with pytest.raises(QualityError, match="differ by nan"):
        export.check_parity(tidied, images, expected)
