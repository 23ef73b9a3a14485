"""The way back from a reload: who sends SIGHUP learns here whether the new configuration is in force, and if not, why.

One small file in the runtime directory, replaced whole: the process that serves, how many reloads it has ended, and how the last
one ended. It needs no listener of ours, so it works with HTTP switched off and for nobody outside the runtime directory's group.
`daemon` writes it, `appliance config reload` reads it; it knows nothing of configurations.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

POLL_S = 0.02


class Outcome(msgspec.Struct, frozen=True):
    """How the `number`th reload of process `pid` ended. `problems`: why not, in sentences; `notes`: what a restart would add.

    `running`: it has begun and not ended; nothing else of it counts yet.
    """

    pid: int
    number: int
    ok: bool = True
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    running: bool = False


class NobodyError(Exception):
    """No appliance serves here, or it ended before it answered."""


def path_in(runtime_dir: Path) -> Path:
    """Where the outcome lies."""
    return runtime_dir / "reload.json"


def write(runtime_dir: Path, outcome: Outcome) -> None:
    """Replace the last outcome by this one."""
    path = path_in(runtime_dir)
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(outcome))
    new.replace(path)


def forget(runtime_dir: Path) -> None:
    """Leave no outcome behind: the daemon ends."""
    with contextlib.suppress(OSError):
        path_in(runtime_dir).unlink(missing_ok=True)


def read(runtime_dir: Path) -> Outcome | None:
    """The last outcome; None if no appliance has served here."""
    try:
        return msgspec.json.decode(path_in(runtime_dir).read_bytes(), type=Outcome)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def ask(runtime_dir: Path, pid: int | None, timeout_s: float) -> Outcome:
    """Have the appliance reread its configuration, and wait until it has said how that went.

    NobodyError if it is not there or ends meanwhile, TimeoutError if it takes too long. One asker at a time: the next one waits.
    """
    deadline = time.monotonic() + timeout_s
    with _turn(runtime_dir, deadline):
        before = read(runtime_dir)
        if before is None:
            raise NobodyError(f"no appliance has served in {runtime_dir}")
        pid = pid or before.pid
        # not the one that still runs for an asker who has gone: it may have read the file before it was changed
        wanted = before.number + 1 if before.pid == pid else 1
        try:
            os.kill(pid, signal.SIGHUP)
            while True:
                now = read(runtime_dir)
                if now is not None and now.pid == pid and now.number >= wanted and not now.running:
                    return now
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(POLL_S)
                os.kill(pid, 0)
        except ProcessLookupError as error:
            raise NobodyError(f"process {pid} has ended") from error


@contextmanager
def _turn(runtime_dir: Path, deadline: float) -> Iterator[None]:
    try:
        descriptor = os.open(runtime_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NobodyError(f"there is no {runtime_dir}") from error
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)
