"""The filter: run as the kernel would run it, over every call, for both machines; then for real, in a child."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest

from appliance.host import seccomp


def _judge(program: list[tuple[int, int, int, int]], architecture: int, call: int, argument: int) -> int:
    """What classic BPF makes of a call."""
    accumulator, place = 0, 0
    while True:
        code, if_true, if_false, operand = program[place]
        place += 1
        if code == seccomp.LOAD:
            words = {seccomp.CALL: call, seccomp.ARCHITECTURE: architecture, seccomp.FIRST_ARGUMENT: argument}
            accumulator = words[operand]
        elif code == seccomp.JUMP_EQUAL:
            place += if_true if accumulator == operand else if_false
        elif code == seccomp.JUMP_AT_LEAST:
            place += if_true if accumulator >= operand else if_false
        else:
            assert code == seccomp.RETURN
            return operand


@pytest.mark.parametrize("machine", seccomp.AUDIT_ARCH)
def test_it_refuses_the_calls_of_the_list_and_no_other(machine: str) -> None:
    program = seccomp.program(machine)
    architecture = seccomp.AUDIT_ARCH[machine]
    column = list(seccomp.AUDIT_ARCH).index(machine)
    refused = {pair[column] for pair in seccomp.REFUSED.values()}
    assert len(refused) == len(seccomp.REFUSED)
    for call in range(600):
        verdict = _judge(program, architecture, call, socket.AF_UNIX)
        assert verdict == (seccomp.REFUSE if call in refused else seccomp.ALLOW), call


@pytest.mark.parametrize("machine", seccomp.AUDIT_ARCH)
def test_of_sockets_it_leaves_those_that_do_not_leave_the_machine(machine: str) -> None:
    program = seccomp.program(machine)
    for family in range(64):
        verdict = _judge(program, seccomp.AUDIT_ARCH[machine], seccomp.SOCKET[machine], family)
        assert verdict == (seccomp.ALLOW if family in seccomp.FAMILIES else seccomp.REFUSE), family


@pytest.mark.parametrize("machine", seccomp.AUDIT_ARCH)
def test_calls_by_another_gate_of_the_kernel_are_refused(machine: str) -> None:
    program = seccomp.program(machine)
    assert _judge(program, 0x40000003, 20, 0) == seccomp.REFUSE  # AUDIT_ARCH_I386
    assert _judge(program, seccomp.AUDIT_ARCH[machine], seccomp.X32_CALLS | 39, 0) == seccomp.REFUSE


TRY = """
import ctypes, os, socket
from appliance.host import seccomp
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
seccomp.install()
def outcome(attempt):
    try:
        attempt()
    except OSError as error:
        return str(error.errno)
    return "ok"
print(
    outcome(lambda: socket.socket(socket.AF_INET)),
    outcome(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
    outcome(lambda: socket.socketpair()),
    outcome(lambda: os.execv("/bin/true", ["true"])),
    outcome(lambda: os.posix_spawn("/bin/true", ["true"], {})),
    outcome(lambda: os.waitpid(os.fork() or os._exit(0), 0)),
)
"""


@pytest.mark.skipif(not seccomp.available(), reason="this machine's system calls are not known")
def test_the_kernel_takes_it_and_does_as_it_says() -> None:
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, check=True, env=dict(os.environ))
    no = str(errno.EPERM)
    assert done.stdout.split() == [no, no, "ok", no, no, "ok"]
