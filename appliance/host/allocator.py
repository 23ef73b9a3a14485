"""The C library's allocator, set for a server that takes and frees large messages all day.

By default glibc returns the memory of every camera frame to the kernel and asks for it again with the next: 300 page faults for
1.2 MB, which on a virtual machine take longer than the inference. `daemon` calls this before there are threads.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
"""mallopt(3)'s numbers, as glibc's malloc.h has them."""

KEPT_BYTES = 64 << 20
"""Free memory at the heap's end that is kept for the next messages."""
HEAP_BELOW_BYTES = 32 << 20
"""Smaller blocks come from the heap; glibc takes no higher limit (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits)."""


def keep_freed_memory() -> bool:
    """Keep freed memory for reuse, in one heap for all threads; False where the C library has no mallopt (musl)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_MMAP_THRESHOLD, HEAP_BELOW_BYTES), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_ARENA_MAX, 1))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]
