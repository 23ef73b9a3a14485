"""Running another program to its end, without being held by what it leaves running.

Its output goes into files, not pipes: whoever waits for the end of a pipe waits for every process that has it still, such as a
service that a restart program or a package's script has put into the background.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence


def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    umask: int = -1,
) -> subprocess.CompletedProcess[str]:
    """The ended program with what it printed. OSError if it cannot be started; subprocess.TimeoutExpired, and it is killed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        ended = subprocess.run(  # noqa: S603  the caller says what and why
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            timeout=timeout_s,
            check=False,
            env=environment if environment is None else {**os.environ, **environment},
            cwd=folder,
            umask=umask,
        )
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return subprocess.CompletedProcess(ended.args, ended.returncode, *texts)
