"""A stand-in that is true to the real one."""

from __future__ import annotations

from enum import Enum


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1


class ILogger:
    class Severity(Enum):
        ERROR = 1

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        del severity, msg


class ICudaEngine:
    def __init__(self, anything: int) -> None:
        self.num_io_tensors = anything

    def get_tensor_name(self, index: int) -> str:
        return str(index)

    @property
    def name(self) -> str:
        return ""


class _Own:
    anything = 1
