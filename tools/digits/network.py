"""The network that every newcomer knows, in Keras on torch: build it, train it, ask it.

The only module that trains. Imports Keras and torch when called, so that the other stages can be used without them.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import CLASS_COUNT, IMAGE_SIDE, INPUT_NAME, OUTPUT_NAME
from .errors import InputError

OPTIMIZERS = ("adam", "sgd", "rmsprop")
LOSSES = ("cross-entropy", "mean-squared-error")


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The knobs of a training run; `learning_rate` None leaves the optimizer's own default."""

    optimizer: str = "adam"
    learning_rate: float | None = None
    epochs: int = 10
    batch_size: int = 32
    loss: str = "cross-entropy"
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Epoch:
    """What the network achieved at the end of one epoch, on the training and on the validation pictures."""

    number: int
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"epoch {self.number}: loss {self.loss:.4f}, accuracy {self.accuracy:.4f}, "
            f"validation loss {self.validation_loss:.4f}, validation accuracy {self.validation_accuracy:.4f}"
        )


class Progress(Protocol):
    """Who is told how far training is."""

    def batch_done(self) -> None:
        """One more batch was trained on."""

    def epoch_done(self, epoch: Epoch) -> None:
        """One more epoch is complete."""

    def close(self) -> None:
        """Training ended, well or badly."""


class LineProgress:
    """One line per epoch, for logs and pipes."""

    def batch_done(self) -> None:
        """Say nothing: a log is no place for a bar."""

    def epoch_done(self, epoch: Epoch) -> None:
        """Print the epoch's line on stderr."""
        print(f"  {epoch}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to close."""


class BarProgress:
    """A bar over all batches, for a terminal."""

    def __init__(self, batch_count: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=batch_count, unit="batch", file=sys.stderr, desc="  training")

    def batch_done(self) -> None:
        """Advance the bar."""
        self._bar.update()

    def epoch_done(self, epoch: Epoch) -> None:
        """Print the epoch's line above the bar."""
        self._bar.write(f"  {epoch}", file=sys.stderr)

    def close(self) -> None:
        """Leave the full bar standing."""
        self._bar.close()


def progress_for_stderr(picture_count: int, hyperparameters: Hyperparameters) -> Progress:
    """Return a bar if stderr is a terminal, else lines."""
    if not sys.stderr.isatty():
        return LineProgress()
    return BarProgress(hyperparameters.epochs * math.ceil(picture_count / hyperparameters.batch_size))


def load_keras() -> Any:
    """Import Keras on the torch backend.

    Raises:
        InputError: one of them is not installed, or Keras was imported before with another backend.
    """
    os.environ["KERAS_BACKEND"] = "torch"
    try:
        import keras
        import torch
    except ImportError as error:
        raise InputError(f"training needs Keras and torch ({error}): pip install '.[train]'") from error
    if keras.backend.backend() != "torch":
        raise InputError(f"Keras runs on {keras.backend.backend()}; the ONNX export is only proven on torch")
    torch.use_deterministic_algorithms(True)
    return keras


def build(hyperparameters: Hyperparameters) -> Any:
    """Build and compile the network (28, 28, 1) → 10, its weights drawn from the seed."""
    keras = load_keras()
    keras.utils.set_random_seed(hyperparameters.seed)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((IMAGE_SIDE, IMAGE_SIDE, 1), name=INPUT_NAME),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(CLASS_COUNT, activation="softmax", name=OUTPUT_NAME),
        ],
        name="digits",
    )
    optimizer = keras.optimizers.get(hyperparameters.optimizer)
    if hyperparameters.learning_rate is not None:
        optimizer.learning_rate = hyperparameters.learning_rate
    sparse = hyperparameters.loss == "cross-entropy"
    model.compile(
        optimizer=optimizer,
        loss="sparse_categorical_crossentropy" if sparse else "mean_squared_error",
        metrics=["sparse_categorical_accuracy" if sparse else "categorical_accuracy"],
    )
    return model


def train(
    model: Any,
    training: tuple[NDArray[np.float32], NDArray[np.int64]],
    validation: tuple[NDArray[np.float32], NDArray[np.int64]],
    hyperparameters: Hyperparameters,
    progress: Progress,
) -> list[Epoch]:
    """Fit the network to pictures (count, 28, 28, 1) and labels (count,), and return what each epoch achieved."""
    epochs: list[Epoch] = []

    def on_epoch_end(number: int, logs: dict[str, float]) -> None:
        accuracy = next(name for name in logs if name.endswith("accuracy") and not name.startswith("val_"))
        epoch = Epoch(number + 1, logs["loss"], logs[accuracy], logs["val_loss"], logs[f"val_{accuracy}"])
        epochs.append(epoch)
        progress.epoch_done(epoch)

    callback = load_keras().callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: progress.batch_done(), on_epoch_end=on_epoch_end
    )
    try:
        model.fit(
            training[0],
            _targets(training[1], hyperparameters.loss),
            validation_data=(validation[0], _targets(validation[1], hyperparameters.loss)),
            epochs=hyperparameters.epochs,
            batch_size=hyperparameters.batch_size,
            callbacks=[callback],
            verbose=0,
        )
    finally:
        progress.close()
    return epochs


def predict(model: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the scores (count, 10) that the Keras network gives to pictures (count, 28, 28, 1)."""
    return np.asarray(model.predict(images, verbose=0), dtype=np.float32)


def _targets(labels: NDArray[np.int64], loss: str) -> NDArray[Any]:
    # Squared error needs the wanted scores themselves: 1 for the true class, 0 for the others.
    return labels if loss == "cross-entropy" else np.eye(CLASS_COUNT, dtype=np.float32)[labels]


def thread_count() -> int:
    """Return how many threads torch computes with; the weights depend on it in their last digits."""
    import torch

    return int(torch.get_num_threads())
