"""What `doctor`'s checks are made of: what is looked at, and what one of them found. Values only; `doctor*.py` has the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from appliance.config import Config

Grade = Literal["good", "note", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """What one check found, what to do if that is not good, and the section of the book that says more."""

    check: str
    grade: Grade
    text: str
    fix: str = ""
    see: str = ""


class Patient(msgspec.Struct, frozen=True):
    """What is looked at: the configuration, and the status document of a running appliance (None: there is none)."""

    config: Config
    config_path: Path | None
    status: dict[str, Any] | None
    workers: list[dict[str, Any]] = []


Check = Callable[[Patient], Iterator[Finding]]
