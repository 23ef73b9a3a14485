"""Generated networks to measure with: seeded, so that every run measures the same.

They have the shapes and costs of real ones; their weights are noise.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
SEED = 20


class Graph:
    """A graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(SEED)

    def weight(self, *shape: int, scale: float = 0.05) -> str:
        """A constant of noise; its name."""
        name = f"w{len(self.weights)}"
        values = (self._random.standard_normal(shape) * scale).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, values: list[int]) -> str:
        """An integer constant; its name."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        """A node with one output; that output's name."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def conv(self, x: str, channels_in: int, channels_out: int, kernel: int, stride: int) -> str:
        """A convolution with its bias."""
        weight = self.weight(channels_out, channels_in, kernel, kernel)
        return self.add("Conv", [x, weight, self.weight(channels_out)], strides=[stride] * 2, pads=[kernel // 2] * 4)

    def model(self, source: onnx.ValueInfoProto, result: str, shape: list[str | int]) -> onnx.ModelProto:
        """The finished model; its output is called `output`."""
        self.nodes[-1].output[0] = "output"
        assert result == f"t{len(self.nodes) - 1}"
        target = helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "bench", [source], [target], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        return model


def identity() -> onnx.ModelProto:
    """1 KB in, 1 KB out, nothing between: what is measured is the way there and back."""
    graph = Graph()
    source = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 256])
    return graph.model(source, graph.add("Identity", ["input"]), ["batch", 256])


def resnet18() -> onnx.ModelProto:
    """The layers of ResNet-18 at 224×224: 1.8 GFLOP, about 20 ms on two cores."""
    graph = Graph()
    source = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 224, 224])
    x = graph.add("Relu", [graph.conv("input", 3, 64, 7, 2)])
    x = graph.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            skip = x if channels == width else graph.conv(x, channels, width, 1, stride)
            y = graph.add("Relu", [graph.conv(x, channels, width, 3, stride)])
            y = graph.conv(y, width, width, 3, 1)
            x = graph.add("Relu", [graph.add("Add", [y, skip])])
            channels = width
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])
    x = graph.add("Gemm", [x, graph.weight(512, 1000), graph.weight(1000)])
    return graph.model(source, x, ["batch", 1000])


def detector() -> onnx.ModelProto:
    """640×640×3 bytes in, a few numbers out: the transport of a camera frame, and a light look at it, about 0.3 ms.

    It does not gain from batches: the pixels that it reads lie far apart.
    """
    graph = Graph()
    source = helper.make_tensor_value_info("input", TensorProto.UINT8, ["batch", 640, 640, 3])
    sliced = graph.add(
        "Slice",
        ["input", graph.constant([0, 0]), graph.constant([640, 640]), graph.constant([1, 2]), graph.constant([4, 4])],
    )
    x = graph.add("Cast", [sliced], to=TensorProto.FLOAT)
    x = graph.add("Transpose", [x], perm=[0, 3, 1, 2])
    x = graph.add("Relu", [graph.conv(x, 3, 8, 3, 2)])
    x = graph.add("Relu", [graph.conv(x, 8, 16, 3, 2)])
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])
    x = graph.add("Gemm", [x, graph.weight(16, 84), graph.weight(84)])
    return graph.model(source, x, ["batch", 84])


NETWORKS = {"identity": identity, "detector": detector, "resnet18": resnet18}


def write_model(folder: Path, name: str, digits: Path) -> Path:
    """The folder of that model, made in a repository `folder`; `digits` is a copy of its folder, as it is served."""
    target = folder / name
    if name == "digits":
        shutil.copytree(digits, target)
    else:
        (target / "1").mkdir(parents=True)
        onnx.save(NETWORKS[name](), target / "1" / "model.onnx")
    return target
