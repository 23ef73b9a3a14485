"""A bare ONNX file becomes an engine outside of any repository, wherever its weights lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.building import graphs
from tools import compile_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose weights lie in a folder beside it."""
    monkeypatch.setenv("APPLIANCE_CONFIG", str(tmp_path / "none.toml"))
    (tmp_path / "none.toml").write_text("")
    # ONNX Runtime's checks want weights of some size
    weights = np.random.default_rng(1).normal(size=(64, 8))
    whole = onnx.load(graphs.linear(tmp_path / "whole.onnx", weights, np.zeros(8)))
    (tmp_path / "bare" / "w" / "deep").mkdir(parents=True)
    file = tmp_path / "bare" / "linear.onnx"
    onnx.save(whole, file, save_as_external_data=True, location="w/deep/weights.bin", size_threshold=64)
    assert (file.parent / "w" / "deep" / "weights.bin").stat().st_size >= 64 * 8 * 4
    return file


def _answer(file: Path) -> np.ndarray:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(None, {"x": np.ones((1, 64), np.float32)})[0]
    return answer


@pytest.mark.parametrize("precision", ["fp16", "as-is"])
def test_weights_in_a_subfolder_come_along(
    model: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engine"
    arguments = [str(model), "--precision", precision, "--engine", "onnxruntime", "--output", str(output), "--json"]
    code = compile_model.main(arguments)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert json.loads(said.out)["report"]["passed"]
    np.testing.assert_allclose(_answer(output / "model.onnx"), _answer(model), atol=0.05)
    assert (output / "verification.html").is_file()
    assert not (output / "engine.json").exists()


def test_int8_without_calibration_names_the_argument_that_is_missing(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_model.main([str(model), "--precision", "int8"]) == 2
    words = capsys.readouterr().err
    assert "int8 needs calibration samples" in words
    assert "--calibration FOLDER" in words
    assert "model.toml" not in words
    assert not model.with_name("linear-engine").exists()
