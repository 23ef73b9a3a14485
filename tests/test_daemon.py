"""How the process ends: what another configuration can mend is 78, and everything else is tried again."""

from __future__ import annotations

import errno
import os

import pytest

from appliance import daemon
from appliance.config import Config
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
