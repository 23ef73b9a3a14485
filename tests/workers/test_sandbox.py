"""A worker that tries what is not its business, with the sandbox and without."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest

from appliance.host import landlock, seccomp
from appliance.workers.supervisor import Supervisor
from tests.workers.test_supervisor import MANIFEST, Owner, options, run

pytestmark = [
    pytest.mark.skipif(landlock.release() < landlock.OLDEST, reason="this kernel's Landlock is too old"),
    pytest.mark.skipif(not seccomp.available(), reason="this machine's system calls are not known"),
]


async def _told(*commands: str, sandbox: bool) -> list[str]:
    """What a worker answers to each command."""
    supervisor = Supervisor(max_arena_bytes=1 << 24, on_worker_lost=lambda link, reason: None, sandbox=sandbox)
    supervisor.start()
    supervisor.watch()
    try:
        instance = await supervisor.open_instance("m:1", options(shape="4", commands="true"), MANIFEST)
        owner = Owner()
        instance.owner = owner
        for number, command in enumerate(commands):
            run(instance, number, command)
            await owner.next()
        return [str(words) for kind, words in owner.heard if kind == "failed"]
    finally:
        supervisor.close()
        assert psutil.Process().children(recursive=True) == []


@pytest.mark.parametrize("sandbox", [True, False])
async def test_a_worker_can_write_connect_and_run_programs_only_without_it(tmp_path: Path, *, sandbox: bool) -> None:
    (tmp_path / "model.onnx").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said = await _told(
            f"write {tmp_path}/new", f"read {tmp_path}/model.onnx", f"connect {port}", "run /bin/true", sandbox=sandbox
        )
    possible, refused = "was possible", "ended with E"
    wanted = [refused, possible, refused, refused] if sandbox else [possible] * 4
    for words, want in zip(said, wanted, strict=True):
        assert want in words
    assert (tmp_path / "new").exists() is not sandbox


async def test_a_worker_cannot_read_what_systemd_gave_to_the_front_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/key").write_text("secret")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    (words,) = await _told(f"read {tmp_path}/credentials/key", sandbox=True)
    assert "EACCES" in words
