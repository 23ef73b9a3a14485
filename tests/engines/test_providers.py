"""The device in a manifest is a contract: what runs elsewhere is an error with its reason, unless the fallback was asked for."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from appliance.building.runner import Runner
from appliance.core.manifest import OnnxRuntimeManifest
from appliance.engines import providers
from appliance.engines.base import EngineError, EngineOptions
from tests.building.graphs import linear, write

HAS_CUDA = providers.CUDA in ort.get_available_providers()
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="onnxruntime here has the CUDA provider")


def _options(file: Path, device: str, fallback: str = "") -> EngineOptions:
    return EngineOptions("onnxruntime", str(file), device, 0, 1, OnnxRuntimeManifest(), {}, fallback)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return linear(tmp_path / "model.onnx", [[1.0, 2.0], [3.0, 4.0]], [0.5, 0.5])


@without_cuda
def test_a_device_that_cannot_be_had_is_an_error_that_says_what_to_install(model: Path) -> None:
    with pytest.raises(EngineError) as caught:
        Runner(_options(model, "cuda"))
    words = str(caught.value)
    assert 'device = "cuda" cannot be had' in words
    assert "has no CUDA provider: install appliance[gpu]" in words
    assert 'fallback = "cpu"' in words


@without_cuda
def test_the_fallback_serves_and_says_why_it_is_one(model: Path) -> None:
    runner = Runner(_options(model, "cuda", "cpu"))
    assert runner.traits.provider == providers.CPU
    assert "cuda cannot be had" in runner.traits.details["fallback"]
    answer = runner.run({"x": np.array([[1.0, 1.0]], np.float32)})["y"]
    np.testing.assert_allclose(answer, [[4.5, 6.5]])
    runner.close()


def test_the_nodes_of_each_provider_are_counted(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Sin", ["x"], ["s"]), onnx.helper.make_node("Cos", ["s"], ["y"])]
    kind = (onnx.TensorProto.FLOAT, ["batch", 4])
    runner = Runner(_options(write(tmp_path / "two.onnx", nodes, {"x": kind}, {"y": kind}), "cpu"))
    assert runner.traits.details["nodes"] == "CPU 2"
    assert runner.traits.details["fallback"] == ""
    runner.close()


def test_both_packages_at_once_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _name: "1.32.0")
    words = providers.missing("cuda")
    assert "both onnxruntime and onnxruntime-gpu are installed" in words
    assert "pip uninstall both" in words
    assert providers.missing("cpu") == ""


def test_a_missing_library_is_named_in_the_loaders_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        if name == "libcuda.so.1":
            raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
        return object()

    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [providers.CUDA, providers.CPU])
    monkeypatch.setattr(providers.ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(providers.ctypes, "CDLL", absent)
    monkeypatch.setattr(providers, "_installed", lambda name: name == "onnxruntime-gpu")
    assert "libcuda.so.1: cannot open shared object file" in providers.missing("cuda:1")


class Session:
    """What a session says of itself after the library has fallen back by its own."""

    def __init__(self, names: list[str], nodes: dict[str, int]) -> None:
        self._names = names
        self._nodes = nodes

    def get_providers(self) -> list[str]:
        return self._names

    def get_provider_graph_assignment_info(self) -> list[Any]:
        class Part:
            def __init__(self, name: str, count: int) -> None:
                self.ep_name = name
                self._count = count

            def get_nodes(self) -> list[int]:
                return list(range(self._count))

        return [Part(name, count) for name, count in self._nodes.items()]


def test_a_session_that_went_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_unloadable", lambda: "")
    both = [providers.CUDA, providers.CPU]
    assert providers.refused(Session(both, {providers.CUDA: 3, providers.CPU: 1}), "cuda") == ""
    assert "no operator" in providers.refused(Session(both, {providers.CPU: 4}), "cuda")
    assert "no operator" in providers.refused(Session([providers.CPU], {providers.CPU: 4}), "cuda:1")
    assert providers.refused(Session([providers.CPU], {providers.CPU: 4}), "cpu") == ""


def test_the_options_suit_a_box_that_runs_for_years() -> None:
    (name, options), second = providers.wanted("cuda:1", OnnxRuntimeManifest(gpu_memory_limit_mb=512, tf32=True))
    assert (name, second) == (providers.CUDA, providers.CPU)
    assert options["device_id"] == "1"
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["gpu_mem_limit"] == str(512 << 20)
    assert options["use_tf32"] == "1"
    assert "gpu_mem_limit" not in providers.wanted("cuda", OnnxRuntimeManifest())[0][1]
