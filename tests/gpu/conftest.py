"""The appliance for the tests on a GPU."""

from __future__ import annotations

from tests.e2e.conftest import house

__all__ = ["house"]
