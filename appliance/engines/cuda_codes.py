"""What CUDA's return codes mean for the process that got one: gone for good, short of memory, or neither.

Numbers only, without CUDA's binding: also for engines that hear of them in a library's words. Driver and runtime API share them.
"""

from __future__ import annotations

OUT_OF_MEMORY = 2

FAULTS = frozenset(
    {
        4,  # deinitialized: the driver is going away
        46,  # device unavailable
        100,  # no device (any more)
        101,  # invalid device: it was there when this began
        201,  # invalid context
        214,  # uncorrectable ECC error
        220,  # uncorrectable NVLink error
        226,  # contained error of the hardware
        700,  # illegal address
        702,  # launch timeout
        709,  # context is destroyed
        710,  # device-side assert
        714,  # hardware stack error
        715,  # illegal instruction
        716,  # misaligned address
        717,  # invalid address space
        718,  # invalid program counter
        719,  # launch failed
        721,  # tensor memory leak
        806,  # MPS: the server does not answer
        810,  # MPS: the server ended this client
        911,  # external device
        999,  # unknown: after it nothing is known to work
    }
)
"""Codes after which nothing runs in this process any more. Source: the descriptions of CUresult in CUDA 13.5, which say of most
of them "any further CUDA work will return the same error ... the process must be terminated and relaunched"; the others name a
device or a context that is gone. 720, which looks like their neighbour, is a launch that was too large.
"""
