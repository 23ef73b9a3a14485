"""Two appliances over fake services, for clients that fail over from one to the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.transports.zmq.conftest import House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path / "a")
    await house.transport.start()
    yield house
    await house.transport.close()


@pytest.fixture
async def second(tmp_path: Path) -> AsyncIterator[House]:
    second = House(tmp_path / "b")
    await second.transport.start()
    yield second
    await second.transport.close()
