"""The type checker over files of ours, with a release's stubs in the place of TensorRT."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.contract.tensorrt import stubs
from tests.contract.tensorrt.api import Api
from tests.contract.tensorrt.bindings import cache

ROOT = Path(__file__).parents[3]
SETTINGS = """[mypy]
strict = true
implicit_reexport = true
# `library.trt` is reached through its home; where the library is absent, what comes of it is untyped, and the code says so
warn_unused_ignores = false
warn_redundant_casts = false
follow_imports = silent
ignore_missing_imports = true
"""


def check(files: Iterable[Path], api: Api, folder: Path) -> list[str]:
    """The errors, as `file.py:line: words [code]`. `folder` is for the stubs. Errors in the stub are this suite's."""
    package = folder / "stubs" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.pyi").write_text(stubs.write(api))
    settings = folder / "mypy.ini"
    settings.write_text(SETTINGS + f"mypy_path = {package.parent}:{ROOT}\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(cache() / "mypy")]
    command += ["--no-error-summary", "--no-pretty", "--hide-error-context", "--explicit-package-bases"]
    done = subprocess.run(
        [*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = re.findall(r"^(\S+?):(\d+): error: (.+)$", done.stdout, re.MULTILINE)
    found = [f"{Path(file).name}:{line}: {words}" for file, line, words in errors]
    assert not any(one.startswith("__init__.pyi") for one in found), found[:10]
    return found
