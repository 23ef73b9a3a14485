"""A machine for a test: a real systemd as PID 1 of namespaces (`boot`), with the appliance installed as its package would.

`start` takes about a second and `stop` is a power cut. Skips, with the exact reason, where the host cannot: no root, no
cgroup2, no systemd or dbus, no namespaces. Boxes share nothing but the kernel and its processors: several run at once, from one
process or from many, and every wait for one has an end that says what was waited for.

APPLIANCE_TEST_TREE names another distribution's root, whose systemd is booted instead of this machine's own, with this machine's
Python in it. `.ci/run` makes one of Debian 13 (systemd 257) where it can; by hand, as root:

    mmdebstrap --variant=minbase --include=systemd,systemd-sysv,dbus,libnss-systemd,polkitd trixie /srv/trixie
    APPLIANCE_TEST_TREE=/srv/trixie .venv/bin/python -m pytest -m slow tests/systemd
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LONG_S = 60.0
SHORT_S = 20.0
PREFIX = "appliance-box-"
"""Of a box's scratch folder and control group, before the pid of whoever made it."""

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}
TREE = os.environ.get("APPLIANCE_TEST_TREE", "/")
"""The root that is booted: the host's own, or that of another distribution."""

INSTALL = """set -e
if [ -d /usr/lib/appliance-python/lib ]; then
    echo /usr/lib/appliance-python/lib > /etc/ld.so.conf.d/000-appliance.conf
    ldconfig
fi
cd /mnt/systemd
install -m 644 appliance.service appliance.socket appliance-gpu.service appliance-recovery.service /etc/systemd/system/
install -D -m 644 appliance.sysusers /usr/lib/sysusers.d/appliance.conf
install -D -m 644 appliance.tmpfiles /usr/lib/tmpfiles.d/appliance.conf
install -D -m 644 appliance.catalog /usr/lib/systemd/catalog/appliance.catalog
install -D -m 644 appliance.rules /usr/share/polkit-1/rules.d/50-appliance.rules
systemd-sysusers appliance.conf
mkdir -p /etc/appliance
[ -e /etc/appliance/appliance.toml ] || : > /etc/appliance/appliance.toml
systemd-tmpfiles --create appliance.conf
journalctl --update-catalog
systemctl daemon-reload
"""


def why_not() -> str:
    """Why no box can be had here; empty if one can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces and cgroups"
    for path in (f"{TREE}/lib/systemd/systemd", f"{TREE}/usr/bin/dbus-daemon", "/usr/bin/nsenter"):
        if not Path(path).exists():
            return f"needs {path}"
    if sys.base_prefix == "/usr" and not Path(TREE, own_python()).exists():
        return f"needs {TREE}/{own_python()}: this machine's Python is its distribution's, and the tree has another"
    own = dict(_cgroups()).get("")
    if own is None:
        return "no cgroup2 hierarchy is mounted here"
    if not os.access(own, os.W_OK):
        return f"{own} cannot be written to: cgroup2 is mounted read-only, as in a container without privileges"
    return ""


def own_python() -> str:
    """A distribution's interpreter of our version, below its root."""
    return f"usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"


def why_no_memory_limits() -> str:
    """Why `Box(memory=True)` cannot be had where a box can; empty if it can."""
    hierarchies = dict(_cgroups())
    if "memory" in hierarchies:
        return ""
    own = Path(hierarchies[""])
    if "memory" not in _words(own / "cgroup.controllers"):
        return f"this host's memory controller is neither mounted as v1 nor among those of cgroup2 in {own}"
    with memory_parent(own) as parent:
        return "" if parent else f"{own} has processes and no group above it hands the memory controller down"


@contextlib.contextmanager
def memory_parent(own: Path) -> Iterator[Path | None]:
    """The cgroup2 directory, from `own` upwards, whose new children have the memory controller; None if there is none.

    Enables it in `own` and takes it back at the end where no group above hands it down. The kernel refuses that to a group with
    processes unless it is the root.
    """
    above = own
    while (above / "cgroup.subtree_control").exists():
        if "memory" in _words(above / "cgroup.subtree_control"):
            yield above
            return
        above = above.parent
    try:
        (own / "cgroup.subtree_control").write_text("+memory")
    except OSError:
        yield None
        return
    try:
        yield own
    finally:
        # busy: another box has come to use it meanwhile
        with contextlib.suppress(OSError):
            (own / "cgroup.subtree_control").write_text("-memory")


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


class Box:
    """One machine. `state`: a folder that keeps its disk between boots. `memory`: its units can be given memory limits."""

    def __init__(self, *, state: Path | None = None, memory: bool = False) -> None:
        self.pid = 0
        self._state = state
        self._memory = memory
        self._handed_down = contextlib.ExitStack()
        _sweep()
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._process: subprocess.Popen[str] | None = None
        self._notify: socket.socket | None = None
        self._leaves: list[Path] = []

    def start(self) -> Box:
        """Boot, and install the appliance."""
        for name in ("fs", "notify"):
            (self._scratch / name).mkdir(exist_ok=True)
        hierarchies = dict(_cgroups())
        # where the host's memory controller is v1, the machine has both kinds, as the host does
        hybrid = self._memory and "memory" in hierarchies
        wanted = {"": True, "memory": hybrid, "pids": hybrid, "name=systemd": hybrid}
        if self._memory and not hybrid:
            found = self._handed_down.enter_context(memory_parent(Path(hierarchies[""])))
            assert found is not None, why_no_memory_limits()
            hierarchies[""] = str(found)
        for kind, parent in hierarchies.items():
            if wanted.get(kind):
                leaf = Path(parent) / self._scratch.name
                leaf.mkdir()
                self._leaves.append(leaf)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        (self._scratch / "notify/socket").unlink(missing_ok=True)
        self._notify.bind(str(self._scratch / "notify/socket"))
        ready: queue.Queue[bool] = queue.Queue()
        threading.Thread(target=_drain, args=(self._notify, ready), daemon=True).start()
        spec = {
            "tree": TREE,
            "state": str(self._state) if self._state else "",
            "hybrid": hybrid,
            "scratch": str(self._scratch),
            "notify": str(self._scratch / "notify"),
            "cgroups": [str(leaf) for leaf in self._leaves],
            "binds": self._binds(),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "boot.py"), json.dumps(spec)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], LONG_S)[0]:
            raise AssertionError(f"the host gave the box no namespaces within {LONG_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            pytest.skip(f"this host gives no namespaces (boot ended with {self._process.wait()})")
        self.pid = int(line)
        try:
            ready.get(timeout=LONG_S)
        except queue.Empty:
            jobs = self.run("systemctl", "list-jobs", "--no-pager", check=False).stdout
            raise AssertionError(f"the box was not up within {LONG_S:g} s; it waits for: {jobs}") from None
        self._install()
        return self

    def _install(self) -> None:
        """What the package's scripts would do, for the sources that `_binds` brought."""
        self.run("sh", "-c", INSTALL)

    def _binds(self) -> list[tuple[str, str, bool]]:
        """What the package would bring: an interpreter, its libraries, our code, below /usr/lib."""
        venv = self._scratch / "venv"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = venv / "lib" / version / "site-packages"
        if not venv.exists():
            packages.mkdir(parents=True)
            (venv / "bin").mkdir()
            (venv / "libexec").mkdir()
            base = "/usr" if sys.base_prefix == "/usr" else "/usr/lib/appliance-python"
            (venv / "pyvenv.cfg").write_text(f"home = {base}/bin\ninclude-system-site-packages = false\n")
            (venv / "bin/python").symlink_to(f"{base}/bin/{version}")
            (packages / "appliance.pth").write_text("/usr/lib/appliance-source\n/usr/lib/appliance-packages\n")
            command = venv / "bin/appliance"
            command.write_text("#!/usr/lib/appliance/bin/python\nfrom appliance.cli.main import main\nmain()\n")
            command.chmod(0o755)
            for program in ("wait-for-gpu", "take-back-release"):
                shutil.copy(ROOT / "systemd" / program, venv / "libexec")
            self._scratch.chmod(0o755)
        import zmq

        binds = [
            (str(venv), "/usr/lib/appliance", True),
            (str(ROOT / "appliance"), "/usr/lib/appliance-source/appliance", True),
            (str(Path(zmq.__file__).parents[1]), "/usr/lib/appliance-packages", True),
            (str(ROOT / "systemd"), "/mnt/systemd", True),
            (str(ROOT / "models"), "/mnt/models", True),
            (str(HERE), "/mnt/tests", True),
        ]
        if sys.base_prefix != "/usr":
            binds.append((sys.base_prefix, "/usr/lib/appliance-python", True))
        return binds

    def stop(self) -> None:
        """Cut the power, and take everything away but the disk in `state`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None
            deadline = time.monotonic() + LONG_S
            while Path(f"/proc/{self.pid}/root/etc").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        for leaf in self._leaves:
            _remove_cgroup(leaf)
        self._leaves.clear()
        self._handed_down.close()
        if self._notify is not None:
            # a close alone does not end the thread that waits in recv
            with contextlib.suppress(OSError):
                self._notify.shutdown(socket.SHUT_RDWR)
            self._notify.close()
            self._notify = None

    def remove(self) -> None:
        """Stop for good."""
        self.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def command(self, *command: str) -> list[str]:
        """The command line that runs something as root inside."""
        return [
            "nsenter",
            f"--target={self.pid}",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--cgroup",
            "--net",
            "--",
            *command,
        ]

    def run(
        self, *command: str, check: bool = True, stdin: str = "", timeout: float = LONG_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside; its output is part of the failure.

        Into files, not pipes: what the command leaves running inside would hold a pipe open, and us with it.
        """
        done = self._ended(command, stdin, timeout)
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}\n{self.log()}")
        return done

    def _ended(self, command: tuple[str, ...], stdin: str, timeout: float) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            line = self.command(*command)
            try:
                ended = subprocess.run(
                    line, env=ENVIRONMENT, input=stdin, stdout=out, stderr=err, text=True, timeout=timeout, check=False
                )
            except subprocess.TimeoutExpired as error:
                out.seek(0)
                said = out.read()[-2000:]
                raise AssertionError(
                    f"{command} did not end within {timeout:g} s: {said}\n{self._what_runs()}"
                ) from error
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, ended.returncode, out.read(), err.read())

    def _what_runs(self) -> str:
        """What runs, what systemd waits for, and what was said: why something hangs."""
        found = []
        for line in (
            ("ps", "-eo", "pid,ppid,stat,wchan:24,etimes,args"),
            ("systemctl", "list-jobs", "--no-pager"),
            ("systemctl", "status", "--no-pager", "--lines=0", "appliance.service"),
            ("journalctl", "--no-pager", "-n", "120", "-o", "short-monotonic"),
        ):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                asked = subprocess.run(
                    self.command(*line), env=ENVIRONMENT, capture_output=True, text=True, timeout=SHORT_S, check=False
                )
                found.append(asked.stdout + asked.stderr)
        return "\n".join(found)

    def log(self) -> str:
        """The end of the journal of the service."""
        line = ("journalctl", "--no-pager", "-n", "40", "-o", "short-monotonic", "-u", "appliance.service")
        return self._ended(line, "", LONG_S).stdout

    def write(self, path: str, text: str) -> None:
        """A file inside, and the folders above it."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$0")" && cat > "$0"', path, stdin=text)

    def python(self, code: str, *arguments: str, check: bool = True) -> str:
        """Run Python with the appliance's packages inside; what it printed."""
        return self.run("/usr/lib/appliance/bin/python", "-c", code, *arguments, check=check).stdout

    def show(self, name: str, unit: str = "appliance.service") -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def wait_until(self, name: str, wanted: str, unit: str = "appliance.service", limit_s: float = LONG_S) -> None:
        """Until a property of a unit has this value."""
        deadline = time.monotonic() + limit_s
        while (found := self.show(name, unit)) != wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} is {found!r}, not {wanted!r}, after {limit_s:g} s\n{self.log()}")
            time.sleep(0.02)

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Entries of the journal."""
        self.run("journalctl", "--sync")
        text = self.run("journalctl", "--no-pager", "-o", "json", *matches, check=False).stdout
        return [json.loads(line) for line in text.splitlines()]

    # --- the appliance ---

    def loopback(self, name: str, manifest: str = "", **parameters: str) -> None:
        """A model of the engine that obeys."""
        lines = "\n".join(f'{key} = "{value}"' for key, value in parameters.items())
        folder = f"/var/lib/appliance/models/{name}"
        self.write(f"{folder}/model.toml", f'engine = "loopback"\n{manifest}\n[parameters]\n{lines}\n')
        self.run("mkdir", "-p", f"{folder}/1")
        self.run("chmod", "-R", "a+rX", folder)

    def configure(self, text: str) -> None:
        """Replace appliance.toml."""
        self.write("/etc/appliance/appliance.toml", text)

    def dropin(self, text: str, unit: str = "appliance.service") -> None:
        """A drop-in of the site."""
        self.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
        self.run("systemctl", "daemon-reload")

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Our own command inside, as root."""
        return self.run("/usr/lib/appliance/bin/appliance", *arguments, check=check)

    def start_load(self, kind: str, clients: int = 4, model: str = "echo") -> subprocess.Popen[str]:
        """Clients that ask one request after another until `end_load`."""
        return subprocess.Popen(
            self.command("/usr/lib/appliance/bin/python", "/mnt/tests/load.py", kind, str(clients), model),
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end_load(self, load: subprocess.Popen[str]) -> dict[str, Any]:
        """What the clients met: {"requests", "failed", "worst_ms", "errors"}."""
        result: dict[str, Any] = json.loads(load.communicate(timeout=LONG_S)[0])
        return result


def _drain(notify: socket.socket, ready: queue.Queue[bool]) -> None:
    """To the end: with a full queue, PID 1 would wait in sendmsg, and everything with it."""
    with contextlib.suppress(OSError):
        while data := notify.recv(8192):
            if b"READY=1" in data.split(b"\n"):
                ready.put(True)


def _sweep() -> None:
    """Take away what boxes of processes that were killed left behind: empty folders and control groups."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            for _, parent in _cgroups():
                for above in (Path(parent), *Path(parent).parents):
                    _remove_cgroup(above / folder.name)
            shutil.rmtree(folder, ignore_errors=True)


def _cgroups() -> list[tuple[str, str]]:
    """(controllers, our directory) of every hierarchy; "" is cgroup2."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        own[names] = path.lstrip("/")
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        kind, _, options = right.split(" ")[:3]
        point = left.split()[4]
        if kind == "cgroup2" and "" in own:
            found[""] = str(Path(point) / own[""])
        elif kind == "cgroup":
            for name in own:
                if name and name in options.split(","):
                    found[name] = str(Path(point) / own[name])
    return list(found.items())


def _remove_cgroup(leaf: Path) -> None:
    deadline = time.monotonic() + 10
    while leaf.exists() and time.monotonic() < deadline:
        for directory, _, _ in os.walk(leaf, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
        time.sleep(0.01)
