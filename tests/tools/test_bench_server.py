"""What the benchmark sees of the machine: who else works, and servers that come up, or are cleared away if they do not."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil
import pytest

from appliance.cli.load import Plan, generate
from tools.benchmark import server
from tools.benchmark.server import Appliance, Echo, Noise, Raw

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "1" / "model.onnx"


def noise_of(monkeypatch: pytest.MonkeyPatch, machine: list[float], ours: list[float], clock: list[float]) -> float:
    """The cores of a `Noise` that reads these values one after the other."""
    readings = [iter(machine), iter(ours), iter(clock)]
    monkeypatch.setattr(server, "machine_cpu_s", lambda: next(readings[0]))
    monkeypatch.setattr(Noise, "_ours", lambda _: next(readings[1]))
    monkeypatch.setattr(server.time, "perf_counter", lambda: next(readings[2]))
    return Noise([]).cores()


def test_noise_is_what_the_machine_did_less_what_we_did(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise_of(monkeypatch, [100.0, 103.0], [10.0, 12.0], [0.0, 2.0]) == pytest.approx(0.5)


def test_noise_is_never_negative_where_clocks_tick_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise_of(monkeypatch, [100.0, 101.0], [10.0, 11.1], [0.0, 2.0]) == 0.0


def test_echo_answers_with_so_many_bytes_and_is_gone_after_its_block() -> None:
    with Echo("http-binary", 10) as echo:
        request = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
        result = generate(Plan(echo.address, ((request,),), seconds=0.05, warm_up_s=0.0))
        pid = echo.pid
        assert psutil.pid_exists(pid)
    assert {len(kept.payload) for kept in result.kept} == {10}
    assert not psutil.pid_exists(pid)


def test_engine_alone_is_measured_at_the_points_asked_for() -> None:
    with Raw(DIGITS) as raw:
        found = raw.measure([(1, 1), (2, 4)], 0.02)
    assert [(one["threads"], one["batch"]) for one in found] == [(1, 1), (2, 4)]
    assert all(one["items_s"] > 0 and one["p50_s"] > 0 for one in found)


def test_engine_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no model")
    with Raw(broken) as raw, pytest.raises((RuntimeError, BrokenPipeError)):
        raw.measure([(1, 1)], 0.02)


def test_appliance_that_does_not_come_up_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(server, "free_port", lambda: 99_999)
    with pytest.raises(RuntimeError, match="ended with status 78"), Appliance(tmp_path / "models"):
        pass
    assert list(tmp_path.iterdir()) == []
