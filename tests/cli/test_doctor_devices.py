"""A model that runs elsewhere than its manifest says is found, whatever engine runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.cli import doctor_devices
from appliance.cli.doctor_devices import devices, providers
from appliance.cli.findings import Patient
from appliance.config import Config, RepositoryConfig


def worker(model: str = "m", **more: Any) -> dict[str, Any]:
    given = {"configured_device": "cpu", "device": "cpu", "provider": "CPUExecutionProvider", "details": {}}
    return {"model": model, "version": "1", "pid": 1, **given, **more}


def patient(*workers: dict[str, Any], config: Config | None = None) -> Patient:
    return Patient(config or Config(), None, None, list(workers))


def test_models_that_run_where_they_should_are_good() -> None:
    built = worker("b", configured_device="cuda", device="cuda:0", provider="TensorRT 10.9.0", details={"cuda": "12.8"})
    (found,) = devices(patient(worker(), worker(), built))
    assert (found.grade, found.text) == ("good", "b on cuda:0 by TensorRT 10.9.0, m on cpu by CPUExecutionProvider")


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_model_that_runs_elsewhere_without_being_allowed_to_is_an_error(device: str) -> None:
    (found,) = devices(
        patient(worker(configured_device="cuda:1", device=device), worker(configured_device="cuda:1", device="cuda:1"))
    )
    assert found.grade == "error"
    assert f"configured for cuda:1 and runs on {device}" in found.text


def test_a_fallback_that_its_manifest_allows_is_a_warning_with_the_reason() -> None:
    fallen = worker(configured_device="cuda", details={"fallback": "libcuda.so.1 is missing"})
    (good,) = devices(patient(worker("ok")))
    first, second = devices(patient(fallen, worker("ok")))
    assert (good.grade, first.grade, second.grade) == ("good", "warning", "good")
    assert "libcuda.so.1 is missing" in first.text


def test_the_cuda_provider_is_asked_for_where_a_model_is_configured_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(b"x")
    (tmp_path / "m" / "model.toml").write_text('device = "cuda:0"\n')
    script = (
        "import sys\nfor device in sys.argv[1:]: print(device + '\\t' + {'cuda': 'no CUDA provider'}.get(device, ''))"
    )
    monkeypatch.setattr(doctor_devices, "SCRIPT", script)
    config = Config(repository=RepositoryConfig(path=str(tmp_path)))
    grades = {found.text: found.grade for found in providers(patient(config=config))}
    assert grades == {"cpu loads": "good", "cuda: no CUDA provider": "error"}
    # what TensorRT runs does not need ONNX Runtime's provider
    built = worker(configured_device="cuda", device="cuda:0", provider="TensorRT 10.9.0")
    if not Path("/proc/driver/nvidia/version").exists():
        assert [found.grade for found in providers(patient(built))] == ["good"]
    fallen = worker(configured_device="cuda")
    assert [found.grade for found in providers(patient(fallen))] == ["good", "error"]
