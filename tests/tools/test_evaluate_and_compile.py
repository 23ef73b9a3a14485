"""The two tools on the example model: a bare file becomes an engine with its report, and a running appliance is measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.building import graphs
from tests.e2e.house import ROOT, House
from tools import compile_model, evaluate

MODEL = ROOT / "models" / "digits" / "1" / "model.onnx"
GOLDEN = ROOT / "models" / "digits" / "golden" / "batch_32.npz"


def test_a_bare_file_becomes_an_engine_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine"
    given = [str(MODEL), "--precision", "int8", "--calibration", str(GOLDEN), "--samples", str(GOLDEN)]
    assert compile_model.main([*given, "--output", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["engine"], document["report"]["passed"]) == ("int8", True)
    assert document["report"]["metric_candidate"]["samples"] == 32
    assert {"model.onnx", "verification.json", "verification.html"} <= {file.name for file in out.iterdir()}
    assert not (out / "engine.json").exists()
    assert compile_model.main([*given, "--output", str(out)]) == 2


@pytest.mark.parametrize(("precision", "status"), [("int8", 2), ("bf16", 1)])
def test_what_cannot_be_built_leaves_nothing(tmp_path: Path, precision: str, status: int) -> None:
    assert compile_model.main([str(MODEL), "--precision", precision, "--output", str(tmp_path / "e")]) == status
    assert not (tmp_path / "e").exists()


def test_what_is_no_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    assert compile_model.main([str(tmp_path / "m.onnx")]) == 2
    assert "does not parse" in capsys.readouterr().err


def test_nobody_at_the_address_and_no_samples_have_their_own_exits(tmp_path: Path) -> None:
    assert evaluate.main(["digits", "http://127.0.0.1:9", str(GOLDEN)]) == 3
    assert evaluate.main(["digits", "tcp://127.0.0.1:9", str(GOLDEN), "--timeout", "0.2"]) == 3


def refused(folder: Path) -> list[tuple[list[str], str]]:
    """Arguments that fit the example model in no way, and what is said about each."""
    cut, labels = folder / "cut.npz", folder / "labels.txt"
    cut.write_bytes(GOLDEN.read_bytes()[:3000])
    labels.write_text("a\nb\n")
    other = graphs.linear(folder / "other.onnx", np.eye(4), np.zeros(4))
    return [
        ([str(cut)], "cut.npz is no .npz that can be read"),
        ([str(GOLDEN), "--labels", str(labels)], "2 labels, and its answers have 10 scores"),
        ([str(GOLDEN), "--reference", str(other)], "its inputs are x FP32, not"),
    ]


def test_a_model_whose_rows_depend_on_their_batch_is_reported_and_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = graphs.mixes_rows(tmp_path / "m.onnx")
    out = tmp_path / "e"
    assert compile_model.main([str(model), "--output", str(out), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["report"]["invariance"][0]
    assert (found["max_relative"], found["max_absolute"] > 0) == (None, True)
    assert {file.name for file in out.iterdir()} == {"verification.json", "verification.html"}


@pytest.mark.parametrize("way", ["http", "ipc"])
def test_a_running_appliance_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str) -> None:
    house = House(tmp_path / "house")
    house.digits()
    try:
        house.start()
        address = house.http if way == "http" else house.ipc
        page = tmp_path / "page.html"
        more = ["--batch", "4", "--top-k", "3", "--reference", str(MODEL), "--report", str(page), "--json"]
        assert evaluate.main(["digits", address, str(GOLDEN), "--repository", str(house.models), *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["samples"], found["answered"], found["passed"]) == (32, 32, True)
        truth, scores = np.load(GOLDEN)["labels"], np.load(GOLDEN)["scores"]
        assert found["metric"]["accuracy"] == pytest.approx(float(np.mean(scores.argmax(1) == truth)))
        assert found["outputs"][0]["max_relative"] < 1e-4
        assert "Answers beside the reference" in page.read_text()
        assert evaluate.main(["digits", address, str(GOLDEN), "--min-accuracy", "1.01"]) == 1
        assert evaluate.main(["digits", address, str(tmp_path / "nothing")]) == 2
        assert evaluate.main(["unknown", address, str(GOLDEN)]) != 0
        capsys.readouterr()
        for given, said in refused(tmp_path):
            assert evaluate.main(["digits", address, *given]) == 2
            assert said in capsys.readouterr().err
        assert house.stop() == 0
    finally:
        house.finish()
