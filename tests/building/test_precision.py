"""Real conversions of real graphs, run by the real runtime."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from appliance.building.precision import PrecisionError, convert
from tests.building import graphs

DIGITS = Path(__file__).parents[2] / "models" / "digits"
GOLDEN = dict(np.load(DIGITS / "golden" / "batch_32.npz"))


def _run(file: Path, **feeds: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feeds)[0]
    return result


def _feeds() -> list[dict[str, np.ndarray]]:
    return [{"image": GOLDEN["image"][row : row + 1]} for row in range(32)]


def _types(file: Path) -> set[int]:
    return {weight.data_type for weight in onnx.load(file).graph.initializer}


def test_fp16_keeps_the_faces_and_nearly_the_answers(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    convert(DIGITS / "1" / "model.onnx", target, "fp16")
    onnx.checker.check_model(onnx.load(target))
    assert TensorProto.FLOAT16 in _types(target)
    assert TensorProto.FLOAT not in _types(target)
    assert _run(target, image=GOLDEN["image"]).dtype == np.float32
    np.testing.assert_allclose(_run(target, image=GOLDEN["image"]), GOLDEN["scores"], atol=2e-3)


def test_int8_quantizes_weights_and_activations_and_nearly_keeps_the_answers(tmp_path: Path) -> None:
    target, steps = tmp_path / "m.onnx", []
    convert(DIGITS / "1" / "model.onnx", target, "int8", samples=_feeds(), on_step=lambda *step: steps.append(step))
    operators = [node.op_type for node in onnx.load(target).graph.node]
    assert operators.count("QuantizeLinear") >= 3
    assert TensorProto.INT8 in _types(target)
    assert target.stat().st_size < (DIGITS / "1" / "model.onnx").stat().st_size / 3
    np.testing.assert_allclose(_run(target, image=GOLDEN["image"]), GOLDEN["scores"], atol=0.05)
    assert steps[0][0] == "preparing"
    assert steps[-1] == ("calibrating", 1.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_the_other_calibration_methods_work_too(tmp_path: Path, method: str) -> None:
    target = tmp_path / "m.onnx"
    convert(DIGITS / "1" / "model.onnx", target, "int8", samples=_feeds(), method=method)
    assert (_run(target, image=GOLDEN["image"]).argmax(1) == GOLDEN["scores"].argmax(1)).mean() > 0.9


def test_bf16_rounds_to_the_nearest_even(tmp_path: Path) -> None:
    # 1 + 2**-9 lies between 1 and 1 + 2**-7 and below the half; 1 + 2**-8 is the half, and 1 is even
    values = np.array([[1.0, 1 + 2**-9, 1 + 2**-8, 1 + 2**-7 + 2**-8, -3.0e38, np.nan]], np.float32)
    target = tmp_path / "m.onnx"
    convert(graphs.linear(tmp_path / "s.onnx", values, np.zeros(6)), target, "bf16")
    weight = next(w for w in onnx.load(target).graph.initializer if list(w.dims) == [1, 6])
    assert weight.data_type == TensorProto.BFLOAT16
    bits = np.frombuffer(weight.raw_data, "<u2").astype(np.uint32) << 16
    rounded = bits.view(np.float32)
    assert list(rounded[:4]) == [1.0, 1.0, 1.0, 1 + 2**-6]
    assert rounded[4] == pytest.approx(-3.0e38, rel=2**-8)
    assert np.isnan(rounded[5])


def test_bf16_is_a_valid_graph_with_float_faces(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    convert(DIGITS / "1" / "model.onnx", target, "bf16")
    model = onnx.load(target)
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert TensorProto.BFLOAT16 in _types(target)
    assert TensorProto.FLOAT16 not in _types(target)


def test_weights_beyond_the_range_of_fp16_still_give_a_model_that_the_gate_can_judge(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    convert(graphs.linear(tmp_path / "s.onnx", [[1e6]], [0]), target, "fp16")
    assert np.isfinite(_run(target, x=np.ones((1, 1), np.float32))).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path, precision: str) -> None:
    quantized = tmp_path / "q.onnx"
    convert(DIGITS / "1" / "model.onnx", quantized, "int8", samples=_feeds())
    with pytest.raises(PrecisionError, match=r"quantized already.*as-is"):
        convert(quantized, tmp_path / "m.onnx", precision, samples=_feeds())


def test_a_model_with_halves_already_is_refused(tmp_path: Path) -> None:
    convert(DIGITS / "1" / "model.onnx", tmp_path / "h.onnx", "fp16")
    with pytest.raises(PrecisionError, match="16-bit weights already"):
        convert(tmp_path / "h.onnx", tmp_path / "m.onnx", "fp16")


def test_int8_without_samples_or_without_operators_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match=r"samples|quantizer refuses"):
        convert(DIGITS / "1" / "model.onnx", tmp_path / "m.onnx", "int8")
    plain = graphs.write(
        tmp_path / "p.onnx",
        [helper.make_node("Relu", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, ["batch", 4])},
        {"y": (TensorProto.FLOAT, ["batch", 4])},
    )
    with pytest.raises(PrecisionError, match="none of the operators"):
        convert(plain, tmp_path / "m.onnx", "int8", samples=[{"x": np.zeros((1, 4), np.float32)}])
    assert not (tmp_path / "m.onnx").exists()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.onnx").write_bytes(b"nothing")
    with pytest.raises(PrecisionError, match="cannot be read"):
        convert(tmp_path / "s.onnx", tmp_path / "m.onnx", "fp16")
    with pytest.raises(PrecisionError, match="known are fp16"):
        convert(DIGITS / "1" / "model.onnx", tmp_path / "m.onnx", "fp8")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("written", ["onnx.save", "onnx.load"])
def test_a_disk_that_is_full_or_fails_is_not_the_model_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, written: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(written, full)
    with pytest.raises(OSError, match="No space left"):
        convert(DIGITS / "1" / "model.onnx", tmp_path / "m.onnx", precision, samples=_feeds())
    assert list(tmp_path.iterdir()) == []


def test_int8_leaves_no_temporary_files_and_needs_no_room_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is no such folder"))
    (tmp_path / "staging").mkdir()
    convert(DIGITS / "1" / "model.onnx", tmp_path / "staging" / "m.onnx", "int8", samples=_feeds())
    assert [file.name for file in (tmp_path / "staging").iterdir()] == ["m.onnx"]
    assert tempfile.tempdir == str(tmp_path / "there is no such folder")
