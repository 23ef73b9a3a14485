"""Shared memory between front and worker: a sealed memfd, mapped by both, that nobody can shrink, grow or name.

The front creates it and passes the descriptor; so nothing is left behind when both are gone, and no peer can make the other
die of SIGBUS by truncating it. It holds bytes only; what they mean is `core.assembly`'s business.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, nbytes: int) -> int:
    """The descriptor of a new sealed memory of that size, zeroed. The caller closes it. OSError: no memory."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, max(nbytes, 1))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Mapping:
    """A mapped memory: `view` over its bytes, and the `address` they start at. `close` before the last view is gone is safe."""

    def __init__(self, descriptor: int, *, name: str = "memory") -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError(f"{name} is not sealed: whoever holds it could shrink it under us")
        self.nbytes = os.fstat(descriptor).st_size
        self._map = mmap.mmap(descriptor, self.nbytes)
        self.view = memoryview(self._map)
        pointer: Any = np.frombuffer(self._map, np.uint8)
        self.address: int = pointer.__array_interface__["data"][0]

    def slice(self, offset: int, nbytes: int) -> memoryview:
        """A view on that range; ValueError if it leaves the memory (the other side is not trusted with our bounds)."""
        if offset < 0 or nbytes < 0 or offset > self.nbytes or nbytes > self.nbytes - offset:
            raise ValueError(f"range {offset}+{nbytes} leaves the memory of {self.nbytes} bytes")
        return self.view[offset : offset + nbytes]

    def close(self) -> None:
        """Unmap, or leave that to the last view."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            return  # somebody still looks at it; the mapping goes with the last view
