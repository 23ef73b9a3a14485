"""Fixtures around a real appliance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.house import House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """An appliance that is not started yet."""
    made = House(tmp_path)
    yield made
    made.finish()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A running appliance for the tests of a module, which leave it as they found it."""
    made = House(tmp_path_factory.mktemp("served"))
    made.digits()
    made.loopback("echo", shape="4")
    made.loopback("whip", "[worker]\nrun_budget_ms = 400\n", shape="-1", commands="true")
    made.loopback("frames", "[batching]\nmax_batch_size = 2\n", shape="300000")
    made.loopback("text", datatype="BYTES", shape="2")
    made.start()
    yield made
    made.finish()
