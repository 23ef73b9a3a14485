"""`config reload` while it waits: who stops the service meanwhile ends it, and that is no failure of the service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SILENT = """
import os, signal, sys
from pathlib import Path
from appliance.host import reload
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
reload.write(Path(sys.argv[1]), reload.Outcome(os.getpid(), 0))
print("up", flush=True)
signal.sigwait([signal.SIGHUP])
print("asked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("named", [True, False])
def test_a_reload_that_is_ended_with_the_service_ends_well_and_any_other_does_not(tmp_path: Path, named: bool) -> None:
    (tmp_path / "a.toml").write_text(f'runtime_dir = "{tmp_path}"\n')
    server = [sys.executable, "-c", SILENT, str(tmp_path)]
    asker = [sys.executable, "-m", "appliance", "config", "reload", "--config", str(tmp_path / "a.toml")]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as silent:
        assert silent.stdout is not None
        assert silent.stdout.readline() == "up\n"
        # the unit names the process, a person does not
        command = [*asker, "--pid", str(silent.pid)] if named else asker
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as asking:
            assert silent.stdout.readline() == "asked\n"
            os.kill(asking.pid, signal.SIGTERM)
            _, said = asking.communicate(timeout=20)
        assert "the appliance is being stopped" in said
        assert asking.returncode == (0 if named else 143)
