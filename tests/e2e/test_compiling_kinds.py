"""Models of every kind through `appliance compile` and `appliance verify`, and TensorRT-RTX's builds of those it can take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from appliance.building import jobs
from appliance.building.orders import BuildError, BuildOrder, DeviceFacts, Target
from appliance.core.manifest import ModelManifest
from tests.building import graphs
from tests.e2e.house import House
from tests.e2e.test_compiling import _command

pytestmark = pytest.mark.slow

FLOAT, STRING, INT64 = TensorProto.FLOAT, TensorProto.STRING, TensorProto.INT64
WEIGHT = np.random.default_rng(1).standard_normal((8, 4), np.float32)


def two_inputs(file: Path) -> None:
    graphs.write(
        file,
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "z"], ["y"])],
        {"x": (FLOAT, ["batch", 8]), "z": (FLOAT, ["batch", 4])},
        {"y": (FLOAT, ["batch", 4])},
        {"w": WEIGHT},
    )


def data_dependent(file: Path) -> None:
    graphs.write(
        file, [helper.make_node("NonZero", ["x"], ["y"])], {"x": (FLOAT, ["batch", 8])}, {"y": (INT64, [2, "found"])}
    )


def strings(file: Path) -> None:
    graphs.write(
        file, [helper.make_node("Identity", ["x"], ["y"])], {"x": (STRING, ["batch", 1])}, {"y": (STRING, ["batch", 1])}
    )


def external(file: Path) -> None:
    graphs.linear(file, WEIGHT, np.zeros(4))
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (file.parent / "weights.bin").stat().st_size > 0


def fixed_batch(file: Path) -> None:
    graphs.linear(file, WEIGHT, np.zeros(4), batch=3)


def _arrange(house: House, make: Callable[[Path], None], golden: dict[str, Any] | None = None) -> tuple[str, ...]:
    make(house.models / "m" / "1" / "model.onnx")
    if golden is not None:
        (house.models / "m" / "golden").mkdir()
        np.savez(house.models / "m" / "golden" / "some.npz", **golden)
    return ("--repository", str(house.models), "--json")


ROWS = np.random.default_rng(2).standard_normal((12, 8), np.float32)


@pytest.mark.parametrize(
    ("make", "golden"),
    [
        (two_inputs, {"x": ROWS, "z": ROWS[:, :4]}),
        (external, {"x": ROWS}),
        (fixed_batch, {"x": ROWS[:3]}),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_network_of_numbers_is_converted_verified_and_found_again(
    house: House, make: Callable[[Path], None], golden: dict[str, Any], precision: str
) -> None:
    where = _arrange(house, make, golden)
    code, document, words = _command(house, "compile", "m", "--precision", precision, *where)
    assert (code, document["report"]["passed"], document["engine"]["label"]) == (0, True, precision), words
    code, document, words = _command(house, "verify", "m", *where)
    assert (code, document["engine"]["verified"]) == (0, "passed"), words


@pytest.mark.parametrize("make", [two_inputs, data_dependent, external, fixed_batch])
def test_without_golden_inputs_they_are_generated_for_a_model_as_it_is(
    house: House, make: Callable[[Path], None]
) -> None:
    code, document, words = _command(house, "compile", "m", *_arrange(house, make))
    assert (code, document["report"]["passed"], document["engine"]) == (0, True, None), words
    assert "generated" in document["report"]["inputs"]


def test_a_model_of_strings_is_verified_on_golden_ones_which_cannot_be_made_up(house: House) -> None:
    where = _arrange(house, strings)
    code, document, _ = _command(house, "verify", "m", *where)
    assert (code, "golden" in document["error"]["message"]) == (1, True)
    _arrange(house, strings, {"x": np.array([["good"], ["bad"], [""]])})
    code, document, words = _command(house, "verify", "m", *where)
    assert (code, document["report"]["passed"]) == (0, True), words
    assert document["report"]["outputs"][0]["mismatch"] == 0


ADA = DeviceFacts("NVIDIA RTX 4000", "8.9", 20 << 30, 48, "13.0")


@pytest.mark.parametrize("make", [two_inputs, external, fixed_batch])
async def test_tensorrt_rtx_builds_it_for_a_gpu_that_is_not_here(tmp_path: Path, make: Callable[[Path], None]) -> None:
    pytest.importorskip("tensorrt_rtx_libs", reason="tensorrt_rtx_libs is not installed", exc_type=ImportError)
    built = await _rtx(tmp_path, make)
    assert Path(built).stat().st_size > 0


async def test_what_tensorrt_rtx_has_no_kernel_for_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_libs", reason="tensorrt_rtx_libs is not installed", exc_type=ImportError)
    with pytest.raises(BuildError, match="cannot read the model: operator NonZero"):
        await _rtx(tmp_path, data_dependent)


async def _rtx(folder: Path, make: Callable[[Path], None]) -> str:
    file = folder / "m" / "1" / "model.onnx"
    make(file)
    manifest = ModelManifest(engine="tensorrt_rtx", device="cuda")
    target = Target(
        str(folder / "engines"), "m", "1", str(file), str(file.parent.parent), "tensorrt_rtx", manifest, device=ADA
    )
    result = await jobs.run(BuildOrder(target), lambda _phase, _percent: None, time_budget_s=120)
    assert result.outcome is not None
    return result.outcome.model_file
