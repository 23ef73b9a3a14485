"""Each planted bug of `docs/planted-bugs.md` is put into a copy of the batcher; the batcher's own tests must notice every one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LIST = ROOT / "docs" / "planted-bugs.md"
BLOCK = re.compile(
    r"^## (?P<name>.+?)\n.*?```python\n(?P<old>.*?)```\s+becomes\s+```python\n(?P<new>.*?)```", re.DOTALL | re.MULTILINE
)


def planted() -> list[tuple[str, str, str]]:
    return [(match["name"], match["old"], match["new"]) for match in BLOCK.finditer(LIST.read_text())]


def test_the_list_is_long_enough_and_every_patch_still_fits() -> None:
    bugs = planted()
    source = (ROOT / "appliance" / "core" / "batcher.py").read_text()
    assert len(bugs) >= 12
    assert [name for name, old, _ in bugs if source.count(old) != 1] == []


def run_suite(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "test_batcher.py",
            "test_batcher_machine.py",
        ],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "HYPOTHESIS_STORAGE_DIRECTORY": str(tree / ".hypothesis")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def plant(tmp_path: Path, old: str, new: str) -> Path:
    shutil.copytree(ROOT / "appliance", tmp_path / "appliance", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("test_batcher.py", "test_batcher_machine.py"):
        shutil.copy(ROOT / "tests" / "core" / name, tmp_path)
    source = tmp_path / "appliance" / "core" / "batcher.py"
    source.write_text(source.read_text().replace(old, new))
    return tmp_path


@pytest.mark.slow
def test_without_a_bug_the_suite_passes(tmp_path: Path) -> None:
    result = run_suite(plant(tmp_path, "", ""))
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "old", "new"), planted(), ids=[name for name, _, _ in planted()])
def test_a_planted_bug_is_noticed(name: str, old: str, new: str, tmp_path: Path) -> None:
    result = run_suite(plant(tmp_path, old, new))
    assert result.returncode == 1, f"nobody noticed: {name}\n{result.stdout[-2000:]}"
