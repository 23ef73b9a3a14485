"""Writing a model folder: version numbers, what is kept, and that a failure leaves everything as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tools.digits import folder
from tools.digits.errors import InputError

FIRST = {"model.toml": b"ours", "1/model.onnx": b"one", "golden/batch_1.npz": b"g1", "MODEL_CARD.md": b"card 1"}
SECOND = {"model.toml": b"ours", "2/model.onnx": b"two", "golden/batch_2.npz": b"g2", "MODEL_CARD.md": b"card 2"}


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def file_system(request, monkeypatch):
    """A file system that can exchange two names, and one that cannot."""
    if not request.param:
        monkeypatch.setattr(folder, "_exchange_names", lambda one, other: False)


def test_a_new_folder_holds_the_files_and_nothing_is_left_beside_it(tmp_path):
    folder.write(tmp_path / "models" / "digits", FIRST)
    assert content(tmp_path) == {f"models/digits/{name}": data for name, data in FIRST.items()}
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["digits"]
    assert (tmp_path / "models" / "digits").stat().st_mode & 0o777 == 0o755


@pytest.mark.usefixtures("file_system")
def test_a_further_version_keeps_the_older_ones_and_the_owners_settings_and_files(tmp_path):
    target = tmp_path / "digits"
    folder.write(target, FIRST)
    (target / "model.toml").write_bytes(b"theirs")
    (target / "notes").mkdir()
    (target / "notes" / "site.txt").write_bytes(b"hall 3")
    folder.write(target, SECOND)
    assert content(target) == {
        "model.toml": b"theirs",
        "1/model.onnx": b"one",
        "2/model.onnx": b"two",
        "golden/batch_2.npz": b"g2",  # the old golden scores would not fit the new weights
        "MODEL_CARD.md": b"card 2",
        "notes/site.txt": b"hall 3",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]


@pytest.mark.usefixtures("file_system")
def test_a_version_written_again_replaces_its_old_files(tmp_path):
    target = tmp_path / "digits"
    folder.write(target, FIRST | {"1/extra.bin": b"x"})
    folder.write(target, FIRST | {"1/model.onnx": b"again"})
    assert content(target) == FIRST | {"1/model.onnx": b"again"}


def test_a_folder_reached_through_a_link_is_replaced_behind_the_link(tmp_path):
    folder.write(tmp_path / "disk" / "digits", FIRST)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "digits").symlink_to(tmp_path / "disk" / "digits")
    folder.write(tmp_path / "models" / "digits", SECOND)
    assert (tmp_path / "models" / "digits").is_symlink()
    assert content(tmp_path / "disk" / "digits")["2/model.onnx"] == b"two"


@pytest.mark.parametrize("step", ["_take_over", "_sync_tree", "_exchange"])
def test_a_failure_at_any_step_leaves_the_old_folder_and_no_rubbish(tmp_path, monkeypatch, step):
    target = tmp_path / "digits"
    folder.write(target, FIRST)

    def disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, step, disk_full)
    with pytest.raises(InputError, match=r"cannot write .*digits \(No space left on device\); nothing was changed"):
        folder.write(target, SECOND)
    assert content(tmp_path) == {f"digits/{name}": data for name, data in FIRST.items()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]


def test_versions_are_counted_up_unless_the_newest_is_overwritten(tmp_path):
    target = tmp_path / "digits"
    assert folder.choose_version(target, overwrite=False) == 1
    assert folder.choose_version(target, overwrite=True) == 1
    folder.write(target, FIRST | {"7/model.onnx": b"seven"})
    assert folder.choose_version(target, overwrite=False) == 8
    assert folder.choose_version(target, overwrite=True) == 7


def test_a_folder_with_a_manifest_only_gets_version_1(tmp_path):
    (tmp_path / "model.toml").write_text("")
    assert folder.choose_version(tmp_path, overwrite=False) == 1


def test_an_empty_folder_gets_version_1(tmp_path):
    assert folder.choose_version(tmp_path, overwrite=False) == 1
    folder.write(tmp_path, FIRST)
    assert content(tmp_path) == FIRST


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other things than a model"):
        folder.choose_version(tmp_path, overwrite=True)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "digits").write_text("")
    with pytest.raises(InputError, match="is a file"):
        folder.choose_version(tmp_path / "digits", overwrite=False)
