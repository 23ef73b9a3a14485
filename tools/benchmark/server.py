"""The appliance under test, as a process tree: start, readiness, CPU time, memory, stop. And what else the machine was doing."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

READY_TIMEOUT_S = 60.0


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def machine_cpu_s() -> float:
    """Seconds that all cores have worked since the boot, by the kernel's count."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


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
        while not self._ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"the appliance ended with status {self._process.returncode}")
            if time.perf_counter() - started > READY_TIMEOUT_S:
                raise RuntimeError("the appliance did not become ready")
            time.sleep(0.01)
        self.ready_s = time.perf_counter() - started
        return self

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
                if address.startswith("ipc://") and Path(address[6:]).exists():
                    return self
            time.sleep(0.02)
        raise RuntimeError(f"{kind} did not start")

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
