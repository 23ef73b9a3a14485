from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.nvml import StubNvml


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubNvml]:
    if reason := StubNvml.missing():
        pytest.skip(reason)
    machine = StubNvml(tmp_path).start()
    machine.install(monkeypatch)
    yield machine
    machine.close()


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Files of a fake /proc and /sys, by path."""

    def make(files: dict[str, object]) -> Path:
        root = tmp_path / "root"
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return root

    return make
