"""A stand-in that promises what the real one does not have, line by line."""

from __future__ import annotations

from enum import Enum


class TensorIOMode(Enum):
    INPUT = 7
    INOUT = 3


class Logger:
    def __init__(self, level: int) -> None:
        self._level = level


class ICudaEngine:
    def __init__(self) -> None:
        self.num_tensors = 1

    def get_tensor_name(self, number: int) -> str:
        return str(number)

    def get_binding_name(self, index: int) -> str:
        return str(index)

    @property
    def nickname(self) -> str:
        return ""


class Engine:
    pass
