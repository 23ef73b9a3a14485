"""The appliance under test, as a process tree: start, readiness, CPU time, memory, stop. And what else the machine was doing."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

READY_TIMEOUT_S = 60.0
QUIET_SAMPLE_S = 0.25


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def machine_cpu_s() -> float:
    """Seconds that all cores have worked since the boot, by the kernel's count; what a hypervisor took away counts too."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Watch:
    """What others did with the machine since this was made: all that it worked, less this process and its ended children."""

    def __init__(self) -> None:
        self._machine = machine_cpu_s()
        self._own = sum(os.times()[:4])
        self._begun = time.perf_counter()

    def others_cores(self, server_cpu_s: float = 0.0) -> float:
        """Cores in use by others on average; `server_cpu_s` is what a child that still runs has used meanwhile."""
        own = sum(os.times()[:4]) - self._own + server_cpu_s
        return max(0.0, machine_cpu_s() - self._machine - own) / (time.perf_counter() - self._begun)


def await_quiet(limit_s: float, cores: float) -> None:
    """Wait until others use fewer than `cores`, but not longer than `limit_s`: a measurement beside others is of them as well."""
    until = time.perf_counter() + limit_s
    while time.perf_counter() < until:
        watch = Watch()
        time.sleep(QUIET_SAMPLE_S)
        if watch.others_cores() < cores:
            return


class Appliance:
    """`appliance serve` on a model repository, for the length of a `with`."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.http = f"http://127.0.0.1:{free_port()}"
        self.ipc = f"ipc://{self._folder}/infer.ipc"
        self.tcp = f"tcp://127.0.0.1:{free_port()}"
        self.ready_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Appliance:
        config = self._folder / "appliance.toml"
        config.write_text(
            f'runtime_dir = "{self._folder}"\n'
            f'[repository]\npath = "{self._models}"\n'
            f"[http]\nport = {self.http.rpartition(':')[2]}\n"
            f'[zmq]\nipc = "{self.ipc}"\ntcp = "{self.tcp}"\nevents_tcp = "none"\n'
            '[log]\nlevel = "warning"\n'
        )
        started = time.perf_counter()
        self._process = subprocess.Popen([sys.executable, "-m", "appliance", "serve", "--config", str(config)])
        try:
            self._await_ready(started)
        except BaseException:
            self.__exit__()
            raise
        self.ready_s = time.perf_counter() - started
        return self

    def _await_ready(self, started: float) -> None:
        assert self._process is not None
        while not self._ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"the appliance ended with status {self._process.returncode}")
            if time.perf_counter() - started > READY_TIMEOUT_S:
                raise RuntimeError("the appliance did not become ready")
            time.sleep(0.01)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self.http.removeprefix("http://"), timeout=2)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/v2/health/ready")
                return connection.getresponse().status == 200
            except OSError:
                return False

    @property
    def processes(self) -> list[psutil.Process]:
        """Front, template, workers."""
        assert self._process is not None
        front = psutil.Process(self._process.pid)
        return [front, *front.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU seconds of the whole tree."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def memory_bytes(self) -> tuple[int, int]:
        """RSS and PSS of the whole tree; PSS counts pages that several share once."""
        infos = [process.memory_full_info() for process in self.processes]
        return sum(info.rss for info in infos), sum(info.pss for info in infos)

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Echo:
    """A bare echo of `tools.benchmark.limits`, for the length of a `with`."""

    def __init__(self, kind: str, address: str, reply_bytes: int) -> None:
        self._arguments = [kind, address, str(reply_bytes)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Echo:
        self._process = subprocess.Popen([sys.executable, "-m", "tools.benchmark.limits", *self._arguments])
        kind, address, _ = self._arguments
        begun = time.perf_counter()
        while time.perf_counter() - begun < READY_TIMEOUT_S:
            with contextlib.suppress(OSError):
                if kind == "echo-http":
                    socket.create_connection(("127.0.0.1", int(address))).close()
                    return self
                if address.startswith("tcp://"):
                    socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))).close()
                    return self
                if address.startswith("ipc://") and Path(address[6:]).exists():
                    return self
            time.sleep(0.02)
        self.__exit__()
        raise RuntimeError(f"{kind} did not start")

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
