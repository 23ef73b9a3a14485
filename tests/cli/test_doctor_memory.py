"""Memory that does not suffice is told in numbers, before anything fails, with and without a running appliance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance.cli import doctor_memory
from appliance.cli.doctor_memory import FRONT_BYTES, Want, against_limits, expected, judge, memory, wanted
from appliance.cli.findings import Finding, Patient
from appliance.config import Config, EnginesConfig, MemoryConfig, RepositoryConfig
from appliance.core.memory_budget import MIB, WORKER_BYTES
from appliance.host.cgroup import MemoryLimits
from appliance.lifecycle.repository import Repository

GB = 1_000_000_000


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("PATH", "")  # no systemctl: what this machine's unit is given is none of our business
    for name, device, instances in (("big", "cpu", 2), ("gpu", "cuda:1", 1)):
        folder = tmp_path / "models" / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(bytes(MIB))
        text = f'device = "{device}"\n[worker]\ninstances = {instances}\n'
        (folder.parent / "model.toml").write_text(text)
    return Config(
        repository=RepositoryConfig(path=str(tmp_path / "models")),
        engines=EnginesConfig(path=str(tmp_path / "engines")),
    )


def patient(config: Config, **more: Any) -> Patient:
    return Patient(config, None, **{"status": None, **more})


def found(config: Config, **more: Any) -> dict[str, Finding]:
    return {one.text.partition(":")[0]: one for one in memory(patient(config, **more))}


def ledger(capacity: int, **owners: int) -> dict[str, Any]:
    named = {f"{name}/1@abc": nbytes for name, nbytes in owners.items()}
    return {"memory": {"host": {"capacity_bytes": capacity, "reserved_bytes": sum(owners.values()), "owners": named}}}


def test_without_an_appliance_the_folder_tells_what_will_be_taken(config: Config) -> None:
    wants = {want.name: want for want in expected(config)}
    assert wants["big version 1"].bytes_by_device == {"host": 2 * (WORKER_BYTES + 2 * MIB)}
    assert wants["gpu version 1"].bytes_by_device == {"host": WORKER_BYTES, "gpu:1": 2 * MIB}
    assert not wants["big version 1"].known
    one = Config(repository=RepositoryConfig(path=config.repository.path, load="listed", models=["gpu"]))
    assert [want.name for want in expected(one)] == ["gpu version 1"]


def test_a_kept_peak_counts_more_than_the_estimate(config: Config) -> None:
    version = Repository(Path(config.repository.path)).scan()["big"].versions[1]
    peaks = Path(config.engines.path) / "memory-peaks.json"
    peaks.parent.mkdir()
    peaks.write_bytes(msgspec.json.encode({f"big/1@{version.fingerprint[:16]}/cpu": {"host": 3 * GB}}))
    want = next(want for want in expected(config) if want.name == "big version 1")
    assert (want.known, round(want.bytes_by_device["host"] / GB, 1)) == (True, 3.3)


def test_a_running_appliance_s_ledger_counts_more_than_both_and_what_is_not_configured_counts_too(
    config: Config,
) -> None:
    status = ledger(8 * GB, big=2 * GB, other=GB)
    wants = {want.name: want.bytes_by_device for want in wanted(patient(config, status=status))}
    assert wants["big version 1"] == {"host": 2 * GB}
    assert wants["other version 1"] == {"host": GB}
    assert "gpu version 1" in wants


def test_what_a_gpu_without_memory_of_its_own_takes_is_the_host_s(config: Config) -> None:
    status = ledger(8 * GB) | {"gpus": [{"index": 1, "integrated": True}, {"index": 0, "integrated": False}]}
    wants = {want.name: want.bytes_by_device for want in wanted(patient(config, status=status))}
    assert wants["gpu version 1"] == {"host": WORKER_BYTES + 2 * MIB}


@pytest.mark.parametrize(
    ("capacity", "grade", "words"),
    [(8 * GB, "good", "of 8.0 GB"), (int(2.2 * GB), "warning", "only 99 MB left"), (GB, "error", "1.1 GB too much")],
)
def test_it_warns_before_the_models_do_not_fit_any_more(config: Config, capacity: int, grade: str, words: str) -> None:
    one = found(config, status=ledger(capacity, big=2 * GB))["host"]
    assert (one.grade, words in one.text) == (grade, True), one.text
    assert ("big version 1" in one.fix) == (grade != "good")


def test_a_model_that_grows_with_its_instances_is_told_to_have_fewer(config: Config) -> None:
    one = judge("host", [Want("a", {"host": 4 * GB}, instances=4, known=True)], 3 * GB, config)
    assert (one.grade, "worker.instances = 2 instead of 4 for a" in one.fix) == ("error", True)


def test_a_reserve_that_is_larger_than_what_is_missing_is_named_with_its_new_value() -> None:
    config = Config(memory=MemoryConfig(host_reserve_mb=1024))
    one = judge("host", [Want("a", {"host": 950 * MIB}, known=True)], 1000 * MIB, config)
    assert "memory.host_reserve_mb = 974 instead of 1024" in one.fix


def test_a_gpu_s_memory_is_judged_beside_the_host_s(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_memory, "_gpu_totals", lambda: {"gpu:1": 257 * MIB})
    texts = {one.text.partition(" ")[0]: one for one in memory(patient(config))}
    assert (texts["gpu:1:"].grade, "1 MB too much" in texts["gpu:1:"].text) == ("error", True)
    monkeypatch.setattr(doctor_memory, "_gpu_totals", dict)
    texts = {one.text.partition(" ")[0]: one for one in memory(patient(config))}
    assert texts["gpu:1:"].grade == "note"


def test_the_unit_s_limits_are_compared_with_all_that_runs_under_them() -> None:
    wants = [Want("a", {"host": 2 * GB}, known=True)]
    assert against_limits(wants, MemoryLimits(8 * GB, 6 * GB)).grade == "good"
    low = against_limits(wants, MemoryLimits(2 * GB, None))
    enough = int((2 * GB + FRONT_BYTES) / 0.9) // MIB + 1
    assert (low.grade, f"MemoryMax={enough}M" in low.fix) == ("error", True)
    slow = against_limits(wants, MemoryLimits(8 * GB, 2 * GB))
    assert (slow.grade, "MemoryHigh= is 2.0 GB" in slow.text) == ("warning", True)
    close = against_limits(wants, MemoryLimits(int((2 * GB + FRONT_BYTES) / 0.95), None))
    assert close.grade == "warning"


def test_what_the_unit_is_given_is_asked_of_systemd_where_nothing_runs(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho MemoryMax=400000000\necho MemoryHigh=infinity\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    grades = {one.check: one.grade for one in memory(patient(config))}
    assert grades["memory limits"] == "error"
    program.write_text("#!/bin/sh\necho MemoryMax=infinity\necho MemoryHigh=18446744073709551615\n")
    assert "memory limits" not in {one.check for one in memory(patient(config))}
