"""A filter of system calls (seccomp(2)) that takes away the network, other programs and the kernel's larger doors.

A deny list, since libraries of a GPU's maker do what they like: those calls answer EPERM, all else is as before. No library:
the filter is thirty instructions, and libseccomp's binding for Python rests since 2021. Who gets it is not known here.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import struct

PR_GET_SECCOMP, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 21, 22, 2
INSTRUCTION_BYTES = 8
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_CALLS = 0x40000000
"""x86-64 has every call a second time, with this bit."""

ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
"""BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_JMP|BPF_JGE|BPF_K, BPF_RET|BPF_K."""

CALL, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in struct seccomp_data; of an argument the lower half, on a little-endian machine."""

FAMILIES = (socket.AF_UNIX, socket.AF_NETLINK)
"""Sockets that are left: netlink only tells of the machine, and drivers ask it."""

SOCKET = {"x86_64": 41, "aarch64": 198}
REFUSED = {
    # name: x86_64, aarch64
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
}


_LIBC = ctypes.CDLL(None, use_errno=True)


def available() -> bool:
    """Whether this machine's calls are known here, and its kernel has filters (PR_GET_SECCOMP answers)."""
    machine = os.uname().machine
    # packed now: the template asks, and each of its children would have to pack it anew
    return machine in AUDIT_ARCH and _LIBC.prctl(PR_GET_SECCOMP, 0, 0, 0, 0) >= 0 and bool(_packed(machine))


def program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter for a machine, as (code, jump if true, jump if false, operand)."""
    numbers = [pair[list(AUDIT_ARCH).index(machine)] for pair in REFUSED.values()]
    # counted from the end: ... | socket's family | allow | refuse
    tail = [
        (LOAD, 0, 0, FIRST_ARGUMENT),
        *((JUMP_EQUAL, len(FAMILIES) - index, 0, family) for index, family in enumerate(FAMILIES)),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    tests = [*((JUMP_EQUAL, number) for number in numbers), (JUMP_AT_LEAST, X32_CALLS)]
    refuse_after = len(FAMILIES) + 1
    body = []
    for index, (code, operand) in enumerate(tests):
        rest = len(tests) - index - 1
        # over the other tests, the one of socket, and what follows it
        body.append((code, rest + 1 + refuse_after, 0, operand))
    body.append((JUMP_EQUAL, 0, refuse_after + 1, SOCKET[machine]))
    whole = [*body, *tail]
    head = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 0, len(whole) - 1, AUDIT_ARCH[machine]),
        (LOAD, 0, 0, CALL),
    ]
    return head + whole


@functools.cache
def _packed(machine: str) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program(machine))


def install() -> None:
    """Put it over the calling thread and all that it starts. It must have no new privileges. OSError: not put."""
    code = _packed(os.uname().machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("@HP", len(code) // INSTRUCTION_BYTES, ctypes.addressof(buffer))
    if _LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
