"""NVML's calls, each optional: the new one first, the old one where the driver lacks it, and memory of what is not supported.

Turns every failure into a reason; knows no quantity. Used by `nvml.py` and `nvml_events.py`, each on its own thread. NVML must be
initialised in the process that calls it: its state does not survive a fork.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NewType, TypeAlias

Code = NewType("Code", int)

Ways: TypeAlias = tuple[tuple[str, tuple[Any, ...]], ...]
"""A question's alternatives, the newest first: the function's name, and its arguments."""

NOT_SUPPORTED, NO_PERMISSION, NO_DRIVER, TIMEOUT, NO_LIBRARY = Code(3), Code(4), Code(9), Code(10), Code(12)
NO_FUNCTION, LOST, RESET_REQUIRED, MISMATCH, OLD_STRUCT, DEPRECATED = (
    Code(13),
    Code(15),
    Code(16),
    Code(18),
    Code(25),
    Code(26),
)

PERMANENT = frozenset({NOT_SUPPORTED, NO_PERMISSION, NO_FUNCTION, OLD_STRUCT, DEPRECATED})
"""Refusals that will not change soon; asked again only every RETRY_S."""

RETRY_S = 600.0

REASONS = {
    1: "the library is not initialised",
    2: "the driver refused the question",
    NOT_SUPPORTED: "this GPU does not support it",
    NO_PERMISSION: "not permitted",
    6: "the driver does not know it",
    NO_DRIVER: "the NVIDIA driver is not loaded",
    TIMEOUT: "the driver did not answer in time",
    NO_LIBRARY: "there is no NVIDIA library (libnvidia-ml.so.1)",
    NO_FUNCTION: "the driver is too old for it",
    LOST: "the GPU has fallen off the bus",
    RESET_REQUIRED: "the GPU needs a reset",
    MISMATCH: "the NVIDIA driver and its library on disk differ",
    22: "this GPU does not support it",
    OLD_STRUCT: "the driver is too old for it",
    DEPRECATED: "the driver no longer has it",
    999: "the driver failed and did not say why",
}


class RefusedError(Exception):
    """NVML did not answer; `code` is its return value (0: it was not NVML that failed)."""

    def __init__(self, code: int) -> None:
        super().__init__(reason(code))
        self.code = code


def reason(code: int) -> str:
    """A return value in words for people."""
    return REASONS.get(code, f"the driver answered with error {code}")


class Calls:
    """The bound library. `ask` runs the first alternative that this driver has, and remembers which."""

    def __init__(self) -> None:
        self._best: dict[tuple[int, str], int] = {}
        self._refused: dict[tuple[int, str], tuple[int, float]] = {}
        self.api: Any = None

    def open(self) -> None:
        """Load and initialise. RefusedError: no library, no driver, or one that was replaced underneath."""
        import pynvml

        self.api = pynvml
        self.plain(pynvml.nvmlInit)

    def close(self) -> None:
        """Shut down, whatever the driver says to it."""
        if self.api is not None:
            with contextlib.suppress(RefusedError):  # what is lost needs no shutdown
                self.plain(self.api.nvmlShutdown)

    def plain(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """One call. RefusedError on every failure, also on what the binding cannot decode."""
        try:
            return function(*arguments)
        except self.api.NVMLError as error:
            raise RefusedError(int(error.value)) from error
        except (ValueError, UnicodeDecodeError, OverflowError) as error:
            raise RefusedError(0) from error

    def refuses(self, gpu: int, what: str, now_s: float) -> bool:
        """Whether `ask` would say no without asking."""
        refused = self._refused.get((gpu, what))
        return refused is not None and now_s < refused[1]

    def forget(self, gpu: int) -> None:
        """Ask that GPU everything anew: it works in another way now."""
        for key in [key for key in self._refused if key[0] == gpu]:
            del self._refused[key]

    def ask(self, gpu: int, what: str, now_s: float, alternatives: Ways) -> Any:
        """The answer of the first of `alternatives` (function name, arguments) that is not permanently refused."""
        key = (gpu, what)
        refused = self._refused.get(key)
        if refused is not None and now_s < refused[1]:
            raise RefusedError(refused[0])
        code = int(NO_FUNCTION)
        for number in range(self._best.get(key, 0), len(alternatives)):
            name, arguments = alternatives[number]
            function = getattr(self.api, name, None)
            if function is None:
                continue
            try:
                answer = self.plain(function, *arguments)
            except RefusedError as error:
                code = error.code
                if code not in PERMANENT:
                    raise
            else:
                self._best[key] = number
                return answer
        self._refused[key] = (code, now_s + RETRY_S)
        self._best.pop(key, None)
        raise RefusedError(code)
