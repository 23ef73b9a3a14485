"""What a library says reaches clients in words, without directories of this box and places in the library's source."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.manifest import OnnxRuntimeManifest
from appliance.engines.base import EngineError, EngineOptions
from appliance.engines.onnxruntime import OnnxRuntimeEngine
from appliance.engines.wording import clean

DIGITS = Path(__file__).parents[2] / "models" / "digits" / "1" / "model.onnx"


@pytest.mark.parametrize(
    ("said", "cleaned"),
    [
        (
            (
                "Load model from x failed:/onnxruntime_src/onnxruntime/core/graph/model_load_utils.h:46 void onnxruntime::utils::"
                "Validate(const std::unordered_map<std::basic_string<char>, int>&, bool, const std::string&) Opset 99 is too new."
            ),
            "Load model from x failed:Opset 99 is too new.",
        ),
        (
            (
                "running Reshape node. Name:'/a/b/Reshape' Status Message: /onnxruntime_src/core/reshape_helper.h:47 "
                "onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, bool) size was false. Not {1,2}"
            ),
            "running Reshape node. Name:'/a/b/Reshape' Status Message: size was false. Not {1,2}",
        ),
        (
            (
                "/src/a.cc:12 std::conditional_t<THRW, void, onnxruntime::Status> onnxruntime::CudaCall(E, const char*) "
                "[with E = cudaError; bool THRW = true] CUDA failure 2: out of memory"
            ),
            "CUDA failure 2: out of memory",
        ),
        ("/src/a.cc:1 onnxruntime::F::operator()(std::function<void(int)>)::<lambda(int)> const no", "no"),
        ("/src/a.cc:1 void onnxruntime::f(const std::function<void(int)>&, int) const no (really)", "no (really)"),
        ("/src/deep/a.cc:1 plain words (with more)", "a.cc:1 plain words (with more)"),
        ("/src/a.cc:1 void onnxruntime::f(never closed", ""),
        ('path: "/srv/models/m/1/../../../etc/passwd" in "/srv/models/m/1"', 'path: "passwd" in "1"'),
        (
            "Node (/layer.0/attention/MatMul) Op (MatMul) and /var/lib/appliance/x",
            "Node (/layer.0/attention/MatMul) Op (MatMul) and x",
        ),
        ("3/4 of a/b/c and https: nothing else", "3/4 of a/b/c and https: nothing else"),
    ],
)
def test_only_what_is_meant_for_people_is_left(said: str, cleaned: str) -> None:
    assert clean(said) == cleaned


@given(st.text("/a.c:1 ()[]<>'\"\n", max_size=200) | st.text(max_size=100))
def test_whatever_is_said_ends_in_words_that_are_no_longer(text: str) -> None:
    assert len(clean(text)) <= len(text)


def _options(file: Path) -> EngineOptions:
    return EngineOptions(
        "onnxruntime",
        str(file),
        device="cpu",
        max_batch_size=1,
        cores=1,
        onnxruntime=OnnxRuntimeManifest(),
        parameters={},
    )


def _refusal(file: Path) -> str:
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeEngine(_options(file))
    return str(caught.value)


def test_a_model_that_onnx_runtime_refuses_is_refused_without_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "with a blank" / "1"
    folder.mkdir(parents=True)
    model = onnx.load(DIGITS)
    model.opset_import[0].version = 99
    onnx.save(model, folder / "model.onnx")
    words = _refusal(folder / "model.onnx")
    assert "99" in words
    assert "/" not in words.replace("and/or", "")
    shutil.copy(DIGITS, folder / "model.onnx")
    model = onnx.load(DIGITS)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "../../../outside/w.bin"
    onnx.save(model, folder / "model.onnx")
    words = _refusal(folder / "model.onnx")
    assert "the model's folder" in words
    for part in (*tmp_path.parts[1:], "with a blank"):
        assert f"/{part}" not in words
