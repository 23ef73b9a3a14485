"""Real build processes: they build, verify, report how far they are, and end when they should."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import uvloop

from appliance.building import compilation, jobs, keys
from appliance.building.orders import BuildError, BuildOrder, CheckOrder, Outcome, ProbeOrder, Target, wanted_engine
from appliance.building.store import SIDECAR
from appliance.building.verification import Report
from appliance.core.manifest import (
    BatchingManifest,
    BuildManifest,
    ModelManifest,
    OnnxRuntimeManifest,
    PreprocessingManifest,
    VerifyManifest,
)

DIGITS = Path(__file__).parents[2] / "models" / "digits"
BUDGET_S = 120


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """The digits model, to be made int8."""
    folder = tmp_path / "models" / "digits"
    shutil.copytree(DIGITS, folder)
    labels = tuple((folder / "labels.txt").read_text().split())
    return Target(
        store=str(tmp_path / "engines"),
        model="digits",
        version="1",
        source=str(folder / "1" / "model.onnx"),
        folder=str(folder),
        engine="onnxruntime",
        manifest=ModelManifest(precision="int8"),
        labels=labels,
    )


async def _build(target: Target, steps: list[tuple[str, float]] | None = None, *, force: bool = False) -> Outcome:
    seen = steps if steps is not None else []
    result = await jobs.run(
        BuildOrder(target, force), lambda phase, percent: seen.append((phase, percent)), time_budget_s=BUDGET_S
    )
    assert result.outcome is not None
    return result.outcome


async def _check(target: Target, digest: str) -> tuple[Outcome | None, Report]:
    result = await jobs.run(CheckOrder(target, digest), lambda _phase, _percent: None, time_budget_s=BUDGET_S)
    return result.outcome, msgspec.json.decode(result.report, type=Report)


def _changed(target: Target, **manifest: object) -> Target:
    return msgspec.structs.replace(target, manifest=msgspec.structs.replace(target.manifest, **manifest))


async def test_a_build_is_kept_verified_and_found(target: Target) -> None:
    steps: list[tuple[str, float]] = []
    assert keys.find(target) is None
    built = await _build(target, steps)
    assert built.built
    assert built.label == "int8"
    percents = [percent for _, percent in steps]
    assert percents == sorted(percents)
    assert {"preparing", "calibrating", "keeping"} <= {phase for phase, _ in steps}
    outcome, report = await _check(target, built.digest)
    assert outcome is not None
    assert (outcome.verified, outcome.reason) == ("passed", "")
    assert report.passed
    assert "accuracy" in outcome.summary
    found = keys.find(target)
    assert found is not None
    assert (found.verified, found.digest) == ("passed", built.digest)
    assert sorted(file.name for file in Path(found.folder).iterdir()) == [
        "build.log", "engine.json", "model.onnx", "verification.html", "verification.json"
    ]  # fmt: skip
    again = await _build(target)
    assert not again.built
    assert (await _build(target, force=True)).built


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "fp16"},
        {"build": BuildManifest(calibration_method="entropy")},
        {"build": BuildManifest(calibration_samples=8)},
        {"build": BuildManifest(calibration="samples")},
        {"preprocessing": PreprocessingManifest(scale=0.5)},
    ],
)
async def test_each_setting_that_changes_the_engine_changes_its_key(target: Target, changed: dict[str, object]) -> None:
    assert keys.engine_key(_changed(target, **changed)) != keys.engine_key(target)


async def test_other_bytes_of_the_model_or_of_its_external_data_change_the_key(target: Target) -> None:
    before = keys.engine_key(target)
    (Path(target.source).parent / "weights.bin").write_bytes(b"x")
    with_data = keys.engine_key(target)
    (Path(target.source).parent / "weights.bin").write_bytes(b"y")
    assert len({str(before), str(with_data), str(keys.engine_key(target))}) == 3


@pytest.mark.parametrize("name", ["w/weights.bin", "a/b/c/weights.bin", ".w/weights.bin", ".weights"])
async def test_external_data_counts_in_the_key_wherever_below_the_version_it_lies(target: Target, name: str) -> None:
    file = Path(target.source).parent / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    before = keys.engine_key(target)
    file.write_bytes(b"y")
    assert keys.engine_key(target) != before


@pytest.mark.parametrize(
    "changed",
    [{"verify": VerifyManifest(max_relative=0.5)}, {"batching": BatchingManifest(max_batch_size=8)}],
)
async def test_another_gate_asks_for_a_new_verdict_and_not_for_a_new_engine(
    target: Target, changed: dict[str, object]
) -> None:
    built = await _build(target)
    await _check(target, built.digest)
    found = keys.find(_changed(target, **changed))
    assert found is not None
    assert (found.digest, found.verified) == (built.digest, "")


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "cuda"},
        {"device": "cuda:1"},
        {"fallback": "cpu"},
        {"onnxruntime": OnnxRuntimeManifest(graph_optimization="disable")},
        {"onnxruntime": OnnxRuntimeManifest(tf32=True)},
        {"parameters": {"shape": "4"}},
    ],
)
def test_how_an_engine_is_run_asks_for_a_new_verdict_and_not_for_a_new_engine(
    target: Target, changed: dict[str, object]
) -> None:
    other = _changed(target, **changed)
    assert keys.engine_key(other) == keys.engine_key(target)
    assert keys.gate_digest(other) != keys.gate_digest(target)
    assert keys.as_is_digest(other) != keys.as_is_digest(target)


def test_threads_and_how_they_wait_ask_for_no_new_verdict_on_an_engine(target: Target) -> None:
    other = _changed(
        target,
        onnxruntime=OnnxRuntimeManifest(intra_op_threads=2, inter_op_threads=2, spinning=True, gpu_memory_limit_mb=9),
    )
    assert keys.gate_digest(other) == keys.gate_digest(target)


async def test_new_golden_inputs_ask_for_a_new_verdict(target: Target) -> None:
    target = _changed(target, build=BuildManifest(calibration="samples"))
    built = await _build(target)
    await _check(target, built.digest)
    np.savez(Path(target.folder, "golden", "more.npz"), image=np.zeros((1, 28, 28, 1), np.float32))
    found = keys.find(target)
    assert found is not None
    assert found.verified == ""


def test_a_full_disk_is_said_to_be_one_and_nothing_is_said_against_the_model(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onnx.save", full)
    with pytest.raises(BuildError, match=r"^the engines' folder cannot be written: No space left on device$"):
        compilation.build(target, lambda _phase, _percent: None)
    assert not list(Path(target.store, "digits").glob(".staging*"))


async def test_an_engine_that_misses_its_tolerance_is_kept_as_failed(target: Target) -> None:
    strict = _changed(target, verify=VerifyManifest(max_absolute=1e-9))
    built = await _build(strict)
    outcome, report = await _check(strict, built.digest)
    assert outcome is not None
    assert outcome.verified == "failed"
    assert "largest absolute error" in outcome.reason
    assert not report.passed
    found = keys.find(strict)
    assert found is not None
    assert found.verified == "failed"


async def test_an_altered_engine_is_not_verified_but_built_anew(target: Target) -> None:
    built = await _build(target)
    Path(built.model_file).write_bytes(b"other")
    with pytest.raises(BuildError, match="was altered"):
        await _check(target, built.digest)
    assert (await _build(target)).built


async def test_a_model_as_it_is_can_be_verified_without_an_engine(target: Target) -> None:
    outcome, report = await _check(_changed(target, precision="as-is"), "")
    assert outcome is None
    assert report.passed
    assert report.outputs[0].max_absolute == 0


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"precision": "bf16"}, "bf16 is for TensorRT"),
        ({"precision": "as-is"}, "nothing to build"),
        ({"build": BuildManifest(calibration="../golden")}, "outside the model's folder"),
        ({"build": BuildManifest(calibration="missing")}, "is not there"),
    ],
)
async def test_what_cannot_be_built_says_why(target: Target, manifest: dict[str, object], said: str) -> None:
    with pytest.raises(BuildError, match=said):
        await _build(_changed(target, **manifest))


async def test_int8_without_samples_says_what_to_do(target: Target) -> None:
    for name in ("golden", "samples"):
        shutil.rmtree(Path(target.folder, name))
    with pytest.raises(BuildError, match=r"put typical inputs .* \[build\] calibration"):
        await _build(target)


async def test_a_file_that_is_no_model_says_so(target: Target) -> None:
    Path(target.source).write_bytes(b"nothing")
    with pytest.raises(BuildError, match="the model is not ONNX"):
        await _build(target)
    assert not list(Path(target.store).rglob(SIDECAR))


def test_a_build_that_is_cancelled_while_its_process_starts_leaves_no_process(target: Target) -> None:
    """On the daemon's kind of loop, which forgets a process whose start was cancelled."""

    async def start_and_cancel() -> None:
        before = set(psutil.Process().children(recursive=True))
        for turns in range(1, 6):
            task = asyncio.create_task(jobs.run(BuildOrder(target), lambda _phase, _percent: None, time_budget_s=60))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            left = set(psutil.Process().children(recursive=True)) - before
            assert not left, f"cancelled after {turns} turns"

    uvloop.run(start_and_cancel())


async def test_a_cancelled_build_ends_its_process_and_leaves_nothing(target: Target) -> None:
    children = set(psutil.Process().children(recursive=True))
    begun = asyncio.Event()
    task = asyncio.create_task(
        jobs.run(BuildOrder(target), lambda _phase, _percent: begun.set(), time_budget_s=BUDGET_S)
    )
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(psutil.Process().children(recursive=True)) <= children
    assert not list(Path(target.store).rglob(SIDECAR))
    assert (await _build(target)).built


async def test_a_build_over_its_budget_is_ended(target: Target) -> None:
    with pytest.raises(BuildError, match=r"longer than its budget of 0\.05 s"):
        await jobs.run(BuildOrder(target), lambda _phase, _percent: None, time_budget_s=0.05)


async def test_a_build_process_that_is_killed_says_so(target: Target) -> None:
    def kill(_phase: str, _percent: float) -> None:
        for child in psutil.Process().children(recursive=True):
            if "appliance.building.job" in child.cmdline():
                child.kill()

    with pytest.raises(BuildError, match="ended by SIGKILL"):
        await jobs.run(BuildOrder(target), kill, time_budget_s=BUDGET_S)


async def test_a_build_that_needs_more_memory_than_it_may_have_fails_alone(target: Target) -> None:
    with pytest.raises(BuildError):
        await jobs.run(BuildOrder(target), lambda _phase, _percent: None, time_budget_s=BUDGET_S, memory_limit_mb=16)


async def test_a_box_without_a_gpu_says_so() -> None:
    with pytest.raises(BuildError, match="no NVIDIA"):
        await jobs.run(ProbeOrder(7), lambda _phase, _percent: None, time_budget_s=BUDGET_S)


@pytest.mark.parametrize(
    ("manifest", "tensorrt", "engine"),
    [
        ({}, "", ""),
        ({}, "tensorrt", ""),
        ({"precision": "fp32"}, "", ""),
        ({"precision": "int8"}, "", "onnxruntime"),
        ({"precision": "fp16", "device": "cuda"}, "", "onnxruntime"),
        ({"device": "cuda"}, "tensorrt", "tensorrt"),
        ({"device": "cuda:1", "precision": "int8"}, "tensorrt_rtx", "tensorrt_rtx"),
        ({"device": "cuda", "engine": "onnxruntime"}, "tensorrt", ""),
        ({"device": "cuda", "engine": "tensorrt"}, "", "tensorrt"),
        ({"engine": "loopback", "precision": "int8"}, "tensorrt", ""),
    ],
)
def test_which_engine_is_wanted(manifest: dict[str, object], tensorrt: str, engine: str) -> None:
    assert wanted_engine(ModelManifest(**manifest), tensorrt=tensorrt) == engine  # type: ignore[arg-type]
