"""A timing cache beside the engines: given back as it was written, and never one that was altered or came from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.building.pinned import PinnedFile
from appliance.building.store import EngineStore, StoreError


def test_what_was_written_is_read(tmp_path: Path) -> None:
    PinnedFile(EngineStore(tmp_path), "timings").write(b"data")
    assert PinnedFile(EngineStore(tmp_path), "timings").read() == b"data"
    assert PinnedFile(EngineStore(tmp_path), "other").read() == b""


@pytest.mark.parametrize("position", [0, 63, 64, -1])
def test_an_altered_one_is_set_aside_and_never_read(tmp_path: Path, position: int) -> None:
    file = PinnedFile(EngineStore(tmp_path), "timings")
    file.write(b"data")
    data = bytearray(file.path.read_bytes())
    data[position] ^= 1
    file.path.write_bytes(bytes(data))
    assert file.read() == b""
    assert not file.path.exists()
    assert file.path.with_name("timings.bad").exists()


def test_one_of_another_device_or_name_is_not_read(tmp_path: Path) -> None:
    theirs, ours = (PinnedFile(EngineStore(tmp_path / name), "timings") for name in ("theirs", "ours"))
    theirs.write(b"data")
    ours.write(b"ours")
    ours.path.write_bytes(theirs.path.read_bytes())
    assert ours.read() == b""
    renamed = PinnedFile(EngineStore(tmp_path / "theirs"), "renamed")
    renamed.path.write_bytes(theirs.path.read_bytes())
    assert renamed.read() == b""


def test_a_full_disk_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PinnedFile(EngineStore(tmp_path), "timings")
    file.write(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        file.write(b"new")
    monkeypatch.undo()
    assert file.read() == b"old"
