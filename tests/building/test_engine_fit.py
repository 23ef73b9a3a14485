"""What each engine here could run: from what is installed and what the file holds."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import msgspec
import pytest

from appliance.building.engine_fit import CEILINGS, EngineFit, engines
from appliance.building.inspect import Inspection, Value, inspect

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "1" / "model.onnx"
EVERYTHING = {"onnxruntime-gpu": "1.32.0", "tensorrt": "11.4.0", "tensorrt_rtx": "1.7.1"}
FREE = Value("the image", "FP32", ("batch", 3, "height", "?"))
FIXED = Value("other", "FP32", ("batch", 3, 4))


def changed(**fields: Any) -> Inspection:
    return msgspec.structs.replace(inspect(DIGITS), **fields)


def fits(found: Inspection, installed: dict[str, str], *, driver: bool = True) -> dict[str, EngineFit]:
    return {fit.engine: fit for fit in engines(found, lambda name: installed.get(name, ""), driver)}


def test_what_this_box_lacks_is_named() -> None:
    found = fits(changed(), {"onnxruntime": "1.32.0", "tensorrt": "11.4.0"}, driver=False)
    assert found["onnxruntime"] == EngineFit("onnxruntime", (), "probably", ())
    assert found["onnxruntime cuda"].missing == ("onnxruntime-gpu is not installed", "no NVIDIA driver is loaded")
    assert found["tensorrt"].missing == ("no NVIDIA driver is loaded",)
    assert not any(fit.missing for fit in fits(changed(), EVERYTHING).values())
    assert all(fit.missing for fit in fits(changed(), {}).values())


@pytest.mark.parametrize(
    ("fields", "engine", "model", "words"),
    [
        ({"ir_version": 15}, "onnxruntime", "no", "IR version 15 is newer than the 14"),
        ({"opset": 99}, "onnxruntime", "no", "opset 99 is newer than the 28"),
        ({"operators": {"Gelu": 1}}, "onnxruntime", "no", "operators that opset 18 does not have: Gelu"),
        ({"operators": {"acme.Weld": 1}}, "onnxruntime", "no", "outside ONNX and ONNX Runtime: acme.Weld"),
        ({"operators": {"com.microsoft.Gelu": 1}}, "onnxruntime", "perhaps", "com.microsoft.Gelu"),
        ({"operators": {"acme.Weld": 1}, "functions": ("acme.Weld",)}, "onnxruntime", "probably", ""),
        ({"datatypes": ("FP32", "FP64")}, "tensorrt", "no", "FP64"),
        ({"datatypes": ("BYTES",)}, "tensorrt_rtx", "no", "strings"),
        ({"operators": {"acme.Weld": 1}}, "tensorrt", "perhaps", "plugins: acme.Weld"),
        ({"operators": {"Loop": 1}}, "tensorrt", "perhaps", "control flow (Loop)"),
        ({"data_dependent": ("NonZero",)}, "tensorrt", "perhaps", "served unbatched"),
        ({"datatypes": ("FP64",)}, "onnxruntime", "probably", ""),
        ({"inputs": (FREE, FIXED)}, "tensorrt", "perhaps", 'needs [build.shapes."the image"] in model.toml'),
        ({"inputs": (FREE,)}, "tensorrt_rtx", "perhaps", "needs [build.shapes"),
        ({"inputs": (FREE,)}, "onnxruntime", "probably", ""),
        ({"inputs": (FIXED,)}, "tensorrt", "probably", ""),
    ],
)
def test_what_speaks_against_a_model_is_named(fields: dict[str, Any], engine: str, model: str, words: str) -> None:
    fit = fits(changed(**fields), EVERYTHING)[engine]
    assert fit.model == model
    assert words in "; ".join(fit.reasons)
    assert bool(fit.reasons) == (model != "probably")


def test_of_a_release_that_was_not_measured_no_ceiling_is_claimed() -> None:
    assert fits(changed(ir_version=99), {"onnxruntime": "1.99.0"})["onnxruntime"].model == "probably"


@pytest.mark.slow
def test_the_ceilings_are_those_of_the_installed_release() -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    import appliance  # noqa: F401  before the library

    def loads(ir_version: int, opset: int) -> bool:
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception:
            return False
        return True

    release = ".".join(onnxruntime.__version__.split(".")[:2])
    if release not in CEILINGS:
        pytest.skip(f"of {release} no ceiling is claimed")
    ir_version, opset = CEILINGS[release]
    assert [loads(ir_version, opset), loads(ir_version + 1, opset), loads(ir_version, opset + 1)] == [
        True,
        False,
        False,
    ]


def test_looking_imports_no_engine() -> None:
    code = (
        "import sys; from pathlib import Path; from appliance.building.inspect import inspect;"
        "from appliance.building.engine_fit import engines; engines(inspect(Path(sys.argv[1])));"
        "print([name for name in ('onnxruntime', 'tensorrt', 'tensorrt_rtx_bindings', 'cuda') if name in sys.modules])"
    )
    done = run([sys.executable, "-c", code, str(DIGITS)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
