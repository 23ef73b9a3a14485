"""Becomes a systemd that believes it is the init of a machine: new namespaces, an overlay of a tree, its own cgroups.

Run as a program by `box`, with one JSON argument; prints the pid of the new init as seen from outside and waits for its end. It
dies with its parent, and its namespaces die with it, so nothing of it outlives the test, however that ends. Nothing inside can
reach the host's kernel settings: /proc/sys is read-only and the capabilities over clock, modules and kernel log are dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000  # mount cgroup uts ipc pid net
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
RECURSIVE, PRIVATE, SHARED, DETACH = 1 << 14, 1 << 18, 1 << 20, 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
DROPPED_CAPABILITIES = (
    16,
    17,
    20,
    25,
    32,
    33,
    34,
    35,
    36,
)  # modules raw-io pacct time mac mac syslog wake-alarm suspend
KEPT_DIRECTORIES = frozenset(
    [
        "bin",
        "boot",
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "opt",
        "proc",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr",
        "var",
    ]
)
MASKED = [
    "systemd-sysctl",
    "systemd-modules-load",
    "systemd-remount-fs",
    "systemd-udevd",
    "systemd-udev-trigger",
    "systemd-logind",
    "modprobe@",
    "systemd-update-utmp",
    "systemd-update-utmp-runlevel",
    "console-getty",
    "kmod-static-nodes",
]
CANNOT = 77


def check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: Path | str, kind: str = "", flags: int = 0, data: str = "") -> None:
    arguments = [text.encode() or None for text in (source, str(target), kind)]
    check(LIBC.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None), f"mount {source} on {target}")


def bind(source: str, target: Path, *, readonly: bool) -> None:
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(source, target, flags=BIND | RECURSIVE)
    if readonly:
        mount("", target, flags=REMOUNT | BIND | RDONLY)


def build_root(spec: dict[str, object], base: Path) -> Path:
    """The file systems of the machine, from an overlay of the tree down to the console."""
    mount("", "/", flags=RECURSIVE | PRIVATE)
    mount("box", base, "tmpfs", data="mode=755")
    kept = Path(str(spec["state"])) if spec["state"] else base
    root, upper, work = base / "root", kept / "upper", kept / "work"
    for made in (root, upper, work):
        made.mkdir(parents=True, exist_ok=True)
    tree = str(spec["tree"])
    mount("overlay", root, "overlay", data=f"lowerdir={tree},upperdir={upper},workdir={work}")
    if tree == "/":
        for entry in root.iterdir():
            if entry.name not in KEPT_DIRECTORIES and entry.is_dir() and not entry.is_symlink():
                mount("hidden", entry, "tmpfs", NOSUID | NODEV, "mode=755")
    for name in ("proc", "sys", "dev", "run", "tmp", "etc"):
        (root / name).mkdir(exist_ok=True)
    mount("proc", root / "proc", "proc", NOSUID | NODEV | NOEXEC)
    for name in ("sys", "sysrq-trigger"):
        if (root / "proc" / name).exists():
            bind(str(root / "proc" / name), root / "proc" / name, readonly=True)
    mount("sysfs", root / "sys", "sysfs", NOSUID | NODEV | NOEXEC | RDONLY)
    mount_cgroups(root / "sys/fs/cgroup", hybrid=bool(spec["hybrid"]))
    make_devices(root)
    for name, mode in (("run", "755"), ("tmp", "1777")):
        mount(name, root / name, "tmpfs", NOSUID | NODEV, f"mode={mode}")
    bind(str(spec["notify"]), root / "run/host/notify", readonly=False)
    for source, target, readonly in spec["binds"]:  # type: ignore[attr-defined]  # JSON: a list of triples
        bind(source, root / target.lstrip("/"), readonly=readonly)
    clean_settings(root)
    return root


def mount_cgroups(at: Path, *, hybrid: bool) -> None:
    if not hybrid:
        mount("cgroup2", at, "cgroup2", NOSUID | NODEV | NOEXEC)
        return
    mount("tmpfs", at, "tmpfs", NOSUID | NODEV | NOEXEC, "mode=755")
    for name, kind, data in (
        ("unified", "cgroup2", ""),
        ("systemd", "cgroup", "none,name=systemd"),
        ("memory", "cgroup", "memory"),
        ("pids", "cgroup", "pids"),
    ):
        (at / name).mkdir()
        mount("cgroup", at / name, kind, NOSUID | NODEV | NOEXEC, data)


def make_devices(root: Path) -> None:
    dev = root / "dev"
    mount("dev", dev, "tmpfs", NOSUID, "mode=755")
    for name in ["null", "zero", "full", "random", "urandom", "tty"]:
        bind(f"/dev/{name}", dev / name, readonly=False)
    for name in ("pts", "shm"):
        (dev / name).mkdir()
    mount("devpts", dev / "pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5")
    mount("shm", dev / "shm", "tmpfs", NOSUID | NODEV, "mode=1777")
    links = (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"))
    for name, to in links:
        (dev / name).symlink_to(to)
    (dev / "console").touch()
    bind("/dev/null", dev / "console", readonly=False)


def clean_settings(root: Path) -> None:
    """A machine of its own name, on which only what the test enables is started. Once: a second boot finds it so."""
    done = root / "etc/.box"
    if done.exists():
        return
    done.touch()
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    for wants in [*units.glob("*.wants"), *units.glob("*.requires")]:
        for link in wants.iterdir():
            link.unlink()
    for name in MASKED:
        with contextlib.suppress(FileExistsError):
            (units / f"{name}.service").symlink_to("/dev/null")
    with contextlib.suppress(FileNotFoundError):
        (root / "usr/sbin/policy-rc.d").unlink()
    for name, text in (("machine-id", os.urandom(16).hex() + "\n"), ("fstab", ""), ("hostname", "box\n")):
        with contextlib.suppress(FileNotFoundError):
            (root / "etc" / name).unlink()
        (root / "etc" / name).write_text(text)


def become_init(spec: dict[str, object]) -> None:
    socket.sethostname("box")
    root = build_root(spec, Path(str(spec["scratch"])) / "fs")
    old = root / "run/old"
    old.mkdir()
    os.chdir(root)
    check(LIBC.syscall(PIVOT_ROOT[os.uname().machine], b".", b"run/old"), "pivot_root")
    check(LIBC.umount2(b"/run/old", DETACH), "umount")
    os.chdir("/")
    mount("", "/", flags=RECURSIVE | SHARED)
    for capability in DROPPED_CAPABILITIES:
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, 256)
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o022)
    command = ["/lib/systemd/systemd", "--system", "--unit=multi-user.target", "--show-status=no"]
    os.execve(
        command[0],
        command,
        {"container": "box", "PATH": "/usr/sbin:/usr/bin", "NOTIFY_SOCKET": "/run/host/notify/socket"},
    )


def main() -> int:
    spec = json.loads(sys.argv[1])
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    try:
        for leaf in spec["cgroups"]:
            (Path(leaf) / "cgroup.procs").write_text("0")
        check(LIBC.unshare(NEW_NAMESPACES), "unshare")
    except OSError as error:
        sys.stderr.write(f"box: {error}\n")
        return CANNOT
    pid = os.fork()
    if pid == 0:
        try:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            become_init(spec)
        except BaseException as error:  # a process boundary: it ends here, and says why
            sys.stderr.write(f"box: {error}\n")
            sys.stderr.flush()
        os._exit(1)
    sys.stdout.write(f"{pid}\n")
    sys.stdout.flush()
    os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
