"""The model card: what the model is, what it was made from, how good it is, what it is not for. Facts in, Markdown out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import CLASS_COUNT
from .cost import Cost
from .dataset import BUNDLED_PROVENANCE, Dataset
from .evaluation import Evaluation
from .export import PARITY_TOLERANCE, Parity
from .network import Epoch, Hyperparameters
from .preparation import CleaningReport

JOULES_PER_WATT_HOUR = 3600

BUNDLED_LIMITS = """\
- It has seen few and coarse pictures: 1,797 of 8×8 pixels from 13 writers, stretched to 28×28, so its strokes are soft and
  thick. MNIST's are sharp and thin; expect it to do clearly worse there. Train on your own pictures for real work
  (`python tools/train_digits.py --data …`).
- Training and test pictures come from the same 13 writers. Other hands will be read less well than the table says."""
USER_LIMITS = """\
- The table holds for pictures like those in the test part. Other pens, cameras or writers may be read less well."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the card says and that differs from one training to the next.

    `parts` are the numbers of training, validation and test pictures; `versions` are software names and versions.
    """

    version: int
    sha256: str
    onnx_bytes: int
    nodes: Sequence[str]
    parameter_count: int
    dataset: Dataset
    cleaning: CleaningReport
    parts: tuple[int, int, int]
    hyperparameters: Hyperparameters
    learning_rate: float
    epochs: Sequence[Epoch]
    evaluation: Evaluation
    parity: Parity
    cost: Cost
    threads: int
    versions: Mapping[str, str]


def render(facts: Facts) -> str:
    """Write the card of one version."""
    sections = [
        _summary(facts),
        _interface(facts),
        _data(facts),
        _training(facts),
        _quality(facts),
        _use(facts),
        _reproduce(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(facts: Facts) -> str:
    return f"""# digits: handwritten digits, 28×28

A small convolutional network that reads one handwritten digit. Version {facts.version}; accuracy \
{facts.evaluation.accuracy:.4f} on {facts.parts[2]:,} test pictures.
It is the example that the appliance ships with, made by `tools/train_digits.py`."""


def _interface(facts: Facts) -> str:
    return f"""## Interface

| tensor | name | datatype | shape | meaning |
|---|---|---|---|---|
| input | `image` | FP32 | (batch, 28, 28, 1) | 0 is background, 1 is full ink: light strokes on a dark ground |
| output | `scores` | FP32 | (batch, {CLASS_COUNT}) | one score per digit 0 to 9, together 1 (`labels.txt`) |

Layers: Conv2D 32 of 3×3, ReLU; MaxPool 2×2; Flatten; Dense 128, ReLU; Dense {CLASS_COUNT}, softmax.
{facts.parameter_count:,} parameters. The file has {len(facts.nodes)} nodes: {", ".join(facts.nodes)}.

| file | bytes | SHA-256 |
|---|---|---|
| `{facts.version}/model.onnx` | {facts.onnx_bytes:,} | `{facts.sha256}` |"""


def _data(facts: Facts) -> str:
    cleaning = facts.cleaning
    train, validation, test = facts.parts
    origin = "as the source set it aside" if facts.dataset.given_test.any() else "drawn at random, stratified by class"
    return f"""## Data

{facts.dataset.name}. {facts.dataset.provenance}

| read | unlabeled | wrong shape | out of range | contradictory | duplicates | kept |
|---|---|---|---|---|---|---|
| {cleaning.read:,} | {cleaning.unlabeled:,} | {cleaning.wrong_shape:,} | {cleaning.out_of_range:,} | \
{cleaning.contradictory:,} | {cleaning.duplicates:,} | {cleaning.kept:,} |

Training {train:,}, validation {validation:,}, test {test:,} pictures; the test part is {origin}."""


def _training(facts: Facts) -> str:
    knobs, cost = facts.hyperparameters, facts.cost
    rows = "\n".join(
        f"| {epoch.number} | {epoch.loss:.4f} | {epoch.accuracy:.4f} | {epoch.validation_loss:.4f} | "
        f"{epoch.validation_accuracy:.4f} |"
        for epoch in facts.epochs
    )
    energy = "Energy: not measured, since this machine shows no readable counter."
    if cost.joules is not None:
        energy = (
            f"Energy: {cost.joules:.0f} J ({cost.joules / JOULES_PER_WATT_HOUR:.3f} Wh) in the CPU packages (RAPL), idle "
            "power and other programs included."
        )
    return f"""## Training

Optimizer {knobs.optimizer}, learning rate {facts.learning_rate:g}, loss {knobs.loss}, {knobs.epochs} epochs, batches of \
{knobs.batch_size}, seed {knobs.seed}.
Time: {cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of CPU, {facts.threads} threads. {energy}

| epoch | loss | accuracy | validation loss | validation accuracy |
|---|---|---|---|---|
{rows}"""


def _quality(facts: Facts) -> str:
    evaluation = facts.evaluation
    rows = "\n".join(
        f"| {digit} | {evaluation.precision[digit]:.4f} | {evaluation.recall[digit]:.4f} | {evaluation.f1[digit]:.4f} | "
        f"{evaluation.support[digit]} |"
        for digit in range(CLASS_COUNT)
    )
    return f"""## Quality on the test pictures

| class | precision | recall | F1 | pictures |
|---|---|---|---|---|
{rows}
| **macro** | **{evaluation.macro_precision:.4f}** | **{evaluation.macro_recall:.4f}** | **{evaluation.macro_f1:.4f}** | \
**{evaluation.support.sum()}** |

Accuracy **{evaluation.accuracy:.4f}**.

![Confusion matrix: true digits in rows, predicted digits in columns](confusion_matrix.png)

ONNX Runtime against Keras on all test pictures: scores differ by at most {facts.parity.worst:.1e} \
(batches of {", ".join(str(size) for size in facts.parity.max_abs_diff)}; less than {PARITY_TOLERANCE:g} is required)."""


def _use(facts: Facts) -> str:
    bundled = facts.dataset.provenance == BUNDLED_PROVENANCE
    return f"""## Intended use and limits

For trying out, testing and measuring the appliance: small, quick, and with an answer that everybody can judge by eye.
Not for decisions that matter.

{BUNDLED_LIMITS if bundled else USER_LIMITS}
- One upright digit per picture, centred, light on dark. Anything else (a letter, noise, two digits, a blank) still gets
  scores that add up to 1: they say which digit is likeliest, not whether there is one."""


def _reproduce(facts: Facts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return f"""## Made with

{versions}.

The same data, seed, versions, machine and number of threads give the same file, bit for bit. On another machine sums are
taken in another order, and the last digits of the weights, sometimes one test picture, differ.

`golden/*.npz` hold test inputs (`image`), the scores that Keras gave (`scores`) and true labels (`labels`), for this version.
`samples/` has one test picture of each class."""
