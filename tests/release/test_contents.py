"""What a bundle puts into folders that others may write to: it leads nowhere else, whatever they put there, and whenever."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from appliance.release import contents, descent
from appliance.release.box import Added, Box, Installed
from appliance.release.errors import BundleError
from tests.release.making import manifest_of

FILES = {"models/m/2/model.onnx": b"two", "models/m/model.toml": b"new", "engines/e/1.plan": b"plan"}
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    box = Box(tmp_path / "root")
    box.models.mkdir(parents=True)
    return box


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "2").mkdir(parents=True)
    (folder / "2/model.onnx").write_bytes(b"two")
    return folder


def put(box: Box, tmp_path: Path) -> Installed:
    return contents.put(box, manifest_of(FILES), _unpacked(tmp_path), lambda _: None, lambda _: None)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_was_put_in_is_taken_away_with_its_folders_and_the_rooms_stay(box: Box, tmp_path: Path) -> None:
    done = put(box, tmp_path)
    assert files(box.state) == set(FILES)
    contents.take_away(box, done.added)
    assert sorted(path.relative_to(box.state).as_posix() for path in box.state.rglob("*")) == ["engines", "models"]


def test_a_link_that_was_put_in_a_models_place_since_is_not_followed_to_take_it_away(
    box: Box, tmp_path: Path, outside: Path
) -> None:
    done = put(box, tmp_path)
    (box.models / "m").rename(tmp_path / "away")
    (box.models / "m").symlink_to(outside)
    contents.take_away(box, done.added)
    assert files(outside) == {"2/model.onnx"}


def test_a_link_that_appears_between_the_look_and_the_use_is_not_followed(
    box: Box, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def swapped(name: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        make(name, mode, dir_fd=dir_fd)
        if name == "m":
            os.rmdir(name, dir_fd=dir_fd)
            os.symlink(outside, name, dir_fd=dir_fd)

    (outside / "2").rename(outside / "other")
    unpacked = _unpacked(tmp_path)
    monkeypatch.setattr(descent.os, "mkdir", swapped)
    before = outside.stat()
    with pytest.raises(BundleError, match="is a link"):
        contents.put(box, manifest_of(FILES), unpacked, lambda _: None, lambda _: None)
    assert files(outside) == {"other/model.onnx"}
    assert (outside.stat().st_uid, outside.stat().st_mtime_ns) == (before.st_uid, before.st_mtime_ns)


def test_a_sites_own_link_to_a_larger_disk_is_the_models_folder(box: Box, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    box.models.rename(disk)
    box.models.symlink_to(disk)
    done = put(box, tmp_path)
    assert files(disk) == {"m/2/model.onnx", "m/model.toml"}
    contents.take_away(box, done.added)
    assert list(disk.iterdir()) == []


@as_root
def test_a_link_of_the_services_user_is_not_the_models_folder(box: Box, tmp_path: Path, outside: Path) -> None:
    box.models.rmdir()
    box.models.symlink_to(outside)
    os.lchown(box.models, NOBODY, NOBODY)
    with pytest.raises(BundleError, match="models is a link"):
        put(box, tmp_path)
    contents.take_away(box, (Added("var/lib/appliance/models/2/model.onnx", hashlib.sha256(b"two").hexdigest()),))
    assert files(outside) == {"2/model.onnx"}


@as_root
def test_what_is_put_in_belongs_to_the_owner_of_the_models_folder(box: Box, tmp_path: Path) -> None:
    for folder in (box.state, box.models):
        os.chown(folder, NOBODY, NOBODY)
    put(box, tmp_path)
    for path in (*box.models.rglob("*"), *box.engines.rglob("*"), box.engines):
        assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY), path


def test_a_pipe_in_a_files_place_does_not_hold_root_up(box: Box, tmp_path: Path) -> None:
    (box.models / "m").mkdir()
    os.mkfifo(box.models / "m/model.toml")
    done = put(box, tmp_path)
    assert "var/lib/appliance/models/m/model.toml" not in [added.path for added in done.added]


def _unpacked(tmp_path: Path) -> Path:
    unpacked = tmp_path / "unpacked"
    for name, data in FILES.items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(data)
    return unpacked
