"""What workers and build processes give up before they touch a model: files that are not theirs, the network, other programs.

A model file, and the library that runs it, come from somebody else. Whatever goes wrong in there can reach neither the network
nor the appliance's secrets, engines, front or other workers, though all of them run as one user in one unit: no namespace, no
privilege, only what a process may do to itself. Where the kernel offers less, less is given up, and `limits` says what stays.
Driven by `template` in each child and by `job`; which folders a build writes to is known there.

Left alone on purpose: `dumpable` (as a stranger to its own /proc/self CUDA cannot name its threads, nor the front measure it) and
the size of files (the kernel counts shared memory as such).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.host import landlock, seccomp

PR_SET_NO_NEW_PRIVS = 38

DEVICES = (Path("/dev"), Path("/proc/self"))
"""Opened for writing, nothing made in them: GPUs, /dev/null, the names of threads."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  the name it has
"""Where shm_open(3) makes its files. A process that is given no folder to write to has its temporary files there, too."""

DRIVER = Path("/proc/driver/nvidia")
"""There where NVIDIA's kernel module is loaded."""

MPS = "/tmp/nvidia-mps"  # noqa: S108  the name it has
"""Where NVIDIA's daemon lies if nobody says otherwise."""


_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox as one process will have it. `landlock`: the kernel's release; 0 goes without."""

    landlock: int
    seccomp: bool
    hidden: tuple[Path, ...] = ()

    @classmethod
    def of_this_kernel(cls) -> Sandbox:
        """All that can be had here, hiding what systemd gave to the front alone: credentials, and the configuration."""
        found = landlock.release()
        given = (os.environ.get(name, "") for name in ("CREDENTIALS_DIRECTORY", "CONFIGURATION_DIRECTORY"))
        hidden = tuple(Path(path) for text in given for path in text.split(":") if path)
        return cls(found if found >= landlock.OLDEST else 0, seccomp.available(), hidden)

    @property
    def limits(self) -> list[str]:
        """What this kernel cannot do, for people; empty if it can all."""
        found = []
        if not self.landlock:
            found.append(
                "files stay writable: the kernel has no Landlock, or an old one (Linux 5.19 with lsm=…,landlock)"
            )
        elif self.landlock < landlock.WITH_SCOPES:
            found.append("signals can be sent to other processes of its user: that needs Linux 6.12")
        if not self.seccomp:
            found.append("the network stays open: system calls cannot be filtered here")
        return found

    @property
    def description(self) -> str:
        """What is in force, in a few words."""
        parts = [f"Landlock {self.landlock}"] * bool(self.landlock) + ["seccomp"] * self.seccomp
        return " and ".join(parts) or "none"

    def enter(self, *writable: Path) -> None:
        """Give it up, in this process and for good; only beneath `writable` files can be made and changed.

        To be called with one thread. OSError: the kernel refused what it said it can.
        """
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if _LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError("the kernel does not know PR_SET_NO_NEW_PRIVS")
        if self.landlock:
            rules = dict.fromkeys(DEVICES, landlock.WRITE_FILE | landlock.TRUNCATE)
            rules |= dict.fromkeys((SHARED_MEMORY, *driver_folders(), *writable), landlock.CHANGE)
            handled = landlock.CHANGE
            if self.hidden:
                handled |= landlock.READ
                for path in landlock.all_but(self.hidden):
                    rules[path] = rules.get(path, 0) | landlock.READ
            landlock.restrict(rules, handled=handled, known=self.landlock)
            if not writable:
                os.environ["TMPDIR"] = tempfile.tempdir = str(SHARED_MEMORY)
        if self.seccomp:
            seccomp.install()


def make_nodes(driver: Path = DRIVER, node: Path = Path("/dev/nvidia-uvm")) -> None:
    """Have the device nodes of an NVIDIA GPU made. CUDA does that by a setuid program of the driver's; afterwards it cannot.

    Under systemd appliance-gpu.service has done it, and nothing happens.
    """
    program = shutil.which("nvidia-modprobe")
    if driver.exists() and not node.exists() and program is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run([program, "-c", "0", "-u"], capture_output=True, timeout=10, check=False)  # noqa: S603  the driver's


def driver_folders(driver: Path = DRIVER) -> Sequence[Path]:
    """Where NVIDIA's driver writes: compiled kernels (made here, since afterwards it may not), and the pipes of MPS."""
    if not driver.exists():
        return ()
    found = [Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", MPS))]
    home = os.environ.get("HOME")
    cache = os.environ.get("CUDA_CACHE_PATH") or (home and f"{home}/.nv/ComputeCache")
    if cache:
        with contextlib.suppress(OSError):
            Path(cache).mkdir(mode=0o700, parents=True, exist_ok=True)
        found.append(Path(cache))
    return found
