"""A build whose library tries what is not its business: the library is one of the test's, which writes down what came of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from appliance.building import jobs
from appliance.building.orders import BuildError, BuildOrder, Target
from appliance.core.manifest import ModelManifest
from appliance.host import landlock, seccomp

pytestmark = [
    pytest.mark.skipif(landlock.release() < landlock.OLDEST, reason="this kernel's Landlock is too old"),
    pytest.mark.skipif(not seccomp.available(), reason="this machine's system calls are not known"),
]

LIBRARY = """
import errno, json, os, socket, tempfile
from pathlib import Path
found = {}
def tried(name, attempt):
    try:
        attempt()
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
    else:
        found[name] = "ok"
model = Path(os.environ["TEST_MODEL"])
tried("write to the model", lambda: (model / "new").write_text("x"))
tried("read the model", lambda: (model / "1/model.onnx").read_bytes())
tried("temporary file", lambda: tempfile.NamedTemporaryFile().close())
tried("socket", lambda: socket.socket().close())
tried("program", lambda: os.posix_spawn("/bin/true", ["true"], {}))
Path(os.environ["TEST_STORE"], "found.json").write_text(json.dumps(found))
raise ImportError("this is no library")
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A model for TensorRT, which is the library above."""
    folder = tmp_path / "models/m"
    (folder / "1").mkdir(parents=True)
    model = Path(__file__).parents[2] / "models/digits/1/model.onnx"
    (folder / "1/model.onnx").write_bytes(model.read_bytes())
    (tmp_path / "library/tensorrt").mkdir(parents=True)
    (tmp_path / "library/tensorrt/__init__.py").write_text(LIBRARY)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'library'}:{before}".rstrip(":"))
    monkeypatch.setenv("TEST_MODEL", str(folder))
    monkeypatch.setenv("TEST_STORE", str(tmp_path / "engines"))
    return Target(
        store=str(tmp_path / "engines"),
        model="m",
        version="1",
        source=str(folder / "1/model.onnx"),
        folder=str(folder),
        engine="tensorrt",
        manifest=ModelManifest(),
    )


@pytest.mark.parametrize("sandbox", [True, False])
async def test_a_build_writes_to_the_store_and_to_temporary_files_only(target: Target, *, sandbox: bool) -> None:
    with pytest.raises(BuildError):
        await jobs.run(BuildOrder(target), lambda _phase, _percent: None, time_budget_s=60, sandbox=sandbox)
    found = json.loads((Path(target.store) / "found.json").read_text())
    refused = {name for name, outcome in found.items() if outcome != "ok"}
    assert refused == ({"write to the model", "socket", "program"} if sandbox else set())
    assert len(found) == 5


async def test_its_folder_of_temporary_files_goes_with_it(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(BuildError):
        await jobs.run(BuildOrder(target), lambda _phase, _percent: None, time_budget_s=60)
    assert list((tmp_path / "temporary").iterdir()) == []
