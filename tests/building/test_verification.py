"""The gate with real engines: what agrees passes, what does not fails with its number, and nothing passes unseen."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.building import report
from appliance.building.comparison import Classification, Regression
from appliance.building.verification import Report, VerificationError, VerifyOrder, generate, verify
from appliance.core.manifest import (
    BatchingManifest,
    ModelManifest,
    OnnxRuntimeManifest,
    PreprocessingManifest,
    ShapeRange,
    VerifyManifest,
)
from appliance.core.tensor import DataType, TensorSpec
from appliance.engines.base import EngineError, EngineOptions, EngineTraits
from tests.building import graphs

IDENTITY = np.eye(4)


def _order(reference: Path, candidate: Path, **manifest: object) -> VerifyOrder:
    wanted = ModelManifest(**manifest)  # type: ignore[arg-type]  # the tests name its fields
    options = EngineOptions(
        "onnxruntime", str(candidate), "cpu", wanted.batching.max_batch_size, 1, OnnxRuntimeManifest(), {}
    )
    return VerifyOrder("m", "1", "candidate", str(reference), options, wanted, (), str(reference.parent))


def _linear(folder: Path, name: str, weight: np.ndarray, **kind: int) -> Path:
    return graphs.linear(folder / f"{name}.onnx", weight, np.zeros(weight.shape[1]), **kind)


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    found = verify(_order(model, model))
    assert found.passed
    assert found.rows == 16
    assert found.outputs[0].max_absolute == 0
    assert found.invariance[0].max_relative <= 1e-4
    assert found.reference_s > 0
    assert found.inputs == "generated, seed 20"


def test_wrong_weights_fail_with_their_numbers(tmp_path: Path) -> None:
    wrong = IDENTITY.copy()
    wrong[0, 0] = 1.5
    found = verify(_order(_linear(tmp_path, "a", IDENTITY), _linear(tmp_path, "b", wrong)))
    assert not found.passed
    assert found.failures[0].startswith("output 'y': largest relative error is 0.")
    assert found.failures[0].endswith("0.001 is allowed")


def test_the_manifest_may_allow_more(tmp_path: Path) -> None:
    wrong = IDENTITY * 1.01
    files = _linear(tmp_path, "a", IDENTITY), _linear(tmp_path, "b", wrong)
    assert not verify(_order(*files)).passed
    assert verify(_order(*files, verify=VerifyManifest(max_relative=0.02))).passed


def test_rows_that_depend_on_their_batch_are_found(tmp_path: Path) -> None:
    model = graphs.mixes_rows(tmp_path / "m.onnx")
    found = verify(_order(model, model))
    assert found.outputs[0].max_absolute == 0
    assert [text for text in found.failures if text.startswith("alone and in a batch: output 'y'")]


def test_another_face_is_a_failure_that_names_it(tmp_path: Path) -> None:
    reference = _linear(tmp_path, "a", IDENTITY)
    found = verify(_order(reference, _linear(tmp_path, "b", np.ones((4, 4)), batch=3)))
    assert not found.passed
    other = graphs.write(
        tmp_path / "c.onnx",
        [helper.make_node("Relu", ["x"], ["z"])],
        {"x": (TensorProto.FLOAT, ["batch", 4])},
        {"z": (TensorProto.FLOAT, ["batch", 4])},
    )
    assert verify(_order(reference, other)).failures == ("output 'y' is missing", "output 'z' is not in the model")


def test_a_candidate_that_cannot_be_loaded_fails_and_a_reference_that_cannot_is_an_error(tmp_path: Path) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    broken = tmp_path / "b.onnx"
    broken.write_bytes(b"nothing")
    found = verify(_order(model, broken))
    assert not found.passed
    assert found.failures[0].startswith("the engine cannot be loaded")
    with pytest.raises(EngineError):
        verify(_order(broken, model))


def test_golden_inputs_are_used_in_whole_and_in_batches_that_fit(tmp_path: Path) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    (tmp_path / "golden").mkdir()
    np.savez(tmp_path / "golden" / "a.npz", x=np.ones((20, 4), np.float32))
    found = verify(_order(model, model, batching=BatchingManifest(max_batch_size=8)))
    assert (found.rows, found.inputs) == (20, "1 file(s) of golden inputs")


@pytest.mark.parametrize(
    ("arrays", "said"), [({"z": np.zeros((1, 4))}, "has no array 'x'"), ({"x": np.zeros((1, 5))}, r"\[1, 5\] came")]
)
def test_golden_inputs_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    (tmp_path / "golden").mkdir()
    np.savez(tmp_path / "golden" / "a.npz", **arrays)
    with pytest.raises(VerificationError, match=rf"golden/a\.npz.*{said}"):
        verify(_order(model, model))


def test_strings_need_golden_inputs(tmp_path: Path) -> None:
    model = graphs.write(
        tmp_path / "s.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": (TensorProto.STRING, ["batch", 2])},
        {"y": (TensorProto.STRING, ["batch", 2])},
    )
    with pytest.raises(VerificationError, match="takes strings: put golden inputs"):
        verify(_order(model, model))


def _labelled(tmp_path: Path) -> Path:
    rows = np.eye(4, dtype=np.float32)
    np.savez(tmp_path / "labelled.npz", x=np.concatenate([rows, rows]), y=np.array([0, 1, 2, 3, 0, 1, 2, 0]))
    return tmp_path


def test_labelled_samples_give_the_metric_of_both_and_the_drop_decides(tmp_path: Path) -> None:
    _labelled(tmp_path)
    swapped = IDENTITY.copy()
    swapped[[2, 3]] = swapped[[3, 2]]
    files = _linear(tmp_path, "a", IDENTITY), _linear(tmp_path, "b", swapped)
    loose = VerifyManifest(max_relative=10, min_cosine=0.01, samples="labelled.npz", metric_drop=0.1)
    found = verify(_order(*files, verify=loose))
    assert isinstance(found.metric_reference, Classification)
    assert isinstance(found.metric_candidate, Classification)
    assert found.metric_reference.accuracy == pytest.approx(7 / 8)
    assert found.metric_candidate.accuracy == pytest.approx(4 / 8)
    assert "accuracy falls from 0.8750 to 0.5000; a drop of 0.1 is allowed" in found.failures
    within = VerifyManifest(max_relative=10, min_cosine=0.01, samples="labelled.npz", metric_drop=0.5)
    assert not [text for text in verify(_order(*files, verify=within)).failures if "accuracy" in text]


def test_targets_give_a_regressions_metric(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.eye(4, dtype=np.float32), target=np.eye(4) * 1.1)
    files = _linear(tmp_path, "a", IDENTITY), _linear(tmp_path, "b", IDENTITY * 0.9)
    found = verify(_order(*files, verify=VerifyManifest(max_relative=1, samples="t.npz")))
    assert isinstance(found.metric_reference, Regression)
    assert found.metric_reference.mse == pytest.approx(0.01 * 4 / 16)
    assert any("mean squared error grows" in text for text in found.failures)


@pytest.mark.parametrize("place", ["../outside", "missing"])
def test_samples_outside_or_missing_are_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path.parent / "outside").mkdir(exist_ok=True)
    model = _linear(tmp_path, "a", IDENTITY)
    with pytest.raises(VerificationError, match=r"outside the model's folder|is not there"):
        verify(_order(model, model, verify=VerifyManifest(samples=place)))


def _traits(*inputs: TensorSpec, batched: bool = True) -> EngineTraits:
    return EngineTraits("p", "b", "c", "cpu", inputs, (), batched, 32 if batched else 1)


def test_generated_inputs_are_the_same_each_time_and_fit_the_model() -> None:
    traits = _traits(
        TensorSpec("p", DataType.UINT8, (-1, 16, 16, 3)),
        TensorSpec("f", DataType.FP32, (-1, 7)),
        TensorSpec("i", DataType.INT64, (-1, 2)),
    )
    first, second = (generate(traits, PreprocessingManifest(), {}, 16) for _ in range(2))
    assert len(first) == 1
    for name, array in first[0].items():
        np.testing.assert_array_equal(array, second[0][name])
    assert first[0]["p"].shape == (16, 16, 16, 3)
    assert first[0]["p"].max() > 150
    assert set(np.unique(first[0]["i"])) == {0, 1}


def test_an_unbatched_model_gets_runs_instead_of_rows() -> None:
    found = generate(_traits(TensorSpec("f", DataType.FP32, (3, 7)), batched=False), PreprocessingManifest(), {}, 5)
    assert [feed["f"].shape for feed in found] == [(3, 7)] * 5


def test_a_report_survives_its_json_and_its_page_says_what_it_says(tmp_path: Path) -> None:
    _labelled(tmp_path)
    files = _linear(tmp_path, "a", IDENTITY), _linear(tmp_path, "b", IDENTITY * 1.2)
    found = verify(_order(*files, verify=VerifyManifest(samples="labelled.npz")))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Report) == found
    page = report.page(found)
    assert "failed: it does not serve" in page
    assert "<svg" in page
    assert 'class="confusion"' in page
    assert found.failures[0].replace("'", "&#x27;") in page
    assert "<script" not in page


def test_a_page_escapes_what_a_model_calls_its_outputs(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    model = graphs.write(
        tmp_path / "n.onnx",
        [helper.make_node("Relu", ["x"], [nasty])],
        {"x": (TensorProto.FLOAT, ["batch", 4])},
        {nasty: (TensorProto.FLOAT, ["batch", 4])},
    )
    assert nasty not in report.page(verify(_order(model, model)))


def _embedding(file: Path, count: int) -> Path:
    table = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    return graphs.write(
        file,
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        {"ids": (TensorProto.INT64, ["batch", "length"])},
        {"y": (TensorProto.FLOAT, ["batch", "length", 3])},
        {"table": table},
    )


def test_generated_inputs_keep_to_the_declared_ranges_of_values_and_sizes(tmp_path: Path) -> None:
    traits = _traits(TensorSpec("ids", DataType.INT64, (-1, -1)), TensorSpec("f", DataType.FP32, (-1, 2)))
    shapes = {"ids": ShapeRange(min=(1, 4), opt=(4, 8), max=(8, 16))}
    found = generate(traits, PreprocessingManifest(), shapes, 64, {"ids": (5, 9), "f": (-1, -0.5)})
    assert {feed["ids"].shape for feed in found} == {(8, 8), (8, 4), (8, 16)}
    ids = np.concatenate([feed["ids"].reshape(-1) for feed in found])
    assert set(ids) == {5, 6, 7, 8, 9}
    assert all(((feed["f"] >= -1) & (feed["f"] <= -0.5)).all() for feed in found)


def test_an_error_that_only_high_ids_show_is_found_when_their_range_is_declared(tmp_path: Path) -> None:
    model, other = _embedding(tmp_path / "a.onnx", 50), _embedding(tmp_path / "b.onnx", 50)
    graph = onnx.load(other)
    table = numpy_helper.to_array(graph.graph.initializer[0]).copy()
    table[40] = -1000
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    onnx.save(graph, other)
    assert verify(_order(model, other)).passed
    assert not verify(_order(model, other, verify=VerifyManifest(ranges={"ids": (0, 49)}))).passed


def test_bounds_and_sizes_that_make_no_sense_are_named(tmp_path: Path) -> None:
    traits = _traits(TensorSpec("ids", DataType.INT64, (-1, -1)))
    with pytest.raises(VerificationError, match="lowest value 9 above its highest, 5"):
        generate(traits, PreprocessingManifest(), {}, 4, {"ids": (9, 5)})
    with pytest.raises(VerificationError, match=r"'ids' has 1 axes, the model's input has 2"):
        generate(traits, PreprocessingManifest(), {"ids": ShapeRange(min=(1,), max=(2,))}, 4)


def test_a_model_of_a_fixed_batch_gets_its_metric_from_padded_batches(tmp_path: Path) -> None:
    _labelled(tmp_path)
    model = _linear(tmp_path, "a", IDENTITY, batch=3)
    found = verify(_order(model, model, verify=VerifyManifest(samples="labelled.npz")))
    assert found.passed
    assert isinstance(found.metric_candidate, Classification)
    assert (found.metric_candidate.samples, found.metric_candidate.accuracy) == (8, pytest.approx(7 / 8))


def test_values_that_are_not_finite_fail_unless_the_reference_has_them_too(tmp_path: Path) -> None:
    def divided(name: str, by: float) -> Path:
        return graphs.write(
            tmp_path / name,
            [helper.make_node("Div", ["x", "d"], ["y"])],
            {"x": (TensorProto.FLOAT, ["batch", 4])},
            {"y": (TensorProto.FLOAT, ["batch", 4])},
            {"d": np.array([1, 1, 1, by], np.float32)},
        )

    whole, holed = divided("a.onnx", 1), divided("b.onnx", 0)
    assert "not finite" in verify(_order(whole, holed)).failures[0]
    assert verify(_order(holed, holed)).passed


def _roots(file: Path, weights: list[float]) -> Path:
    """y = root of x W: not a number where that is below 0."""
    return graphs.write(
        file,
        [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Sqrt", ["a"], ["y"])],
        {"x": (TensorProto.FLOAT, ["batch", 4])},
        {"y": (TensorProto.FLOAT, ["batch", 1])},
        {"w": np.array(weights, np.float32)[:, np.newaxis]},
    )


def _golden(folder: Path, **arrays: object) -> None:
    (folder / "golden").mkdir()
    np.savez(folder / "golden" / "a.npz", **arrays)  # type: ignore[arg-type]  # arrays by name


@pytest.mark.parametrize("labels", [{"target": np.full((8, 1), 0.014)}, {"labels": np.zeros(8, int)}])
def test_a_candidate_that_answers_nan_on_the_samples_only_fails(tmp_path: Path, labels: dict[str, np.ndarray]) -> None:
    rows = np.random.default_rng(1).random((8, 4), np.float32) + 1
    rows[:, 3] = 0
    _golden(tmp_path, x=rows)
    np.savez(tmp_path / "s.npz", x=np.ones((8, 4), np.float32), **labels)
    files = _roots(tmp_path / "a.onnx", [1, 1, 1, -2.9998]), _roots(tmp_path / "b.onnx", [1, 1, 1, -3.0002])
    found = verify(_order(*files, precision="int8", verify=VerifyManifest(samples="s.npz")))
    assert found.outputs[0].max_relative == 0
    assert (
        "on the samples: output 'y': 8 values are not finite where the reference is, or the reverse" in found.failures
    )
    assert any("the mean squared error must be a number" in text for text in found.failures) == ("target" in labels)
    assert not found.passed
    assert msgspec.json.decode(msgspec.json.encode(found), type=Report) == found
    assert "not finite" in report.page(found)
    assert found.summary


def test_answers_of_nan_alone_are_no_agreement(tmp_path: Path) -> None:
    model = _roots(tmp_path / "a.onnx", [1, 1, 1, 1])
    _golden(tmp_path, x=-np.ones((2, 4), np.float32))
    assert "nothing could be compared" in verify(_order(model, model)).failures[0]


@pytest.mark.parametrize("value", [1, 7, 0])
def test_rows_that_depend_on_their_batch_are_found_on_a_single_golden_row(tmp_path: Path, value: float) -> None:
    model = graphs.mixes_rows(tmp_path / "m.onnx")
    _golden(tmp_path, x=np.full((1, 4), value, np.float32))
    found = verify(_order(model, model))
    assert [text for text in found.failures if text.startswith("alone and in a batch: output 'y'")]
    assert msgspec.json.decode(msgspec.json.encode(found), type=Report) == found
    assert "not finite" in report.page(found)


def test_rows_that_depend_on_their_batch_are_found_on_a_single_generated_row(tmp_path: Path) -> None:
    model = graphs.mixes_rows(tmp_path / "m.onnx")
    assert not verify(_order(model, model, verify=VerifyManifest(inputs=1))).passed
    assert verify(_order(model, model, batching=BatchingManifest(max_batch_size=1))).passed


def test_a_single_row_is_varied_in_the_inputs_that_allow_it(tmp_path: Path) -> None:
    """Row i takes the element at its index: an index beyond the end is refused, so both inputs at once are."""
    model = graphs.write(
        tmp_path / "m.onnx",
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["d"]),
            helper.make_node("Gather", ["table", "i"], ["g"]),
            helper.make_node("Add", ["d", "g"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, ["batch", 1]), "i": (TensorProto.INT64, ["batch", 1])},
        {"y": (TensorProto.FLOAT, ["batch", 1])},
        {"table": np.array([3], np.float32)},
    )
    _golden(tmp_path, x=np.ones((1, 1), np.float32), i=np.zeros((1, 1), np.int64))
    found = verify(_order(model, model))
    assert [text for text in found.failures if text.startswith("alone and in a batch: output 'y'")]


def test_a_single_row_that_the_model_takes_no_variation_of_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    model = graphs.write(
        tmp_path / "s.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": (TensorProto.STRING, ["batch", 2])},
        {"y": (TensorProto.STRING, ["batch", 2])},
    )
    _golden(tmp_path, x=np.array([["a", "a"]]))
    with pytest.raises(VerificationError, match="at least two that differ"):
        verify(_order(model, model))


def test_damaged_golden_inputs_are_named(tmp_path: Path) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    _golden(tmp_path, x=np.zeros((9, 4), np.float32))
    file = tmp_path / "golden" / "a.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(VerificationError, match=r"golden/a\.npz is no \.npz that can be read"):
        verify(_order(model, model))


def _sum(file: Path) -> Path:
    return graphs.write(
        file,
        [helper.make_node("Add", ["a", "b"], ["y"])],
        {"a": (TensorProto.FLOAT, ["batch", 4]), "b": (TensorProto.FLOAT, ["batch", 4])},
        {"y": (TensorProto.FLOAT, ["batch", 4])},
    )


def test_golden_arrays_of_different_lengths_are_named_with_them(tmp_path: Path) -> None:
    model = _sum(tmp_path / "a.onnx")
    _golden(tmp_path, a=np.zeros((4, 4)), b=np.zeros((2, 4)))
    with pytest.raises(VerificationError, match=r"golden/a\.npz: .* different numbers of rows: 'a' 4, 'b' 2"):
        verify(_order(model, model))


def test_a_golden_file_without_rows_is_no_reason_to_make_some_up(tmp_path: Path) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    _golden(tmp_path, x=np.zeros((0, 4), np.float32))
    with pytest.raises(VerificationError, match=r"golden/a\.npz holds no row"):
        verify(_order(model, model))


def test_golden_inputs_of_an_unbatched_model_need_no_rows(tmp_path: Path) -> None:
    model = graphs.write(
        tmp_path / "a.onnx",
        [helper.make_node("Mul", ["a", "b"], ["y"])],
        {"a": (TensorProto.FLOAT, []), "b": (TensorProto.FLOAT, [3])},
        {"y": (TensorProto.FLOAT, [3])},
    )
    _golden(tmp_path, a=np.float32(2), b=np.ones(3, np.float32))
    assert verify(_order(model, model)).passed


@pytest.mark.parametrize(
    ("arrays", "labels", "said"),
    [
        ({}, (), r"\[verify\] samples names 's\.npz', where nothing has a label or a target"),
        ({"labels": np.array([0, 1, 99])}, (), r"s\.npz\[2\] has the label 99, the classes are 0 to 3"),
        ({"labels": np.array([0, 1, 2])}, ("a", "b"), "2 labels, and its answers have 4 scores"),
        ({"labels": np.array([0.5, 1, 2])}, (), r"'labels' must hold a whole number a row.*; 0\.5 came in row 0"),
        ({"labels": np.array(["a", "b", "c"])}, (), "'labels' must hold a whole number a row"),
        ({"labels": np.eye(3)}, (), r"'labels' must hold a whole number a row.* of shape \[3, 3\] came"),
        ({"target": np.full((3, 4), np.nan)}, (), "'target' must hold finite numbers"),
        ({"target": np.zeros((3, 5))}, (), "a target has 5 values and its prediction 4"),
    ],
)
def test_samples_that_give_no_metric_are_refused_with_the_reason(
    tmp_path: Path, arrays: dict[str, np.ndarray], labels: tuple[str, ...], said: str
) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    np.savez(tmp_path / "s.npz", x=np.ones((3, 4), np.float32), **arrays)
    order = _order(model, model, verify=VerifyManifest(samples="s.npz"))
    with pytest.raises(VerificationError, match=said):
        verify(msgspec.structs.replace(order, labels=labels))


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"nope": (0, 1)}, "names 'nope', which is no input of the model; it has 'i', 'h'"),
        ({"i": (0, 300)}, "'i' is INT8, which does not hold 0 to 300"),
        ({"i": (0.5, 1)}, "'i' is INT8, which does not hold 0.5 to 1"),
        ({"h": (0, 1e6)}, r"'h' is FP16, which does not hold 0 to 1e\+06"),
    ],
)
def test_ranges_of_nothing_and_beyond_the_datatype_are_refused(
    ranges: dict[str, tuple[float, float]], said: str
) -> None:
    traits = _traits(TensorSpec("i", DataType.INT8, (-1, 2)), TensorSpec("h", DataType.FP16, (-1, 2)))
    with pytest.raises(VerificationError, match=said):
        generate(traits, PreprocessingManifest(), {}, 4, ranges)


def test_ranges_of_nothing_are_refused_beside_golden_inputs_too(tmp_path: Path) -> None:
    model = _linear(tmp_path, "a", IDENTITY)
    _golden(tmp_path, x=np.ones((2, 4), np.float32))
    with pytest.raises(VerificationError, match="names 'nope'"):
        verify(_order(model, model, verify=VerifyManifest(ranges={"nope": (0, 1)})))
