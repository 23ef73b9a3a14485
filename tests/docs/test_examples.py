"""The examples in the documentation do what they say, against a live transport."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.config import ZmqConfig
from tests.transports.zmq.conftest import House

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
ARGUMENTS = ("echo", "x", "1,4")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    await house.make(ZmqConfig()).start()
    yield house
    await house.transport.close()


async def run(*command: str | Path, cwd: Path | None = None) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def check(house: House, *command: str | Path, cwd: Path | None = None) -> None:
    """The example answers over both faces, and fails with the code of a refusal."""
    for endpoint in (house.ipc, house.tcp):
        code, out, err = await run(*command, endpoint, *ARGUMENTS, cwd=cwd)
        assert (code, out.splitlines()[-1].split()) == (0, ["0", "1", "2", "3"]), err
    code, out, err = await run(*command, house.tcp, "nope", "x", "1,4", cwd=cwd)
    assert (code, "NOT_FOUND" in out + err) == (1, True)


@pytest.mark.parametrize("script", ["infer.py", "infer_raw.py"])
async def test_the_python_example_works(house: House, script: str) -> None:
    await check(house, sys.executable, EXAMPLES / "python" / script)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ (apt-get install g++)")
    has_header = subprocess.run([compiler, "-E", "-x", "c++", "-"], input=b"#include <zmq.h>", capture_output=True)
    if has_header.returncode:
        pytest.skip("needs zmq.h (apt-get install libzmq3-dev)")
    program = tmp_path_factory.mktemp("cpp") / "infer"
    source = EXAMPLES / "cpp" / "infer.cpp"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source), "-lzmq"]
    subprocess.run(command, check=True, timeout=120)
    return program


async def test_the_cpp_example_works(house: House, cpp: Path) -> None:
    await check(house, cpp)


async def test_the_cpp_example_says_when_nobody_answers(cpp: Path, tmp_path: Path) -> None:
    code, _, err = await run(cpp, f"ipc://{tmp_path}/nobody", *ARGUMENTS)
    assert (code, "no appliance answers" in err) == (1, True)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "infer.js"):
        shutil.copy(EXAMPLES / "node" / name, folder)
    install = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--no-package-lock"], cwd=folder, capture_output=True, timeout=300
    )
    if install.returncode:
        pytest.skip("npm cannot install the zeromq package here")
    return folder


@pytest.mark.slow
async def test_the_node_example_works(house: House, node: Path) -> None:
    await check(house, "node", "infer.js", cwd=node)
