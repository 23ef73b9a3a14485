"""ONNX Runtime answers for what a batch holds now, also where the library copies inputs to a device when they are bound."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from appliance.core.manifest import OnnxRuntimeManifest
from appliance.engines import providers
from appliance.engines.base import EngineBatch, EngineOptions, EngineTensor
from appliance.engines.onnxruntime import OnnxRuntimeEngine

FILE = Path(__file__).parents[2] / "models" / "digits" / "1" / "model.onnx"


class Slot:
    """A place for one picture and its answer, as a batch that always has the same key."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.image = np.zeros((1, 28, 28, 1), np.float32)
        self.scores = np.zeros((1, 10), np.float32)
        (image,), (scores,) = engine.traits.inputs, engine.traits.outputs
        self.batch = EngineBatch(
            (1, 0, 1),
            1,
            (EngineTensor(image.name, image.datatype, self.image.shape, *_place(self.image)),),
            (EngineTensor(scores.name, scores.datatype, self.scores.shape, *_place(self.scores)),),
        )


def _place(array: np.ndarray[Any, Any]) -> tuple[memoryview, int]:
    return memoryview(array).cast("B"), array.__array_interface__["data"][0]


@pytest.fixture
def engine() -> Iterator[OnnxRuntimeEngine]:
    made = OnnxRuntimeEngine(EngineOptions("onnxruntime", str(FILE), "cpu", 0, 1, OnnxRuntimeManifest(), {}))
    yield made
    made.close()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray[Any, Any]]:
    """The library as it is for a device with memory of its own: what is bound is copied at that moment."""
    copies: list[np.ndarray[Any, Any]] = []
    bind = ort.IOBinding.bind_input

    def bind_copy(self: Any, name: str, kind: str, number: int, datatype: Any, shape: Any, address: int) -> None:
        source = (ctypes.c_float * int(np.prod(shape))).from_address(address)
        copies.append(np.array(source, np.float32))
        bind(self, name, kind, number, datatype, shape, copies[-1].__array_interface__["data"][0])

    monkeypatch.setattr(ort.IOBinding, "bind_input", bind_copy)
    monkeypatch.setattr(providers, "copies", lambda session: True)
    return copies


def test_every_run_of_a_slot_answers_for_what_lies_in_it_now(copied: list[np.ndarray[Any, Any]]) -> None:
    wanted = ort.InferenceSession(str(FILE), providers=["CPUExecutionProvider"])
    device = OnnxRuntimeEngine(EngineOptions("onnxruntime", str(FILE), "cpu", 0, 1, OnnxRuntimeManifest(), {}))
    slot = Slot(device)
    random = np.random.default_rng(0)
    for _ in range(3):
        slot.image[:] = random.random(slot.image.shape, np.float32)
        assert device.run(slot.batch) is None
        (right,) = wanted.run(None, {"image": slot.image})
        np.testing.assert_allclose(slot.scores, right, atol=1e-5)
    assert len(copied) == 3, "one copy for each run"
    device.close()


def test_on_the_processor_a_slot_is_bound_once_and_its_memory_is_read_where_it_lies(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []
    bind = ort.IOBinding.bind_input

    def count(self: Any, name: str, *rest: Any) -> None:
        bound.append(name)
        bind(self, name, *rest)

    monkeypatch.setattr(ort.IOBinding, "bind_input", count)
    slot = Slot(engine)
    seen = []
    for value in (0.0, 1.0):
        slot.image[:] = value
        engine.run(slot.batch)
        seen.append(slot.scores.copy())
    assert bound == ["image"]
    assert not np.allclose(seen[0], seen[1])


@pytest.mark.parametrize(
    ("names", "copies"),
    [(["CPUExecutionProvider"], False), (["CUDAExecutionProvider", "CPUExecutionProvider"], True)],
)
def test_only_a_session_on_the_processor_alone_reads_inputs_where_they_lie(names: list[str], copies: bool) -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return names

    assert providers.copies(Session()) is copies
