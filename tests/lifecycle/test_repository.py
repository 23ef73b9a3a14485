"""What is read from disk, and what is said of folders that are wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.building import version_files
from appliance.core.request import ModelName
from appliance.lifecycle.repository import Repository


def model(root: Path, name: str, *versions: str, manifest: str = "", labels: str = "") -> Path:
    folder = root / name
    folder.mkdir()
    for version in versions:
        (folder / version).mkdir()
        (folder / version / "model.onnx").write_bytes(b"x")
    if manifest:
        (folder / "model.toml").write_text(manifest)
    if labels:
        (folder / "labels.txt").write_text(labels)
    return folder


def test_numbered_folders_with_a_model_are_versions_and_labels_are_read(tmp_path: Path) -> None:
    model(tmp_path, "m", "1", "10", "x", "0", "01", labels="cat\ndog\n")
    folder = Repository(tmp_path).scan()[ModelName("m")]
    assert sorted(folder.versions) == [1, 10]
    assert folder.versions[1].engine == "onnxruntime"
    assert folder.labels == ("cat", "dog")
    assert folder.problem == ""


def test_a_changed_file_changes_its_version_s_fingerprint_and_no_other_s(tmp_path: Path) -> None:
    folder = model(tmp_path, "m", "1", "2")
    repository = Repository(tmp_path)
    before = repository.scan()[ModelName("m")].versions
    (folder / "2" / "model.onnx").write_bytes(b"other")
    after = repository.scan()[ModelName("m")].versions
    assert before[1].fingerprint == after[1].fingerprint
    assert before[2].fingerprint != after[2].fingerprint
    (folder / "model.toml").write_text('description = "new"\n')
    assert repository.scan()[ModelName("m")].versions[1].fingerprint != after[1].fingerprint


@pytest.mark.parametrize("name", ["w.bin", "w/w.bin", ".w/w.bin"])
def test_other_weights_anywhere_below_a_version_change_its_fingerprint(tmp_path: Path, name: str) -> None:
    weights = model(tmp_path, "m", "1") / "1" / name
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"x")
    os.utime(weights, (1, 1))
    repository = Repository(tmp_path)
    before = repository.scan()[ModelName("m")].versions[1].fingerprint
    assert repository.scan()[ModelName("m")].versions[1].fingerprint == before
    weights.write_bytes(b"y")
    assert repository.scan()[ModelName("m")].versions[1].fingerprint != before


def test_wrong_folders_have_a_reason_without_a_path_and_do_not_hide_the_others(tmp_path: Path) -> None:
    model(tmp_path, "good", "1")
    model(tmp_path, "bad name", "1")
    model(tmp_path, "typo", "1", manifest="labls = 'x'\n")
    model(tmp_path, "nolabels", "1", manifest='labels = "names.txt"\n')
    model(tmp_path, "outside", "1", manifest='labels = "../names.txt"\n')
    model(tmp_path, "empty")
    (model(tmp_path, "hollow", "1") / "1" / "model.onnx").unlink()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").write_text("")
    found = Repository(tmp_path).scan()
    assert set(found) == {"good", "bad name", "typo", "nolabels", "outside", "empty", "hollow"}
    assert not found[ModelName("good")].problem
    assert "did you mean 'labels'" in found[ModelName("typo")].problem
    assert "'names.txt' is missing" in found[ModelName("nolabels")].problem
    assert "must name a file" in found[ModelName("outside")].problem
    assert "no version folder" in found[ModelName("empty")].problem
    assert "no model.onnx" in found[ModelName("hollow")].broken[1]
    assert all(str(tmp_path) not in folder.problem for folder in found.values())


def test_a_name_from_a_client_is_never_a_path(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    model(tmp_path, "secret", "1")
    repository = Repository(tmp_path / "repository")
    for name in ("../secret", "..", ".", "", "a/b", "\0", "%2e%2e", "x" * 300):
        assert repository.read(ModelName(name)) is None


def test_a_version_of_more_files_than_a_model_has_is_broken_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_files, "MAX_ENTRIES", 2)
    folder = model(tmp_path, "m", "1", "2") / "2"
    for name in ("a", "b"):
        (folder / name).mkdir()
    found = Repository(tmp_path).scan()[ModelName("m")]
    assert list(found.versions) == [1]
    assert found.broken[2].startswith("more than 2 files")


def test_a_repository_is_known_by_its_folder_and_not_by_its_path(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(one)
    assert Repository(one).identity == Repository(tmp_path / "link").identity != Repository(other).identity
    assert Repository(tmp_path / "gone").identity == ""


def test_the_disk_s_own_folder_is_no_model_and_a_name_that_is_no_text_can_be_shown(tmp_path: Path) -> None:
    model(tmp_path, "good", "1")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / os.fsdecode(b"b\xe4d")).mkdir()
    found = Repository(tmp_path).scan()
    assert set(found) == {"good", "b\ufffdd"}
    assert "must be letters" in found[ModelName("b\ufffdd")].problem
