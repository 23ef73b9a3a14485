"""Which TensorRT this process uses: `tensorrt` or the `tensorrt_rtx` flavour, loaded once, with its messages collected.

The only place that imports the library; the engine and the builder reach it through `use`. One process uses one flavour for good:
both bring libraries that define the same symbols. TensorRT reports failures as None and a line in its log, so every operation
runs within `Messages.collecting`, and its lines go into the error.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from appliance.engines.base import EngineError, MissingError, OutOfMemoryError

if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt: Any = None

__all__ = ["Messages", "trt", "use"]

MODULES = {
    "tensorrt": (("tensorrt",), ("tensorrt_bindings",)),
    "tensorrt_rtx": (("tensorrt_rtx",), ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")),
}
"""By flavour: what to import, in order of preference; the last of each way is the library, those before it load what it needs."""

KEPT_LINES = 200

NO_ROOM = re.compile(r"OutOfMemory|out of memory|bad_alloc", re.IGNORECASE)
"""How the library says, in the error of an operation, that memory was short: its own error code, CUDA's words, or C++'s."""


def use(flavour: str) -> None:
    """Load that flavour as `trt`. MissingError with the loader's own words if it cannot be had."""
    global trt
    if trt is not None:
        if _flavour(trt) != flavour:
            raise EngineError(f"this process uses {_flavour(trt)} already, and a process has one TensorRT")
        return
    problems = []
    for names in MODULES[flavour]:
        try:
            modules = [importlib.import_module(name) for name in names]
        except (ImportError, OSError) as error:
            problems.append(str(error))
            continue
        trt = modules[-1]
        return
    raise MissingError(f"{flavour} cannot be loaded: {'; '.join(problems)}")


def _flavour(module: ModuleType) -> str:
    return "tensorrt_rtx" if "rtx" in module.__name__ else "tensorrt"


class Messages:
    """What the library says. Made after `use`; `logger` is handed to the library and must outlive what was made with it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.logger = self._make_logger()

    def _make_logger(self) -> trt.ILogger:
        keep = self._keep

        class Logger(trt.ILogger):  # type: ignore[misc]  # untyped where the library is absent
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
                if severity <= trt.ILogger.Severity.INFO:
                    keep(severity.name, msg, error=severity <= trt.ILogger.Severity.ERROR)

        return Logger()

    def _keep(self, severity: str, text: str, *, error: bool) -> None:
        words = " ".join(text.split())
        if len(self.lines) < KEPT_LINES or error:
            self.lines.append(f"{severity}: {words}")
        if error:
            self.errors.append(words)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Forget what was said before; what is said within is in `lines` and, if it was an error, in `errors`."""
        self.lines.clear()
        self.errors.clear()
        yield

    def said(self, otherwise: str) -> str:
        """The errors as one text, or the last line of any kind, or `otherwise`."""
        if self.errors:
            return "; ".join(dict.fromkeys(self.errors))
        return self.lines[-1] if self.lines else otherwise

    def failure(self, text: str) -> EngineError:
        """The exception for that text: OutOfMemoryError if memory is what the library complained of."""
        return OutOfMemoryError(text) if any(NO_ROOM.search(said) for said in self.errors) else EngineError(text)
