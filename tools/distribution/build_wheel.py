"""Builds the wheel and the source archive from a copy of the sources, with setuptools' own hooks and nothing else.

python tools/distribution/build_wheel.py --output dist
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "appliance", "models", "systemd", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE",
    "tools/distribution/debian/appliance.toml",
)  # fmt: skip

HOOKS = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # setuptools puts its own words there
print(build_meta.build_wheel(target))
print(build_meta.build_sdist(target))
"""


def main() -> int:
    """Build both; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    for path in build(parser.parse_args().output):
        print(path)
    return 0


def build(output: Path) -> list[Path]:
    """The wheel and the source archive, below `output`."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        copy_sources(Path(work))
        made = Path(work) / "made"
        made.mkdir()
        command = [sys.executable, "-c", HOOKS, str(made)]
        ended = subprocess.run(command, cwd=work, capture_output=True, text=True, env=os.environ, check=False)
        if ended.returncode != 0:
            raise RuntimeError(f"setuptools failed:\n{ended.stderr[-3000:]}")
        return [Path(shutil.copy2(path, output)) for path in sorted(made.iterdir())]


def copy_sources(target: Path) -> None:
    """What a wheel is made of, without what is made on the way."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".engines"))
        elif source.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


if __name__ == "__main__":
    sys.exit(main())
