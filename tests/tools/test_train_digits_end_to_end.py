"""The whole command, with real training: needs Keras and torch, which `make test` does not install.

Runs the script with the interpreter that runs the tests, in processes of its own: torch stays out of the other tests, and what is
tested is what a user starts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tools import train_digits
from tools.digits import dataset

MISSING = [name for name in ("keras", "torch", "sklearn") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install '.[train]')"),
]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, train_digits.__file__, "--output", str(tmp_path / "digits"), *arguments],
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def read_terminal(descriptor: int) -> bytes:
    """What the other side wrote, or nothing once it has hung up (which Linux reports as EIO)."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def small_mnist(path: Path) -> Path:
    """An .npz of 28×28 pictures drawn here: class d is a bright row at height 2d+4 on a noisy ground; plus unsound ones."""
    random = np.random.default_rng(11)
    labels = np.tile(np.arange(10), 30)
    images = random.integers(0, 40, (300, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4, 3:25] = 230
    images[299] = images[289]  # a duplicate within the test part
    labels = labels.astype(np.int64)
    labels[5] = -1
    np.savez(path, x_train=images[:240], y_train=labels[:240], x_test=images[240:], y_test=labels[240:])
    return path


def test_two_epochs_give_a_complete_folder_and_a_second_run_a_second_version_with_the_same_bytes(tmp_path):
    first = run(tmp_path, "--epochs", "2", "--minimum-accuracy", "0.8", "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    folder = tmp_path / "digits"
    assert told["sha256"] == hashlib.sha256((folder / "1" / "model.onnx").read_bytes()).hexdigest()
    assert told["accuracy"] >= 0.8
    assert max(told["max_abs_diff"].values()) < 1e-4
    assert [epoch["number"] for epoch in told["epochs"]] == [1, 2]
    for stage in (
        "1/7 data",
        "2/7 cleaning",
        "3/7 conversion",
        "4/7 training",
        "5/7 evaluation",
        "6/7 export",
        "7/7 parity",
    ):
        assert stage in first.stderr
    assert "\r" not in first.stderr, "a progress bar was drawn although stderr is no terminal"
    assert not list((tmp_path / "home").iterdir()), "something was written to the home directory"

    again = run(tmp_path, "--epochs", "2", "--minimum-accuracy", "0.8", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["version"] == 2
    assert (folder / "2" / "model.onnx").read_bytes() == (folder / "1" / "model.onnx").read_bytes()
    assert "Version 2" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_terminal_gets_a_progress_bar(tmp_path):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    with subprocess.Popen(
        [sys.executable, train_digits.__file__, "--output", str(tmp_path / "digits"), "--epochs", "1", "--seed", "2"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as command:
        os.close(theirs)
        shown = b"".join(iter(partial(read_terminal, ours), b"")).decode()
    os.close(ours)
    assert command.returncode in (0, 1)
    assert "\r  training: " in shown
    assert "40/40" in shown


def test_an_inaccurate_model_is_not_written(tmp_path):
    done = run(tmp_path, "--epochs", "1", "--optimizer", "sgd", "--learning-rate", "1e-6")
    assert done.returncode == 1
    assert "is below --minimum-accuracy 0.93; nothing was written" in done.stderr
    assert not (tmp_path / "digits").exists()


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_ones_own_pictures_can_be_trained_on_with_squared_error(tmp_path, optimizer):
    data = small_mnist(tmp_path / "mine.npz")
    done = run(
        tmp_path,
        "--data",
        str(data),
        "--loss",
        "mean-squared-error",
        "--optimizer",
        optimizer,
        "--epochs",
        "8",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["data"]["unlabeled"] == 1
    assert told["data"]["duplicates"] == 1
    assert told["pictures"]["test"] == 59
    assert told["hyperparameters"]["loss"] == "mean-squared-error"
    card = (tmp_path / "digits" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert dataset.USER_PROVENANCE in card
    assert "as the source set it aside" in card


def test_the_bundled_digits_are_the_1797_that_the_card_speaks_of():
    read = dataset.read(None)
    assert len(read.images) == 1797
    assert {image.shape for image in read.images} == {(8, 8)}
    assert np.stack(read.images).max() == read.peak
