"""How the process ends: what only another configuration can mend is 78, and everything else is tried again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from appliance import daemon
from appliance.config import Config, RepositoryConfig
from appliance.workers.supervisor import Supervisor


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.ENOENT, daemon.EXIT_CONFIG),
        (errno.ENOTDIR, daemon.EXIT_CONFIG),
        (errno.EACCES, daemon.EXIT_CONFIG),
        (errno.EAGAIN, daemon.EXIT_DEVICE),
        (errno.ENOMEM, daemon.EXIT_DEVICE),
        (errno.ENOSPC, daemon.EXIT_DEVICE),
        (errno.EADDRINUSE, daemon.EXIT_DEVICE),
    ],
)
def test_a_start_that_fails_is_given_up_only_if_the_configuration_is_wrong(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def start(supervisor: Supervisor) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Supervisor, "start", start)
    # what it changes of a process for good is not for the one that runs the tests
    monkeypatch.setattr(daemon.logs, "configure", lambda *arguments: None)
    monkeypatch.setattr(daemon, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(daemon.faulthandler, "enable", lambda: None)
    assert daemon.run(Config(runtime_dir=str(tmp_path))) == status


@pytest.mark.parametrize("kind", ["missing", "dangling", "file", "home"])
def test_models_that_are_not_there_may_come_with_their_disk_so_the_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    models = tmp_path / "disk" / "models"
    told = f"the models folder {models} is not there; is its disk mounted, or repository.path wrong?"
    if kind == "dangling":
        models = tmp_path / "models"
        models.symlink_to(tmp_path / "disk" / "models")
        told = f"the models folder {models} is not there; is its disk mounted"
    elif kind == "file":
        models = tmp_path / "models"
        models.write_text("")
        told = f"the models folder {models} cannot be read: Not a directory; is its disk mounted"
    elif kind == "home":
        monkeypatch.setattr(daemon, "HIDDEN_BY_SYSTEMD", (f"{tmp_path}/",))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setattr(daemon.systemd, "BARRIER_S", 0.0)
        told = "ProtectHome= hides /home"
    monkeypatch.setattr(daemon.logs, "configure", lambda *arguments: None)
    monkeypatch.setattr(daemon, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(daemon.faulthandler, "enable", lambda: None)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    config = Config(runtime_dir=str(tmp_path / "run"), repository=RepositoryConfig(path=str(models)))
    assert daemon.run(config) == daemon.EXIT_DEVICE
    (failed,) = [record for record in caplog.records if record.getMessage() == "daemon.start_failed"]
    assert told in failed.fields["reason"]  # type: ignore[attr-defined]  # given with `extra`
    assert not (tmp_path / "disk").exists(), "a folder of ours would pass for the disk at the next start"
