"""These tests run in a process over the stub driver, started by `tests/engines/test_tensorrt.py`; elsewhere they are not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.core.manifest import OnnxRuntimeManifest
from appliance.engines import registry
from appliance.engines.base import Engine, EngineOptions
from tests.fakes import cuda_stub
from tests.fakes.cuda_stub import Stub

collect_ignore_glob = [] if cuda_stub.active() else ["test_*.py"]

Load = Callable[..., Engine]


@pytest.fixture
def stub() -> Iterator[Stub]:
    """The stub, as new."""
    made = Stub()
    made.reset()
    yield made
    made.reset()


@pytest.fixture
def load(stub: Stub, tmp_path: Path) -> Iterator[Load]:
    """Loads a plan of the fake runtime; what was loaded is closed in the end, and nothing may be left then."""
    loaded: list[Engine] = []

    def make(
        *, device: str = "cuda", max_batch_size: int = 0, parameters: dict[str, str] | None = None, **document: Any
    ) -> Engine:
        file = cuda_stub.plan(tmp_path / f"{len(loaded)}.plan", **document)
        options = EngineOptions("tensorrt", file, device, max_batch_size, 1, OnnxRuntimeManifest(), parameters or {})
        loaded.append(registry.load(options))
        return loaded[-1]

    yield make
    stub.fail("")
    if stub.lost:
        # a worker does not even try
        return
    for engine in loaded:
        engine.close()
    assert stub.leaked() == {}
