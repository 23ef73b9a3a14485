"""What counts as a file of a model version: all below its folder, and no folder that a link leads to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.building.version_files import version_files, weights_bytes


def test_every_regular_file_below_counts_in_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("model.onnx", "w/b.bin", "w/.a.bin", ".x/y/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    files, links = version_files(tmp_path)
    assert list(files) == [".x/y/z", "model.onnx", "w/.a.bin", "w/b.bin"]
    assert links == {}


def test_a_link_to_a_file_is_that_file_and_a_link_to_a_folder_is_where_it_points(tmp_path: Path) -> None:
    outside, version = tmp_path / "outside", tmp_path / "1"
    for folder in (outside, version):
        folder.mkdir()
    (outside / "secret").write_bytes(b"x")
    (version / "model.onnx").symlink_to(outside / "secret")
    (version / "w").symlink_to(outside)
    (version / "around").symlink_to(".")
    files, links = version_files(version)
    assert list(files) == ["model.onnx"]
    assert links == {"around": ".", "w": str(outside)}


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        version_files(tmp_path / "gone")


def test_a_model_weighs_what_its_files_of_weights_weigh_too(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "w" / "weights.bin").write_bytes(b"x" * 1000)
    assert weights_bytes(str(tmp_path / "model.onnx")) == 1010
    assert (weights_bytes(""), weights_bytes(str(tmp_path / "gone" / "model.onnx"))) == (0, 0)
