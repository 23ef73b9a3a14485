"""The command's options, exit codes and messages, and the folder's files, as far as they need no training."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from appliance.core.manifest import ModelManifest
from tools import train_digits
from tools.digits import card, dataset, evaluation, network, preparation
from tools.digits.cost import Cost
from tools.digits.export import Parity

SCRIPT = Path(train_digits.__file__)


def facts(**changes: object) -> card.Facts:
    """Facts of a made-up training whose test labels are 0..9 twice, with one mistake: the first 3 was read as an 8."""
    labels = np.tile(np.arange(10), 2)
    predicted = labels.copy()
    predicted[3] = 8
    source = dataset.Dataset("mnist.npz", dataset.USER_PROVENANCE, [], np.zeros(0), np.zeros(0, dtype=np.bool_), 255.0)
    given = {
        "version": 4,
        "sha256": "ab" * 32,
        "onnx_bytes": 5,
        "nodes": ["Conv", "Softmax"],
        "parameter_count": 693962,
        "dataset": source,
        "cleaning": preparation.CleaningReport(1200, 1, 2, 3, 4, 5),
        "parts": (900, 100, 185),
        "hyperparameters": network.Hyperparameters(seed=42),
        "learning_rate": 0.001,
        "epochs": [network.Epoch(1, 0.5, 0.8, 0.4, 0.9)],
        "evaluation": evaluation.evaluate(labels, np.eye(10, dtype=np.float32)[predicted]),
        "parity": Parity({1: 1e-7, 7: 2e-7, 20: 3e-7}),
        "cost": Cost(9.0, 17.0, None),
        "threads": 2,
        "versions": {"keras": "3.15.1"},
    }
    return card.Facts(**(given | changes))


@pytest.fixture
def trained() -> train_digits.Trained:
    labels = np.tile(np.arange(10), 4)
    predicted = labels.copy()
    predicted[3] = 8
    images = np.random.default_rng(5).random((40, 28, 28, 1), dtype=np.float32)
    return train_digits.Trained(b"model", images, labels, np.eye(10, dtype=np.float32)[predicted], facts())


def test_the_script_runs_as_a_file_and_describes_itself():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True, timeout=60)
    for option in (
        "--optimizer",
        "--learning-rate",
        "--epochs",
        "--batch-size",
        "--loss",
        "--seed",
        "--data",
        "--output",
    ):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lion"], "invalid choice: 'lion'"),
        (["--loss", "hinge"], "invalid choice: 'hinge'"),
        (["--epochs", "0"], "must be above 0, not 0"),
        (["--epochs", "1.5"], "invalid whole number value: '1.5'"),
        (["--learning-rate", "nan"], "must be above 0, not nan"),
        (["--learning-rate", "inf"], "must be above 0, not inf"),
        (["--seed", "-1"], "must be above -1, not -1"),
    ],
)
def test_a_wrong_option_ends_with_2_and_says_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train_digits.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_data_that_cannot_be_used_ends_with_2_and_writes_nothing(tmp_path, capsys):
    code = train_digits.main(["--data", str(tmp_path / "absent.npz"), "--output", str(tmp_path / "digits")])
    assert code == 2
    assert "absent.npz does not exist" in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()


def test_an_output_that_is_no_model_folder_is_refused_before_any_training(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert train_digits.main(["--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "holds other things than a model" in captured.err
    assert "data:" not in captured.err


def test_the_manifest_is_one_that_the_appliance_reads():
    manifest = msgspec.toml.decode(train_digits.MANIFEST, type=ModelManifest)
    assert manifest.labels == "labels.txt"
    assert manifest.batching.max_batch_size == 32


def test_the_folder_is_complete(trained):
    files = train_digits.model_files(trained)
    assert sorted(files) == sorted(
        ["model.toml", "labels.txt", "4/model.onnx", "confusion_matrix.png", "MODEL_CARD.md"]
        + ["golden/batch_1.npz", "golden/batch_32.npz"]
        + [f"samples/{digit}.png" for digit in range(10)]
    )
    assert files["4/model.onnx"] == b"model"
    assert files["labels.txt"].split() == [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"9"]


def test_golden_files_hold_inputs_expected_scores_and_labels(trained):
    with np.load(io.BytesIO(train_digits.model_files(trained)["golden/batch_32.npz"])) as golden:
        np.testing.assert_array_equal(golden["image"], trained.test_images[:32])
        np.testing.assert_array_equal(golden["scores"], trained.test_scores[:32])
        np.testing.assert_array_equal(golden["labels"], trained.test_labels[:32])


def test_a_sample_is_a_picture_that_the_model_reads_right(trained):
    files = train_digits.model_files(trained)
    # The first 3 (row 3) is misread, so the second (row 13) is the sample; the first 4 is right.
    assert files["samples/3.png"] == train_digits.picture.digit_png(trained.test_images[13])
    assert files["samples/4.png"] == train_digits.picture.digit_png(trained.test_images[4])


def test_the_card_tells_the_facts():
    text = card.render(facts())
    for said in (
        "Version 4",
        f"`4/model.onnx` | 5 | `{'ab' * 32}`",
        "693,962 parameters",
        "2 nodes: Conv, Softmax",
        "| 1,200 | 1 | 2 | 3 | 4 | 5 | 1,185 |",
        "Training 900, validation 100, test 185",
        "learning rate 0.001, loss cross-entropy, 10 epochs, batches of 32, seed 42",
        "| 1 | 0.5000 | 0.8000 | 0.4000 | 0.9000 |",
        "| 3 | 1.0000 | 0.5000 | 0.6667 | 2 |",
        "| 8 | 0.6667 | 1.0000 | 0.8000 | 2 |",
        "Accuracy **0.9500**",
        "at most 3.0e-07 (batches of 1, 7, 20;",
        "Energy: not measured",
        "keras 3.15.1",
        "(confusion_matrix.png)",
        dataset.USER_PROVENANCE,
    ):
        assert said in text


def test_the_card_names_source_and_licence_of_the_bundled_digits_and_their_limits():
    source = dataset.Dataset("digits", dataset.BUNDLED_PROVENANCE, [], np.zeros(0), np.zeros(0, dtype=np.bool_), 16.0)
    text = card.render(facts(dataset=source))
    for said in ("Alpaydin", "CC BY 4.0", "1,797", "8×8", "13 writers"):
        assert said in text
    assert "13 writers" not in card.render(facts())


def test_measured_energy_is_told_in_joules_and_watt_hours():
    assert "180 J (0.050 Wh)" in card.render(facts(cost=Cost(9.0, 17.0, 180.0)))


def test_the_summary_is_plain_json_with_the_metrics(tmp_path):
    told = json.loads(json.dumps(train_digits.summary(facts(), tmp_path)))
    assert told["accuracy"] == pytest.approx(0.95)
    assert told["classes"][3] == {
        "class": 3,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "pictures": 2,
    }
    assert told["confusion"][3][8] == 1
    assert told["data"]["kept"] == 1185
    assert told["hyperparameters"]["learning_rate"] == 0.001


def test_the_table_has_a_row_per_class_the_macro_row_and_the_accuracy():
    lines = train_digits.table(facts()).splitlines()
    assert len(lines) == 13
    assert lines[4].split() == ["3", "1.0000", "0.5000", "0.6667", "2"]
    assert lines[11].split()[0] == "macro"
    assert lines[12] == "accuracy 0.9500"


def test_cleaning_is_described_by_the_counts_that_are_not_zero():
    report = preparation.CleaningReport(10, 0, 0, 2, 0, 1)
    assert train_digits.describe_cleaning(report) == "7 kept, dropped: 2 out of range, 1 duplicates"
    assert train_digits.describe_cleaning(preparation.CleaningReport(10, 0, 0, 0, 0, 0)) == "10 kept, none dropped"
