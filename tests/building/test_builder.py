"""Real plans by TensorRT-RTX, in real build processes, on a machine that needs no GPU for it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from appliance.building import compilation, jobs, keys
from appliance.building.builder import PlanBuilder
from appliance.building.orders import BuildError, BuildOrder, DeviceFacts, Outcome, Target
from appliance.building.pinned import PinnedFile
from appliance.building.stopping import Stop
from appliance.building.store import SIDECAR, EngineStore
from appliance.config import EnginesConfig
from appliance.core.manifest import BatchingManifest, BuildManifest, ModelManifest, OnnxRuntimeManifest, ShapeRange
from appliance.core.request import ModelName
from appliance.lifecycle.compilation import ModelCompiler
from appliance.lifecycle.compiler import BuildProgress
from appliance.lifecycle.repository import Repository
from tests.building import graphs
from tools.benchmark.networks import resnet18

pytest.importorskip("tensorrt_rtx_libs", reason="the package tensorrt_rtx_libs is not installed", exc_type=ImportError)

DIGITS = Path(__file__).parents[2] / "models" / "digits"
ADA = DeviceFacts("NVIDIA RTX 4000", "8.9", 20 << 30, 48, "13.0")
BUDGET_S = 120


def _target(folder: Path, **manifest: Any) -> Target:
    """A build of what lies in folder/models/m/1/model.onnx for a GPU that is not here."""
    place = folder / "models" / "m"
    (place / "1").mkdir(parents=True, exist_ok=True)
    return Target(
        store=str(folder / "engines"),
        model="m",
        version="1",
        source=str(place / "1" / "model.onnx"),
        folder=str(place),
        engine="tensorrt_rtx",
        manifest=ModelManifest(engine="tensorrt_rtx", device="cuda", **manifest),
        device=ADA,
    )


@pytest.fixture
def digits(tmp_path: Path) -> Target:
    """The digits model with its golden inputs and samples."""
    shutil.copytree(DIGITS, tmp_path / "models" / "m")
    return _target(tmp_path)


def _with(target: Target, **manifest: Any) -> Target:
    return msgspec.structs.replace(target, manifest=msgspec.structs.replace(target.manifest, **manifest))


async def _build(target: Target, steps: list[tuple[str, float]] | None = None) -> Outcome:
    seen = steps if steps is not None else []
    result = await jobs.run(BuildOrder(target), lambda *step: seen.append(step), time_budget_s=BUDGET_S)
    assert result.outcome is not None
    return result.outcome


async def _refused(target: Target) -> str:
    with pytest.raises(BuildError) as caught:
        await _build(target)
    assert not list(Path(target.store).rglob(SIDECAR))
    assert str(Path(target.folder).parent) not in str(caught.value)
    return str(caught.value)


async def test_a_plan_is_built_kept_and_found_with_all_that_is_known_of_it(digits: Target) -> None:
    steps: list[tuple[str, float]] = []
    built = await _build(digits, steps)
    assert Path(built.model_file).read_bytes()[:4] == b"vtrt"
    percents = [percent for _, percent in steps]
    assert percents == sorted(percents)
    assert (len(set(percents)) > 20, percents[-1]) == (True, 99.0)
    entry = EngineStore(Path(digits.store)).find("m", built.digest)
    assert entry is not None
    assert entry.sidecar.inputs == {"image": "FLOAT [-1, 28, 28, 1]"}
    assert entry.sidecar.outputs == {"scores": "FLOAT [-1, 10]"}
    assert (entry.sidecar.driver, len(entry.sidecar.golden)) == ("13.0", 64)
    assert any("profile: image [1, 28, 28, 1] to [32, 28, 28, 1]" in line for line in entry.sidecar.log)
    assert (entry.folder / "build.log").read_text().splitlines()[-1].startswith("plan: ")
    found = keys.find(digits)
    assert found is not None
    assert found.digest == built.digest
    assert not (await _build(digits)).built


@pytest.mark.parametrize("precision", ["fp16", "int8"])
async def test_a_converted_graph_makes_a_smaller_plan_and_is_not_kept_itself(digits: Target, precision: str) -> None:
    plain = Path((await _build(digits)).model_file).stat().st_size
    built = await _build(_with(digits, precision=precision))
    assert Path(built.model_file).stat().st_size < 0.7 * plain
    assert sorted(file.name for file in Path(built.folder).iterdir()) == ["build.log", SIDECAR, "model.plan"]


@pytest.mark.slow
async def test_a_resnet_is_built(tmp_path: Path) -> None:
    target = _target(tmp_path)
    onnx.save(resnet18(), target.source)
    assert Path((await _build(target)).model_file).stat().st_size > 40_000_000


async def test_shapes_of_the_manifest_make_the_profile(tmp_path: Path) -> None:
    target = _target(tmp_path)
    conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    graphs.write(
        Path(target.source),
        [conv],
        {"x": (TensorProto.FLOAT, ["batch", 3, "height", "width"])},
        {"y": (TensorProto.FLOAT, ["batch", 4, "height", "width"])},
        {"w": np.ones((4, 3, 3, 3), np.float32)},
    )
    assert "leaves axis 2, 3 free" in await _refused(target)
    given = ShapeRange(min=(1, 3, 16, 16), opt=(2, 3, 32, 32), max=(4, 3, 64, 64))
    built = await _build(_with(target, build=BuildManifest(shapes={"x": given})))
    assert "best at [2, 3, 32, 32]" in Path(built.folder, "build.log").read_text()


async def test_a_model_of_fixed_sizes_needs_no_profile(tmp_path: Path) -> None:
    target = _target(tmp_path)
    graphs.linear(Path(target.source), np.ones((4, 2)), np.zeros(2), batch=1)
    assert "profile" not in Path((await _build(target)).folder, "build.log").read_text()


async def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path) -> None:
    target = _target(tmp_path)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    node = helper.make_node("Nope", ["x"], ["y"], domain="my.ops", name="first")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets), target.source
    )
    assert "operator Nope, node 'first': no such operator" in await _refused(target)


@pytest.mark.parametrize("cut", [0, 1000])
async def test_a_file_that_is_no_whole_model_says_so(digits: Target, cut: int) -> None:
    source = Path(digits.source)
    source.write_bytes(source.read_bytes()[:-cut] if cut else b"junk" * 50)
    assert "the model is not ONNX, or is cut off" in await _refused(digits)


async def test_too_little_workspace_is_said_in_words(digits: Target) -> None:
    target = _with(digits, build=BuildManifest(workspace_mb=1))
    said = await _refused(target)
    assert "no tactics to implement the operation within workspace limit" in said
    assert "driver" not in said


async def test_a_gpu_that_this_release_does_not_build_for_is_refused(digits: Target) -> None:
    target = msgspec.structs.replace(digits, device=DeviceFacts(compute_capability="5.0"))
    assert "builds for compute capability 12.0, 12.1, 7.5, 8.0, 8.6, 8.9, not for 5.0" in await _refused(target)
    assert "none is known" in await _refused(msgspec.structs.replace(digits, device=DeviceFacts()))


def _external(source: Path, location: str) -> None:
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 64], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(64 * 64 * 4))):
        weight.external_data.add(key=key, value=value)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weight])
    opsets = [helper.make_opsetid("", 17)]
    source.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


async def test_external_data_beside_the_model_is_read_and_elsewhere_refused(tmp_path: Path) -> None:
    target = _target(tmp_path)
    source = Path(target.source)
    data = np.ones((64, 64), np.float32).tobytes()
    (source.parent / "weights.bin").write_bytes(data)
    (source.parent.parent / "secret.bin").write_bytes(data)
    for location in ("../secret.bin", "/etc/hostname"):
        _external(source, location)
        assert "outside its folder" in await _refused(target)
    _external(source, "weights.bin")
    assert (await _build(target)).built


async def test_a_cancelled_build_is_gone_and_leaves_nothing(digits: Target) -> None:
    children = set(psutil.Process().children(recursive=True))
    begun = asyncio.Event()

    def seen(phase: str, _percent: float) -> None:
        if phase == "building":
            begun.set()

    task = asyncio.create_task(jobs.run(BuildOrder(digits), seen, time_budget_s=BUDGET_S))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(psutil.Process().children(recursive=True)) <= children
    assert not list(Path(digits.store).glob("m/.staging*"))
    assert (await _build(digits)).built


def _device(**changed: Any) -> dict[str, Any]:
    return {"device": msgspec.structs.replace(ADA, **changed)}


@pytest.mark.parametrize(
    "changed",
    [
        _device(name="other"),
        _device(compute_capability="8.6"),
        _device(memory_bytes=1),
        _device(multiprocessors=1),
        _device(driver="14.0"),
        _device(cuda="12.8"),
        {"engine": "tensorrt"},
        {"model": "other"},
        {"manifest": ModelManifest(batching=BatchingManifest(max_batch_size=4))},
        {"manifest": ModelManifest(onnxruntime=OnnxRuntimeManifest(tf32=True))},
        *(
            {"manifest": ModelManifest(build=BuildManifest(**{key: value}))}
            for key, value in {
                "workspace_mb": 7,
                "tactic_memory_mb": 7,
                "optimization_level": 1,
                "shapes": {"image": ShapeRange(min=(1, 28, 28, 1), max=(2, 28, 28, 1))},
            }.items()
        ),
    ],
)
def test_each_part_that_a_plan_depends_on_is_part_of_its_key(digits: Target, changed: dict[str, Any]) -> None:
    plain = msgspec.structs.replace(digits, manifest=ModelManifest())
    assert keys.engine_key(msgspec.structs.replace(plain, **changed)) != keys.engine_key(plain)


@pytest.mark.parametrize("name", ["tensorrt_rtx", "cuda", "onnx"])
def test_another_library_is_another_key(digits: Target, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before, version = keys.engine_key(digits), keys.library_version
    monkeypatch.setattr(keys, "library_version", lambda asked: "9" if asked == name else version(asked))
    assert keys.engine_key(digits) != before


def test_a_minor_driver_update_and_the_time_budget_keep_the_key(digits: Target) -> None:
    before = keys.engine_key(digits)
    assert keys.engine_key(msgspec.structs.replace(digits, **_device(driver="13.2"))) == before
    assert keys.engine_key(_with(digits, build=BuildManifest(time_budget_s=5))) == before


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\nGCC version:  gcc 12\n", "580.95.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  590.44.01  Release Build\n", "590.44.01"),
        ("nothing of the kind", ""),
    ],
)
def test_the_kernel_module_tells_its_version(tmp_path: Path, text: str, version: str) -> None:
    file = tmp_path / "version"
    assert compilation.driver_version(file) == ""
    file.write_text(text)
    assert compilation.driver_version(file) == version


def test_a_build_that_is_asked_to_stop_stops_at_the_next_step(digits: Target) -> None:
    stop, seen = Stop(), list[float]()

    def ask(percent: float) -> None:
        seen.append(percent)
        stop.asked = percent > 10

    builder = PlanBuilder(digits, ask, stop)
    with pytest.raises(SystemExit):
        builder.build(Path(digits.source))
    assert seen[-1] < 60
    assert any("cancel" in line.lower() for line in builder.log)


class FakeConfig:
    """As much of a builder's configuration as a timing cache needs; the library takes caches that begin with its name."""

    def __init__(self) -> None:
        self.cache: bytes | None = None

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache and not cache.startswith(b"ours"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> FakeConfig:
        return self

    def serialize(self) -> bytes:
        return (self.cache or b"ours") + b"+"


def test_timings_of_earlier_builds_are_used_and_those_that_do_not_fit_set_aside(digits: Target) -> None:
    target = msgspec.structs.replace(digits, engine="tensorrt")
    file = PinnedFile(EngineStore(Path(target.store)), "timings")
    file.path.parent.mkdir()
    caches = []
    for _ in range(2):
        builder, config = PlanBuilder(target, lambda _percent: None, Stop(), file), FakeConfig()
        builder._use_timings(config)
        builder._keep_timings(config)
        caches.append(config.cache)
    assert caches == [b"", b"ours+"]
    file.write(b"theirs")
    builder, config = PlanBuilder(target, lambda _percent: None, Stop(), file), FakeConfig()
    builder._use_timings(config)
    assert config.cache == b""
    assert "set aside" in builder.log[-1]
    assert file.path.with_name("timings.bad").exists()


async def test_the_appliances_compiler_says_how_far_a_plan_is(digits: Target) -> None:
    manifest = Path(digits.folder, "model.toml")
    manifest.write_text('engine = "tensorrt_rtx"\ndevice = "cuda"\n')
    folder = Repository(Path(digits.folder).parent).read(ModelName("m"))
    assert folder is not None
    compiler = ModelCompiler(Path(digits.store), EnginesConfig())
    compiler._devices[0] = ADA
    progress: list[BuildProgress] = []
    artifact = await compiler.make(folder, folder.versions[1], progress.append)
    assert (artifact.engine, artifact.label, artifact.verified) == ("tensorrt_rtx", "tensorrt_rtx", False)
    assert len({round(step.percent) for step in progress if step.phase == "building"}) > 20
    await compiler.discard(folder, artifact, "it does not load")
    assert not Path(artifact.model_file).exists()
