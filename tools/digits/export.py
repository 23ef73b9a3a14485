"""From a trained Keras network to an ONNX file, and the proof that both compute the same.

Keras' exporter writes 38 nodes for these six layers, most of them casts of FP32 to FP32 and transposes that undo each other,
and names the output `56`. ONNX Runtime would remove them at every load. They are removed once here instead: it makes nothing
faster (8 ms to load, 53 µs for one picture, with or without), but the file then reads like the network, which matters to
people and to other compilers. Only the optimizer's basic level is used: it stays within the standard operators.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the first import of onnxruntime; later is too late

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from . import INPUT_NAME, OUTPUT_NAME
from .errors import QualityError

OPSET = 18
BATCH_AXIS = "batch"
PARITY_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest absolute difference of a score between ONNX Runtime and Keras, at each batch size that was tried."""

    max_abs_diff: dict[int, float]

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.max_abs_diff.values())


def from_keras(model: Any) -> bytes:
    """Export a Keras network that has been called at least once, and tidy the result."""
    import torch

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # Tracing turns Python numbers (kernel sizes, the count of channels) into constants: what is wanted here.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # The exporter itself calls parts of torch that torch announces to replace.
        warnings.simplefilter("ignore", DeprecationWarning)
        path = Path(scratch) / "exported.onnx"
        model.export(path, format="onnx", opset_version=OPSET, verbose=False)
        return tidy(path.read_bytes())


def tidy(exported: bytes) -> bytes:
    """Fold what is constant or cancels out, and name input, output and the batch axis.

    Takes a network with one input and one output whose first axis is the batch. Raises onnx.checker.ValidationError if the
    result is not valid ONNX.
    """
    model = onnx.load_from_string(_fold(exported))
    used_domains = {node.domain for node in model.graph.node}
    for index in reversed(range(len(model.opset_import))):
        # ONNX Runtime lists all of its own operator sets, used or not; other runtimes refuse those they do not know.
        if model.opset_import[index].domain not in used_domains:
            del model.opset_import[index]
    del model.graph.value_info[:]
    (given_input,), (given_output,) = model.graph.input, model.graph.output
    _rename(model, {given_input.name: INPUT_NAME, given_output.name: OUTPUT_NAME})
    for value in (given_input, given_output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS
    model.graph.name = "digits"
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def check_parity(
    onnx_bytes: bytes, images: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float = PARITY_TOLERANCE
) -> Parity:
    """Run pictures (count, 28, 28, 1) through ONNX Runtime in batches of 1, of 7 and all at once.

    Raises:
        QualityError: a score differs from `expected` (count, 10) by `tolerance` or more.
    """
    session = onnxruntime.InferenceSession(onnx_bytes, providers=["CPUExecutionProvider"])
    parity = Parity({size: _max_abs_diff(session, images, expected, size) for size in (1, 7, len(images))})
    if not parity.worst < tolerance:
        raise QualityError(f"ONNX Runtime and Keras differ by {parity.worst:.2g}; less than {tolerance:g} is required")
    return parity


def _fold(exported: bytes) -> bytes:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as scratch:
        folded = Path(scratch) / "folded.onnx"
        options.optimized_model_filepath = str(folded)
        onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
        return folded.read_bytes()


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for edges in (node.input, node.output):
            edges[:] = [names.get(edge, edge) for edge in edges]


def _max_abs_diff(
    session: onnxruntime.InferenceSession, images: NDArray[np.float32], expected: NDArray[np.float32], size: int
) -> float:
    starts = range(0, len(images), size)
    scores = [session.run([OUTPUT_NAME], {INPUT_NAME: images[start : start + size]})[0] for start in starts]
    return float(np.abs(np.concatenate(scores) - expected).max())
