"""Environments for other people's clients, and the servers that they are let loose on.

`http_server` is, in turn, the HTTP transport over the fake service and the whole appliance with its models; set
`APPLIANCE_INTEROP_URL` to let the clients loose on a running one instead. A client gets a base URL and a model's name, and
nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.house import House
from tests.transports.http.server_process import FakeServer

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CLIENT_TIMEOUT_S = 60


class HttpServer(NamedTuple):
    url: str
    models: tuple[str, ...]
    """Names of models to use; one called `echo` answers with its input."""


@pytest.fixture(scope="module", params=["fake", "appliance"])
def http_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    if given := os.environ.get("APPLIANCE_INTEROP_URL"):
        if request.param == "fake":
            pytest.skip("APPLIANCE_INTEROP_URL names the server to test")
        yield HttpServer(given, tuple(os.environ.get("APPLIANCE_INTEROP_MODELS", "digits").split(",")))
    elif request.param == "fake":
        with FakeServer() as server:
            yield HttpServer(f"http://{server.address}", ("echo",))
    else:
        house = House(tmp_path_factory.mktemp("interop"))
        house.digits()
        house.loopback("echo", shape="4")
        try:
            yield HttpServer(house.start().http, ("echo", "digits"))
        finally:
            house.finish()


def environment(name: str) -> Path:
    """The programs of the environment of that requirements file, made if it is missing or the file has changed."""
    folder = Path(os.environ.get("APPLIANCE_INTEROP_DIR", ROOT / ".venv-interop")) / name
    wanted = (HERE / "requirements" / f"{name}.txt").read_text()
    made_from = folder / "made-from.txt"
    if not made_from.exists() or made_from.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        quiet = ["--quiet", "--disable-pip-version-check"]
        requirements = HERE / "requirements" / f"{name}.txt"
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *quiet, "-r", requirements], check=True)
        made_from.write_text(wanted)
    return folder / "bin"


@pytest.fixture(scope="session")
def programs() -> Callable[[str], Path]:
    """The programs of an environment, by the name of its requirements file."""
    return environment


def run(*command: object) -> str:
    """What a client prints; a failure with all that it printed if it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
