"""The committed `models/digits`, held to its own golden files, samples, labels and card."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from appliance.core.manifest import ModelManifest

FOLDER = Path(__file__).parents[2] / "models" / "digits"
MODEL = FOLDER / "1" / "model.onnx"


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / "golden" / name, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.mark.parametrize(("name", "size"), [("batch_1.npz", 1), ("batch_32.npz", 32)])
def test_golden_inputs_give_the_golden_scores_and_nearly_all_labels(session, name, size):
    expected = golden(name)
    assert expected["image"].shape == (size, 28, 28, 1)
    assert expected["image"].dtype == np.float32
    (scores,) = session.run(["scores"], {"image": expected["image"]})
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-4)
    assert (scores.argmax(axis=1) == expected["labels"]).mean() >= 0.93


def test_input_and_output_are_named_and_their_batch_axis_is_free(session):
    (given_input,), (given_output,) = session.get_inputs(), session.get_outputs()
    assert (given_input.name, given_input.type, given_input.shape) == ("image", "tensor(float)", ["batch", 28, 28, 1])
    assert (given_output.name, given_output.type, given_output.shape) == ("scores", "tensor(float)", ["batch", 10])


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_rows_of_a_batch_do_not_influence_each_other(session, size):
    expected = golden("batch_32.npz")
    (scores,) = session.run(["scores"], {"image": expected["image"][:size]})
    np.testing.assert_allclose(scores, expected["scores"][:size], atol=1e-4)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-5)


def test_the_graph_is_valid_and_can_be_read_by_older_runtimes():
    model = onnx.load(MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert [(opset.domain, opset.version <= 20) for opset in model.opset_import] == [("", True)]
    assert not [node.op_type for node in model.graph.node if node.domain or node.op_type == "Cast"]


def test_the_card_names_this_very_file():
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    content = MODEL.read_bytes()
    assert f"| `1/model.onnx` | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |" in card


def test_the_manifest_and_the_labels_are_what_the_appliance_expects():
    manifest = msgspec.toml.decode((FOLDER / "model.toml").read_bytes(), type=ModelManifest)
    labels = (FOLDER / manifest.labels).read_text(encoding="ascii").splitlines()
    assert labels == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("digit", range(10))
def test_a_sample_is_read_as_the_digit_that_it_is_named_after(session, digit):
    image = Image.open(FOLDER / "samples" / f"{digit}.png")
    assert (image.mode, image.size) == ("L", (28, 28))
    pixels = np.asarray(image, dtype=np.float32)[None, :, :, None] / 255
    (scores,) = session.run(["scores"], {"image": pixels})
    assert int(scores.argmax()) == digit


def test_the_folder_stays_small_enough_to_be_committed():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 3_200_000
