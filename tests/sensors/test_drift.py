"""The driver's files: what runs against what lies on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.sensors import drift
from appliance.sensors.drift import DriftWatch

Tree = Callable[[dict[str, object]], Path]
FOLDER = "usr/lib/x86_64-linux-gnu"
NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  615.71  Tue Sep  1 00:00:00 UTC 2026\nGCC version: gcc 12.2.0"


@pytest.mark.parametrize(
    ("file", "text"), [("proc/driver/nvidia/version", NVRM), ("sys/module/nvidia/version", "615.71")]
)
def test_both_of_the_kernels_files_are_understood_and_the_upgrade_is_seen_at_the_next_look(
    tree: Tree, file: str, text: str
) -> None:
    root = tree({file: text, f"{FOLDER}/libnvidia-ml.so.615.71": ""})
    folder = root / FOLDER
    (folder / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.615.71")
    watch = DriftWatch(root)
    assert watch.look() is None
    (folder / "libnvidia-ml.so.620.10").touch()
    assert watch.look() is None, "the soname still points to what runs"
    (folder / "next").symlink_to("libnvidia-ml.so.620.10")
    (folder / "next").rename(folder / "libnvidia-ml.so.1")
    found = watch.look()
    assert found is not None
    assert found.message == "reboot pending: version 615.71 runs, but its libraries on disk are 620.10"
    (root / file).write_text(text.replace("615.71", "620.10"))
    assert watch.look() is None, "the module was loaded anew"


def test_an_alternative_that_points_elsewhere_is_seen_without_a_change_of_the_folder(tree: Tree) -> None:
    other = "usr/lib/nvidia"
    root = tree(
        {
            "sys/module/nvidia/version": "615.71",
            f"{other}/libcuda.so.615.71": "",
            f"{other}/libcuda.so.620.10": "",
            f"{FOLDER}/x": "",
        }
    )
    (root / other / "current").symlink_to("libcuda.so.615.71")
    (root / FOLDER / "libcuda.so.1").symlink_to(root / other / "current")
    watch = DriftWatch(root)
    assert watch.look() is None
    (root / other / "current").unlink()
    (root / other / "current").symlink_to("libcuda.so.620.10")
    assert watch.look() is not None


def test_while_nothing_changes_no_folder_is_listed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = DriftWatch(tree({"sys/module/nvidia/version": "615.71", f"{FOLDER}/libcuda.so.620.10": ""}))
    first = watch.look()

    def listed(root: Path) -> frozenset[str]:
        raise AssertionError(f"{root} was listed")

    monkeypatch.setattr(drift, "library_versions", listed)
    assert watch.look() == first
    assert first is not None


def test_a_box_without_the_driver_has_no_drift(tmp_path: Path) -> None:
    assert DriftWatch(tmp_path).look() is None
