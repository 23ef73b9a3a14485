"""A real appliance for tests: the daemon as a process, on a repository and a runtime directory of its own."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
LONG_S = 60.0
"""Nothing here takes a tenth of it; it is there so that a hang becomes a failure."""


class House:
    """One appliance. `start` waits until every model has come up or failed; `stop` and `kill` end it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "run"
        self.models = folder / "models"
        self.home = folder / "home"
        self.config = folder / "appliance.toml"
        for made in (self.models, self.home):
            made.mkdir(parents=True)
        self.settings: dict[str, dict[str, Any]] = {
            "http": {"port": 0},
            "zmq": {"tcp": "tcp://127.0.0.1:*", "events_tcp": "tcp://127.0.0.1:*"},
            "repository": {"path": str(self.models)},
        }
        self.environment: dict[str, str] = {}
        self.command = [sys.executable, "-m", "appliance"]
        self.cwd: Path | None = None
        self.addresses: list[str] = []
        self.log: list[dict[str, Any]] = []
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.process: subprocess.Popen[str] | None = None

    def digits(self, name: str = "digits") -> None:
        """Add the example model."""
        shutil.copytree(ROOT / "models" / "digits", self.models / name)

    def loopback(self, name: str, manifest: str = "", **parameters: str) -> Path:
        """Add a loopback model with these engine parameters and more manifest text."""
        folder = self.models / name
        (folder / "1").mkdir(parents=True, exist_ok=True)
        lines = "\n".join(f'{key} = "{value}"' for key, value in parameters.items())
        (folder / "model.toml").write_text(f'engine = "loopback"\n{manifest}\n[parameters]\n{lines}\n')
        return folder

    def write_config(self) -> None:
        parts = [f'runtime_dir = "{self.runtime}"', "drain_timeout_s = 20"]
        for table, values in self.settings.items():
            parts.append(f"[{table}]")
            parts += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.config.write_text("\n".join(parts) + "\n")

    def spawn(self) -> None:
        self.write_config()
        self._lines = queue.Queue()
        self.process = subprocess.Popen(
            [*self.command, "serve", "--config", str(self.config)],
            cwd=self.cwd,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "HOME": str(self.home),
                "XDG_CACHE_HOME": str(self.home / ".cache"),
                **self.environment,
            },
        )
        threading.Thread(target=self._read, args=(self.process, self._lines), daemon=True).start()

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[dict[str, Any] | None]) -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            for line in stream:
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {"event": "raw", "line": line}
                lines.put(entry)
        lines.put(None)

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next log entry of that event with those fields."""
        while True:
            try:
                entry = self._lines.get(timeout=LONG_S)
            except queue.Empty:
                raise AssertionError(f"no {event} {fields}; the log: {self.log[-20:]}") from None
            if entry is None:
                raise AssertionError(f"the appliance ended before {event}: {self.log[-20:]}")
            self.log.append(entry)
            if entry["event"] == event and all(entry.get(key) == value for key, value in fields.items()):
                return entry

    def start(self) -> House:
        self.spawn()
        self.addresses = self.wait_for("daemon.listening")["addresses"]
        self.wait_for("daemon.ready")
        return self

    @property
    def http(self) -> str:
        return next(address for address in self.addresses if address.startswith("http://"))

    @property
    def ipc(self) -> str:
        return f"ipc://{self.runtime}/infer.ipc"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def wait_for_children(self, wanted: list[psutil.Process]) -> None:
        """Until its processes are these. One that is being forked, or is ending, is given its time."""
        end = time.monotonic() + LONG_S
        while self.children() != wanted:
            assert time.monotonic() < end, f"its processes are {self.children()}, not {wanted}"
            time.sleep(0.02)

    def worker_pids(self, model: str) -> list[int]:
        from appliance.cli.connection import Appliance

        return [
            worker["pid"] for worker in Appliance(self.http).get("/v2/appliance/workers") if worker["model"] == model
        ]

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LONG_S)

    def finish(self) -> None:
        """However the test ended: leave no process behind."""
        if self.process is None:
            return
        if self.process.poll() is None:
            children = self.children()
            self.process.kill()
            self.process.wait(LONG_S)
            psutil.wait_procs(children, timeout=LONG_S)
