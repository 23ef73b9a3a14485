"""Train the example model and write its folder: `python tools/train_digits.py --help`.

Drives the stages of `tools.digits` in order, says on stderr what each did, and prints the result on stdout. Nothing is
written unless every stage succeeded and the result is good enough.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, Python only knows its own folder

import numpy as np
import onnx
from numpy.typing import NDArray

from tools.digits import (
    CLASS_COUNT,
    INPUT_NAME,
    OUTPUT_NAME,
    card,
    cost,
    dataset,
    evaluation,
    export,
    folder,
    network,
    picture,
    preparation,
)
from tools.digits.errors import InputError, QualityError

ROOT = Path(__file__).resolve().parents[1]
GOLDEN_BATCHES = (1, 32)
SOFTWARE = ("keras", "torch", "scikit-learn", "numpy", "pillow", "onnx", "onnxruntime")
MANIFEST = """\
# Every key is optional: what is not said here is read from the ONNX file.
description = "Reads one handwritten digit, 28x28, light on dark (MODEL_CARD.md)"
labels = "labels.txt"

[batching]
max_batch_size = 32
"""


@dataclass(frozen=True, slots=True)
class Trained:
    """A network that passed all checks, with everything that its folder tells about it."""

    onnx_bytes: bytes
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    test_scores: NDArray[np.float32]
    facts: card.Facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if the result was not good enough, 2 if the input could not be used, 130 if interrupted."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("KERAS_HOME", scratch)  # Keras would otherwise leave a folder in the user's home
        try:
            target = Path(options.output)
            version = folder.choose_version(target, overwrite=options.overwrite)
            trained = train(options, version)
            folder.write(target, model_files(trained))
        except (InputError, QualityError) as error:
            print(f"train_digits: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("train_digits: stopped; nothing was written", file=sys.stderr)
            return 130
    say(f"wrote {target} (version {version}, {len(trained.onnx_bytes):,} bytes of ONNX)")
    result = summary(trained.facts, target)
    print(json.dumps(result, indent=2) if options.json else table(trained.facts))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and a usage line if it is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    defaults = network.Hyperparameters()
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="an .npz with x_train, y_train, x_test, y_test, or a directory with MNIST's four IDX files, gzipped or not "
        "(default: scikit-learn's bundled digits)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "models" / "digits",
        metavar="DIR",
        help="the model folder; one that exists gets a further version and keeps its model.toml (default: models/digits)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the newest version instead of adding one")
    parser.add_argument("--optimizer", choices=network.OPTIMIZERS, default=defaults.optimizer)
    parser.add_argument(
        "--learning-rate", type=number(float, above=0.0), metavar="RATE", help="default: the optimizer's own"
    )
    parser.add_argument("--epochs", type=number(int, above=0), default=defaults.epochs)
    parser.add_argument("--batch-size", type=number(int, above=0), default=defaults.batch_size)
    parser.add_argument("--loss", choices=network.LOSSES, default=defaults.loss)
    parser.add_argument("--seed", type=number(int, above=-1), default=defaults.seed)
    parser.add_argument(
        "--minimum-accuracy",
        type=number(float, above=-1.0),
        default=0.93,
        metavar="SHARE",
        help="write nothing and exit with 1 below this test accuracy (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


def number(kind: Callable[[str], float], *, above: float) -> Callable[[str], float]:
    """Return an argparse type: a number of this kind, finite and above a limit."""

    def convert(text: str) -> float:
        value = kind(text)
        if not above < value < 2**31:
            raise argparse.ArgumentTypeError(f"must be above {above:g}, not {text}")
        return value

    convert.__name__ = "number" if kind is float else "whole number"  # argparse shows it in its message
    return convert


def train(options: argparse.Namespace, version: int) -> Trained:
    """Run all stages but the writing.

    Raises:
        InputError: the data or the environment cannot be used.
        QualityError: too inaccurate, or ONNX Runtime and Keras disagree.
    """
    knobs = network.Hyperparameters(
        options.optimizer, options.learning_rate, options.epochs, options.batch_size, options.loss, options.seed
    )
    source = dataset.read(options.data)
    say(f"1/7 data: {len(source.images):,} pictures from {source.name}")
    pictures, cleaning = preparation.clean(source)
    say(f"2/7 cleaning: {describe_cleaning(cleaning)}")
    images = preparation.convert(pictures.images, source.peak)
    parts = preparation.split(pictures.labels, pictures.given_test, seed=knobs.seed)
    sizes = (len(parts.train), len(parts.validation), len(parts.test))
    say("3/7 conversion and split: training {:,}, validation {:,}, test {:,} pictures of 28×28".format(*sizes))

    say(f"4/7 training: {knobs.epochs} epochs of {knobs.optimizer} on {knobs.loss}, seed {knobs.seed}")
    model = network.build(knobs)
    training, validation, test = (
        (images[rows], pictures.labels[rows]) for rows in (parts.train, parts.validation, parts.test)
    )
    progress = network.progress_for_stderr(sizes[0], knobs)
    epochs, spent = cost.measure(lambda: network.train(model, training, validation, knobs, progress))

    scores = network.predict(model, test[0])
    result = evaluation.evaluate(test[1], scores)
    say(f"5/7 evaluation: accuracy {result.accuracy:.4f}, macro F1 {result.macro_f1:.4f} on the test pictures")
    if result.accuracy < options.minimum_accuracy:
        raise QualityError(
            f"accuracy {result.accuracy:.4f} is below --minimum-accuracy {options.minimum_accuracy:g}; nothing was written"
        )
    onnx_bytes = export.from_keras(model)
    nodes = [node.op_type for node in onnx.load_from_string(onnx_bytes).graph.node]
    say(f"6/7 export: {len(onnx_bytes):,} bytes of ONNX, {len(nodes)} nodes")
    parity = export.check_parity(onnx_bytes, test[0], scores)
    say(f"7/7 parity: ONNX Runtime and Keras differ by at most {parity.worst:.1e}")
    facts = card.Facts(
        version=version,
        sha256=hashlib.sha256(onnx_bytes).hexdigest(),
        onnx_bytes=len(onnx_bytes),
        nodes=nodes,
        parameter_count=model.count_params(),
        dataset=source,
        cleaning=cleaning,
        parts=sizes,
        hyperparameters=knobs,
        learning_rate=float(model.optimizer.learning_rate),
        epochs=epochs,
        evaluation=result,
        parity=parity,
        cost=spent,
        threads=network.thread_count(),
        versions=software_versions(),
    )
    return Trained(onnx_bytes, test[0], test[1], scores, facts)


def model_files(trained: Trained) -> dict[str, bytes]:
    """Return the content of the model folder, by path relative to it."""
    facts = trained.facts
    files = {
        folder.MANIFEST: MANIFEST.encode(),
        "labels.txt": "".join(f"{digit}\n" for digit in range(CLASS_COUNT)).encode(),
        f"{facts.version}/model.onnx": trained.onnx_bytes,
        "confusion_matrix.png": picture.confusion_png(facts.evaluation.confusion),
        "MODEL_CARD.md": card.render(facts).encode(),
    }
    for size in GOLDEN_BATCHES:
        files[f"golden/batch_{size}.npz"] = golden(trained, size)
    predicted = trained.test_scores.argmax(axis=1)
    for digit in range(CLASS_COUNT):
        of_class = np.flatnonzero(trained.test_labels == digit)
        # A picture that the model reads right, since a newcomer tries these first; any picture if it reads none right.
        row = next((row for row in of_class if predicted[row] == digit), of_class[0])
        files[f"samples/{digit}.png"] = picture.digit_png(trained.test_images[row])
    return files


def golden(trained: Trained, size: int) -> bytes:
    """Return an .npz of the first `size` test pictures: inputs, the scores that Keras gave, true labels."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        INPUT_NAME: trained.test_images[:size],
        OUTPUT_NAME: trained.test_scores[:size],
        "labels": trained.test_labels[:size],
    }
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def summary(facts: card.Facts, target: Path) -> dict[str, Any]:
    """Return the result in plain values, for JSON."""
    result = facts.evaluation
    per_class = [
        {
            "class": digit,
            "precision": float(result.precision[digit]),
            "recall": float(result.recall[digit]),
            "f1": float(result.f1[digit]),
            "pictures": int(result.support[digit]),
        }
        for digit in range(CLASS_COUNT)
    ]
    return {
        "folder": str(target),
        "version": facts.version,
        "sha256": facts.sha256,
        "onnx_bytes": facts.onnx_bytes,
        "data": {"name": facts.dataset.name, **asdict(facts.cleaning), "kept": facts.cleaning.kept},
        "pictures": dict(zip(("training", "validation", "test"), facts.parts, strict=True)),
        "hyperparameters": {**asdict(facts.hyperparameters), "learning_rate": facts.learning_rate},
        "epochs": [asdict(epoch) for epoch in facts.epochs],
        "accuracy": result.accuracy,
        "macro": {"precision": result.macro_precision, "recall": result.macro_recall, "f1": result.macro_f1},
        "classes": per_class,
        "confusion": result.confusion.tolist(),
        "max_abs_diff": {str(size): diff for size, diff in facts.parity.max_abs_diff.items()},
        "training": asdict(facts.cost),
        "versions": dict(facts.versions),
    }


def table(facts: card.Facts) -> str:
    """Return the result as a table for people."""
    result = facts.evaluation
    lines = [f"{'class':>5}  {'precision':>9}  {'recall':>9}  {'F1':>9}  {'pictures':>8}"]
    rows = [
        *(
            (str(digit), result.precision[digit], result.recall[digit], result.f1[digit], result.support[digit])
            for digit in range(CLASS_COUNT)
        ),
        ("macro", result.macro_precision, result.macro_recall, result.macro_f1, result.support.sum()),
    ]
    lines += [
        f"{name:>5}  {precision:9.4f}  {recall:9.4f}  {f1:9.4f}  {support:8d}"
        for name, precision, recall, f1, support in rows
    ]
    return "\n".join([*lines, f"accuracy {result.accuracy:.4f}"])


def describe_cleaning(report: preparation.CleaningReport) -> str:
    """Return the counts that are not zero, in one line."""
    dropped = {name: count for name, count in asdict(report).items() if count and name != "read"}
    reasons = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items())
    return f"{report.kept:,} kept" + (f", dropped: {reasons}" if reasons else ", none dropped")


def software_versions() -> dict[str, str]:
    """Return the versions of what the result depends on; a package that is not installed is left out."""
    found = {"Python": platform.python_version()}
    for name in SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def say(message: str) -> None:
    """Tell whoever watches, on stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
