"""A private appliance that serves one model with settings on trial: real front, template and workers, on sockets of its own.

What it serves is the model's own files with the model.toml that would be written, and engines from the box's own store; so
what is measured is what will serve. It knows nothing of choosing: `tune` drives it.
"""

from __future__ import annotations

import ctypes
import os
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

import msgspec

from appliance.cli.connection import Appliance, model_path
from appliance.cli.load import LoadError, Plan, generate
from appliance.cli.output import CommandError
from appliance.config import Config
from appliance.core.tuning import Point

PR_SET_PDEATHSIG = 1
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
WARM_UP_S = 0.2


class TrialError(Exception):
    """The settings cannot be served or measured; the text says why."""


class Trial:
    """One appliance with one model, for the length of a `with`."""

    def __init__(self, config: Config, model: str, version: int, manifest: str, engines: Path) -> None:
        self.model = model
        self._config = config
        self._version = version
        self._manifest = manifest
        self._engines = engines
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Trial:
        self._folder = Path(tempfile.mkdtemp(prefix="tune-"))
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._lay_out()
        place = str(self._folder / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear, (self._folder / "log").open("wb") as log:
            ear.bind(place)
            ear.settimeout(0.1)
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [sys.executable, "-m", "appliance", "serve", "--config", str(self._folder / "appliance.toml")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": place},
                start_new_session=True,
                preexec_fn=_end_with_us,
            )
            deadline = time.monotonic() + READY_TIMEOUT_S
            while not _heard(ear):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise TrialError(f"the appliance on trial did not start: {self._last_words()}")

    def _lay_out(self) -> None:
        """The repository: links to the model's files, and the model.toml on trial; and the configuration."""
        import tomlkit

        source = Path(self._config.repository.path).resolve() / self.model
        target = self._folder / "models" / self.model
        target.mkdir(parents=True)
        for child in source.iterdir():
            if child.name != "model.toml" and (not child.name.isdigit() or child.name == str(self._version)):
                (target / child.name).symlink_to(child)
        (target / "model.toml").write_text(self._manifest)
        replace = msgspec.structs.replace
        config = replace(
            self._config,
            runtime_dir=str(self._folder),
            http=replace(self._config.http, enabled=True, host="127.0.0.1", port=0, unix_socket=""),
            zmq=replace(self._config.zmq, enabled=True, ipc="", tcp="none", events_ipc="none", events_tcp="none"),
            repository=replace(self._config.repository, path=str(target.parent), load="all", models=(), required=()),
            engines=replace(self._config.engines, path=str(self._engines.absolute())),
            log=replace(self._config.log, level="warning"),
        )
        (self._folder / "appliance.toml").write_text(tomlkit.dumps(msgspec.to_builtins(config)))

    def _last_words(self) -> str:
        lines = (self._folder / "log").read_text(errors="replace").splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def _get(self, *path: str) -> Any:
        try:
            return Appliance(f"unix:{self._folder}/http.sock").get(model_path(self.model, *path))
        except CommandError as error:
            raise TrialError(error.message) from error

    def metadata(self) -> dict[str, Any]:
        """The model's inputs and outputs. TrialError with its reason if it does not serve."""
        found: dict[str, Any] = self._get()
        return found

    def config(self) -> dict[str, Any]:
        """The model's configuration as Triton words it: batch size, and what runs it."""
        found: dict[str, Any] = self._get("config")
        return found

    def threads(self) -> int:
        """The threads that its engine chose for one operator; 1 where the engine does not say."""
        try:
            workers = Appliance(f"unix:{self._folder}/http.sock").get("/v2/appliance/workers")
        except CommandError as error:
            raise TrialError(error.message) from error
        return int(next((w.get("details", {}).get("intra_op_threads", 1) for w in workers), 1))

    def measure(
        self, requests: tuple[tuple[bytes, ...], ...], loads: Sequence[int], seconds: float, percentile: float
    ) -> tuple[Point, ...]:
        """One closed loop for each load, over ZeroMQ. TrialError if a request was answered with an error or not at all."""
        points = []
        for load in loads:
            try:
                plan = Plan(f"ipc://{self._folder}/infer.ipc", requests, load, seconds, WARM_UP_S)
                result = generate(plan)
            except LoadError as error:
                raise TrialError(str(error)) from error
            if result.errors or result.unanswered or not result.replies:
                raise TrialError(result.first_error or f"{result.unanswered} requests were not answered")
            points.append(Point(load, result.per_second, result.latency_ms(0.5), result.latency_ms(percentile / 100)))
        return tuple(points)

    def close(self) -> None:
        """End it and remove its files."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _heard(ear: socket.socket) -> bool:
    """Whether the appliance says that it serves."""
    try:
        return b"READY=1" in ear.recv(65_536)
    except TimeoutError:
        return False


def _end_with_us() -> None:
    """However this process ends, its trials do not outlive it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
