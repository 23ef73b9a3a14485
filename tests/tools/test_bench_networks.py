"""The generated networks: they load, take a batch, and are the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools.bench import INPUTS, payload
from tools.benchmark.networks import NETWORKS, write_repository

DIGITS = Path(__file__).parents[2] / "models" / "digits"


@pytest.mark.parametrize("name", list(NETWORKS))
def test_rows_of_a_batch_are_answered_as_if_alone(name: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    write_repository(tmp_path, DIGITS, [name])
    session = ort.InferenceSession(str(tmp_path / name / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    input_name, datatype, shape, reply_bytes = INPUTS[name]
    assert session.get_inputs()[0].name == input_name
    row = np.frombuffer(payload(name), np.uint8 if datatype == "UINT8" else np.float32).reshape(shape)
    other = row[..., ::-1] + row.dtype.type(1)
    [alone], [beside] = (session.run(None, {input_name: row}), session.run(None, {input_name: other}))
    [together] = session.run(None, {input_name: np.concatenate([other, row])})
    np.testing.assert_allclose(together, np.concatenate([beside, alone]), rtol=1e-4, atol=1e-5)
    assert alone.nbytes == reply_bytes, "the echo beside it answers with as many bytes"
    assert np.isfinite(alone).all()
    assert not np.allclose(alone, beside), "the answer depends on the input"


def test_same_seed_makes_the_same_network() -> None:
    assert NETWORKS["detector"]().SerializeToString() == NETWORKS["detector"]().SerializeToString()


def test_digits_are_copied_as_trained(tmp_path: Path) -> None:
    write_repository(tmp_path, DIGITS, ["digits", "identity"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "identity"]
    assert (tmp_path / "digits/1/model.onnx").read_bytes() == (DIGITS / "1/model.onnx").read_bytes()
