"""What the benchmark sees of the machine: who else works, and servers that come up, or are cleared away if they do not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tools.benchmark import server
from tools.benchmark.server import Appliance, Echo, Watch, await_quiet, free_port

BUSY = "import time; end = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"


def test_watch_does_not_count_its_own_work_and_ended_children(monkeypatch: pytest.MonkeyPatch) -> None:
    # all work there is on this machine is ours: /proc/stat as it would read then
    machine = psutil.Process()

    def own() -> float:
        times = machine.cpu_times()
        return times.user + times.system + times.children_user + times.children_system

    monkeypatch.setattr(server, "machine_cpu_s", own)
    watch = Watch()
    subprocess.run([sys.executable, "-c", BUSY.format(seconds=0.2)], check=True)
    assert watch.others_cores() < 0.1


def test_watch_counts_the_work_of_others_less_that_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    work = iter([100.0, 101.0, 101.0])
    clock = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr(server, "machine_cpu_s", lambda: next(work))
    monkeypatch.setattr(server.time, "perf_counter", lambda: next(clock))
    watch = Watch()
    assert watch.others_cores() == pytest.approx(0.5, abs=0.05)
    assert watch.others_cores(0.8) == pytest.approx(0.1, abs=0.05)


def test_waiting_for_quiet_ends_when_it_is_quiet_or_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(server.time, "sleep", sleep)
    monkeypatch.setattr(server.time, "perf_counter", lambda: now[0])
    use = iter([0.9, 0.9, 0.1])
    monkeypatch.setattr(Watch, "others_cores", lambda _: next(use))
    await_quiet(10.0, 0.35)
    assert len(naps) == 3
    naps.clear()
    monkeypatch.setattr(Watch, "others_cores", lambda _: 2.0)
    await_quiet(1.0, 0.35)
    assert len(naps) == 1.0 / server.QUIET_SAMPLE_S


def test_echo_is_gone_after_its_block() -> None:
    with Echo("echo-http", str(free_port()), 10) as echo:
        assert echo._process is not None
        pid = echo._process.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_appliance_that_does_not_come_up_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    appliance = Appliance(tmp_path / "models")
    appliance.http = "http://127.0.0.1:99999"
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="ended with status 78"), appliance:
        pass
    assert time.perf_counter() - started < 30
    assert list(tmp_path.iterdir()) == []
