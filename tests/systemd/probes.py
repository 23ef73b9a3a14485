"""Runs inside the box, in a unit's sandbox: tries what is asked for and tells what came of it, as one JSON object on stdout.

An outcome is "ok", the name of an errno, the name of the signal that ended the attempt, or what was seen. Each attempt is made in
a child of its own, so that none disturbs another. Standard library only; `test_hardening` says what each outcome must be.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import pwd
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
SECRET = "probe-secret"
SHARED_KEY, LEFT_KEY = 0x70726F62, 0x6C656674
OTHER_UID = 12345
OTHER_ADDRESS = "10.99.0.1"
"""Of the box's own loopback interface, and not in localhost's network."""

SCRATCH = "/dev/shm"
SYSCALLS = {
    "x86_64": {"add_key": 248, "keyctl": 250, "adjtimex": 159},
    "aarch64": {"add_key": 217, "keyctl": 219, "adjtimex": 171},
}


def attempt(result: int) -> str:
    """The outcome of a C call that says -1 for no."""
    return "ok" if result != -1 else errno.errorcode[ctypes.get_errno()]


def syscall(name: str, *arguments: object) -> int:
    number = SYSCALLS[os.uname().machine][name]
    return int(LIBC.syscall(ctypes.c_long(number), *arguments))


def opened(path: str, flags: int = os.O_RDONLY) -> str:
    os.close(os.open(path, flags))
    return "ok"


def seen(path: str) -> str:
    """Whether what lies there is really there: systemd hides it, or puts something empty over it."""
    try:
        return "seen" if Path(path).read_bytes() else "hidden"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            return "hidden"
        raise


def written(folder: str) -> str:
    file = Path(folder) / "probe"
    file.write_text("x")
    file.unlink()
    return "ok"


def mode(path: str) -> str:
    return f"{stat.S_IMODE(Path(path).stat().st_mode):o}"


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def group() -> str:
    import grp

    return grp.getgrgid(os.getgid()).gr_name


def new_files_mode() -> str:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        file = Path(folder) / "new"
        file.write_text("")
        return mode(str(file))


def many_descriptors() -> str:
    for _ in range(2000):
        os.open("/dev/null", os.O_RDONLY)
    return "ok"


def core_files() -> str:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    wanted = 1 << 20 if hard == resource.RLIM_INFINITY else hard + 1
    resource.setrlimit(resource.RLIMIT_CORE, (wanted, max(hard, wanted)))
    return "ok"


def setuid_program() -> str:
    done = subprocess.run(["/usr/local/bin/probe-id", "-u"], capture_output=True, text=True, check=True)
    return "root" if done.stdout.strip() == "0" else "itself"


def set_suid_bit() -> str:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        file = Path(folder) / "suid"
        file.write_text("")
        file.chmod(0o4755)
    return "ok"


def give_away() -> str:
    """A file to another user: needs CAP_CHOWN, and that user to exist in our user namespace."""
    with tempfile.NamedTemporaryFile(dir=SCRATCH) as file:
        os.chown(file.name, OTHER_UID, -1)
    return "ok"


def low_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 80))
    return "ok"


def shared_memory() -> str:
    return attempt(LIBC.shmget(SHARED_KEY, 4096, 0))


def leave_shared_memory() -> str:
    return attempt(LIBC.shmget(LEFT_KEY, 4096, 0o1666))


def mount_something() -> str:
    return attempt(LIBC.mount(b"probe", b"/mnt/probe", b"tmpfs", ctypes.c_ulong(0), None))


def make_control_group() -> str:
    folder = Path("/sys/fs/cgroup/probe")
    folder.mkdir()
    folder.rmdir()
    return "ok"


def read_clock_discipline() -> str:
    """adjtimex(2) without anything to set: everybody may, but for the filter."""
    return attempt(syscall("adjtimex", ctypes.create_string_buffer(512)))


def set_host_name() -> str:
    socket.sethostname(socket.gethostname())
    return "ok"


def init_seen() -> str:
    return "seen" if Path("/proc/1/status").exists() else "hidden"


def personality() -> str:
    return attempt(LIBC.personality(ctypes.c_ulong(0x0040000)))  # ADDR_NO_RANDOMIZE


def realtime() -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "ok"


def new_namespace() -> str:
    return attempt(LIBC.unshare(0x04000000))  # CLONE_NEWUTS


def user_keyring() -> str:
    """Whether the keys of our user are within reach of our session."""
    own, session = syscall("keyctl", 0, -4, 1, 0, 0), syscall("keyctl", 0, -3, 0, 0, 0)
    if own < 0 or session < 0:
        return errno.errorcode[ctypes.get_errno()]
    buffer = (ctypes.c_int32 * 64)()
    length = syscall("keyctl", 11, session, buffer, ctypes.sizeof(buffer), 0)
    return "linked" if own in list(buffer)[: max(length, 0) // 4] else "apart"


def foreign_system_call() -> str:
    """getpid by the 32-bit gate of x86: mov $20, %eax; int $0x80; ret. From a file's page, which no directive forbids to run."""
    code = os.memfd_create("code")
    os.write(code, b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    LIBC.mmap.restype = ctypes.c_void_p
    address = LIBC.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, code, 0)
    return "ok" if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0 else "ENOSYS"


def trace() -> str:
    return attempt(LIBC.ptrace(0, 0, None, None))  # PTRACE_TRACEME


def set_own_uid() -> str:
    os.setuid(os.getuid())
    return "ok"


def raw_packets() -> str:
    socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM).close()
    return "ok"


def internet_socket() -> str:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    return "ok"


def writable_code() -> str:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    return "ok"


def send_to(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.sendto(b"x", (address, 9))
    return "ok"


def network() -> str:
    """The address that the box's loopback interface has beside its own; /proc shows it without a socket."""
    return OTHER_ADDRESS if OTHER_ADDRESS in Path("/proc/net/fib_trie").read_text() else "none"


def status(field: str) -> str:
    """A line of what the kernel says of us."""
    lines = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return lines[field].strip()


PROBES: dict[str, Callable[[], str]] = {
    "user": user,
    "group": group,
    "read what is root's": lambda: opened("/etc/shadow"),
    "mode of new files": new_files_mode,
    "write its state": lambda: written("/var/lib/appliance"),
    "mode of its state": lambda: mode("/var/lib/appliance"),
    "write its cache": lambda: written("/var/cache/appliance"),
    "mode of its cache": lambda: mode("/var/cache/appliance"),
    "write its runtime": lambda: written("/run/appliance"),
    "mode of its runtime": lambda: mode("/run/appliance"),
    "its configuration": lambda: os.environ.get("CONFIGURATION_DIRECTORY", "none"),
    "mode of its configuration": lambda: mode("/etc/appliance"),
    "write its configuration": lambda: written("/etc/appliance"),
    "2000 descriptors": many_descriptors,
    "core files": core_files,
    "unlisted device": lambda: opened("/dev/probe-unlisted"),
    "device node": lambda: "seen" if Path("/dev/probe-unlisted").exists() else "hidden",
    "device nvidia": lambda: opened("/dev/probe-nvidia"),
    "device nvidia-uvm": lambda: opened("/dev/probe-nvidia-uvm"),
    "device drm": lambda: opened("/dev/probe-drm"),
    "device nvhost": lambda: opened("/dev/probe-nvhost"),
    "device nvmap": lambda: opened("/dev/probe-nvmap"),
    "setuid program": setuid_program,
    "set a setuid bit": set_suid_bit,
    "give a file away": give_away,
    "bounding set": lambda: status("CapBnd").lstrip("0") or "empty",
    "low port": low_port,
    "write to /usr": lambda: written("/usr/lib"),
    "write to /etc": lambda: written("/etc"),
    "homes": lambda: seen(f"/home/{SECRET}"),
    "others' temporary files": lambda: seen(f"/tmp/{SECRET}"),
    "others' shared memory": shared_memory,
    "leave shared memory": leave_shared_memory,
    "mount": mount_something,
    "kernel tunables": lambda: opened("/proc/irq/default_smp_affinity", os.O_WRONLY),
    "kernel modules": lambda: seen(f"/usr/lib/modules/{SECRET}"),
    "kernel log": lambda: opened("/dev/kmsg", os.O_WRONLY),
    "control groups": make_control_group,
    "clock": read_clock_discipline,
    "host name": set_host_name,
    "other processes": init_seen,
    "memory of the machine": lambda: seen("/proc/meminfo"),
    "personality": personality,
    "realtime": realtime,
    "namespaces": new_namespace,
    "keyring": user_keyring,
    "foreign system calls": foreign_system_call,
    "trace": trace,
    "give up files": lambda: attempt(
        LIBC.syscall(ctypes.c_long(444), None, 0, 1)
    ),  # landlock_create_ruleset: which release
    "set its own uid": set_own_uid,
    "raw packets": raw_packets,
    "internet socket": internet_socket,
    "writable code": writable_code,
    "send to a site": lambda: send_to(OTHER_ADDRESS),
    "send to localhost": lambda: send_to("127.0.0.1"),
    "network": network,
}


def shared_memory_left() -> str:
    found = LIBC.shmget(LEFT_KEY, 0, 0)
    if found < 0:
        return "gone"
    LIBC.shmctl(found, 0, None)  # IPC_RMID
    return "left"


def mount_left() -> str:
    return "seen" if not LIBC.umount2(b"/mnt/probe", 2) else "apart"


OUTSIDE: dict[str, Callable[[], str]] = {"leave shared memory": shared_memory_left, "mount": mount_left}
"""What is to be seen from outside after such a probe's unit has ended: that is its outcome."""


def tried(probe: Callable[[], str]) -> str:
    """The outcome, from a child."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outcome = probe()
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            # Python's resource module says EPERM in words
            outcome = errno.errorcode[number] if number else "EPERM" if "not allowed" in str(error) else str(error)
        except BaseException as error:
            outcome = repr(error)
        os.write(theirs, outcome.encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as result:
        text = result.read().decode()
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return signal.Signals(-ended).name if ended < 0 else text


def prepare() -> None:
    """As root, outside of any unit: what the probes look for."""
    for folder in ("/home", "/tmp", "/usr/lib/modules"):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / SECRET).write_text("secret")
    Path("/mnt/probe").mkdir(exist_ok=True)
    # groups of drivers that this host does not have: systemd looks names up in this file
    Path("/run/devices").write_text(
        Path("/proc/devices").read_text().split("Block devices:")[0].rstrip()
        + "\n195 nvidia-frontend\n511 nvidia-uvm\n226 drm\n510 nvhost-gpu\n509 nvmap\n\nBlock devices:\n"
    )
    if LIBC.mount(b"/run/devices", b"/proc/devices", None, ctypes.c_ulong(4096), None):
        raise OSError(ctypes.get_errno(), "bind /proc/devices")
    nodes = {"kmsg": (1, 11), "probe-unlisted": (120, 0), "probe-nvidia": (195, 0), "probe-nvidia-uvm": (511, 0)}
    nodes |= {"probe-drm": (226, 128), "probe-nvhost": (510, 0), "probe-nvmap": (509, 0)}
    for name, (major, minor) in nodes.items():
        os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        Path(f"/dev/{name}").chmod(0o666)
    program = Path("/usr/local/bin/probe-id")
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    if LIBC.shmget(SHARED_KEY, 4096, 0o1666) < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        address = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(OTHER_ADDRESS))
        fcntl.ioctl(channel, 0x8916, struct.pack("16s", b"lo:1") + address)  # SIOCSIFADDR


def main() -> None:
    if sys.argv[1:] == ["prepare"]:
        prepare()
        return
    probes = OUTSIDE if sys.argv[1:] == ["outside"] else {name: PROBES[name] for name in sys.argv[1:]}
    sys.stdout.write(json.dumps({name: tried(probe) for name, probe in probes.items()}))


if __name__ == "__main__":
    main()
