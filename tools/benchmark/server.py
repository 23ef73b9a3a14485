"""The processes of a run: the appliance under test, the bare echoes, the engine alone. And what else the machine was doing.

Each is started and stopped by a `with`; none outlives it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tools.benchmark.limits import BATCHES, THREADS

ROOT = Path(__file__).resolve().parent.parent.parent
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def machine_cpu_s() -> float:
    """Seconds that all cores have worked since the boot, by the kernel's count; what the hypervisor took counts as work."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and those below it that live; what ended has been counted by nobody but its parent."""
    top = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:2]) for process in (top, *top.children(recursive=True)))


class Noise:
    """What others than this process, its ended children and the processes `pids` use of the machine, in cores."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._begun = time.perf_counter()
        self._machine_s = machine_cpu_s()
        self._ours_s = self._ours()

    def _ours(self) -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + ended.ru_utime + ended.ru_stime + sum(tree_cpu_s(pid) for pid in self._pids)

    def cores(self) -> float:
        """Since this was made."""
        others_s = machine_cpu_s() - self._machine_s - (self._ours() - self._ours_s)
        return max(0.0, others_s) / (time.perf_counter() - self._begun)


def start(*arguments: str, **pipes: Any) -> subprocess.Popen[bytes]:
    """A Python module as a process, from the project's root."""
    return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, **pipes)


def stop(process: subprocess.Popen[bytes], asked: signal.Signals, timeout_s: float) -> None:
    """Ask it to end; make it end."""
    process.send_signal(asked)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Appliance:
    """`appliance serve` on a model repository, for the length of a `with`; with its defaults, but for where it listens."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self.http = self.ipc = self.tcp = ""
        self.ready_s = 0.0

    def __enter__(self) -> Appliance:
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        port = free_port()
        self.http = f"http://127.0.0.1:{port}"
        self.ipc = f"ipc://{self._folder}/infer.ipc"
        self.tcp = f"tcp://127.0.0.1:{free_port()}"
        config = self._folder / "appliance.toml"
        config.write_text(
            f'runtime_dir = "{self._folder}"\n'
            f'[repository]\npath = "{self._models}"\n'
            f"[http]\nport = {port}\n"
            f'[zmq]\nipc = "{self.ipc}"\ntcp = "{self.tcp}"\nevents_tcp = "none"\n'
            '[log]\nlevel = "warning"\n'
        )
        started = time.perf_counter()
        self._process = start("appliance", "serve", "--config", str(config))
        try:
            while not self._ready(port):
                if self._process.poll() is not None:
                    raise RuntimeError(f"the appliance ended with status {self._process.returncode}")
                if time.perf_counter() - started > READY_TIMEOUT_S:
                    raise RuntimeError("the appliance did not become ready")
                time.sleep(0.01)
        except BaseException:
            self.__exit__()
            raise
        self.ready_s = time.perf_counter() - started
        return self

    def _ready(self, port: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/v2/health/ready")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False

    @property
    def pid(self) -> int:
        """The front's; template and workers are below it."""
        assert self._process is not None
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU seconds of all of them."""
        return tree_cpu_s(self.pid)

    def memory_bytes(self) -> tuple[int, int]:
        """RSS and PSS of all of them; PSS counts a page that several share once."""
        front = psutil.Process(self.pid)
        infos = [process.memory_full_info() for process in (front, *front.children(recursive=True))]
        return sum(info.rss for info in infos), sum(info.pss for info in infos)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            stop(self._process, signal.SIGTERM, STOP_TIMEOUT_S)
        shutil.rmtree(self._folder)


class Echo:
    """A bare echo of `limits` for one transport, for the length of a `with`; it answers with `reply_bytes`."""

    def __init__(self, transport: str, reply_bytes: int) -> None:
        self._transport = transport
        self._reply_bytes = reply_bytes
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def __enter__(self) -> Echo:
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        port = free_port()
        if self._transport == "zmq-ipc":
            self.address = f"ipc://{self._folder}/echo.ipc"
            arguments = ["echo-zmq", self.address]
        elif self._transport == "zmq-tcp":
            self.address = f"tcp://127.0.0.1:{port}"
            arguments = ["echo-zmq", self.address]
        else:
            self.address = f"http://127.0.0.1:{port}"
            arguments = ["echo-http", str(port)]
        self._process = start("tools.benchmark.limits", *arguments, str(self._reply_bytes))
        try:
            self._wait(port)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def _wait(self, port: int) -> None:
        begun = time.perf_counter()
        while time.perf_counter() - begun < READY_TIMEOUT_S:
            with contextlib.suppress(OSError):
                if self.address.startswith("ipc://"):
                    if Path(self.address.removeprefix("ipc://")).exists():
                        return
                else:
                    socket.create_connection(("127.0.0.1", port)).close()
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the echo for {self._transport} did not start")

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            stop(self._process, signal.SIGKILL, STOP_TIMEOUT_S)
        shutil.rmtree(self._folder)


class Raw:
    """The engine alone in a process, for the length of a `with`. It sleeps unless it measures."""

    def __init__(self, model_file: Path) -> None:
        self._model_file = model_file
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Raw:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = start("tools.benchmark.limits", "raw", str(self._model_file), **pipes)
        return self

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def measure(self, points: Sequence[tuple[int, int]], seconds: float) -> list[dict[str, Any]]:
        """Each (threads, batch) for so long: `items_s`, `p50_s`."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[*point, seconds] for point in points]).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the engine alone ended; its message is above")
        found: list[dict[str, Any]] = json.loads(line)
        return found

    def sweep(self, seconds: float) -> tuple[tuple[int, int], tuple[int, int]]:
        """Over all threads and batches: the best point at batch 1, and the best of all."""
        found = self.measure([(threads, batch) for threads in THREADS for batch in BATCHES], seconds)
        alone = max((one for one in found if one["batch"] == 1), key=lambda one: one["items_s"])
        best = max(found, key=lambda one: one["items_s"])
        return (alone["threads"], 1), (best["threads"], best["batch"])

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            stop(self._process, signal.SIGKILL, STOP_TIMEOUT_S)
