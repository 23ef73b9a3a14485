"""The two ways in which a training run ends badly. `train_digits` prints the message and exits with the code."""

from __future__ import annotations


class InputError(Exception):
    """What the caller gave (a file, a folder, an environment) cannot be used; the message says what to change."""

    exit_code = 2


class QualityError(Exception):
    """Training went through, but its result must not be published: too inaccurate, or ONNX and Keras disagree."""

    exit_code = 1
