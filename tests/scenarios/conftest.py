"""`pytest tests/scenarios --rewrite-scenarios` writes the transcripts anew; review the difference before you commit it."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-scenarios", action="store_true", help="write the scenarios' transcripts anew")
