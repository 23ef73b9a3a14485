"""Files that are whole or not there, and are never written through what somebody else put in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.host.durable import sync_filesystem, write_durably


def test_a_file_is_replaced_whole_with_the_mode_it_was_given_and_nothing_is_left_beside(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"old and longer")
    write_durably(file, b"new", mode=0o600)
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_that_lies_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"not ours")
    (tmp_path / f".state.{os.getpid()}.new").symlink_to(other)
    write_durably(tmp_path / "state", b"new")
    assert (other.read_bytes(), (tmp_path / "state").read_bytes()) == (b"not ours", b"new")


def test_what_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "state" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_durably(tmp_path / "state", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_whole_file_system_is_synced_and_what_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"new")
    sync_filesystem(tmp_path)
    with pytest.raises(NotADirectoryError):
        sync_filesystem(tmp_path / "file")
