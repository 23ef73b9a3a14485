"""The Debian package: the same bytes twice, nothing that lintian calls an error, and everything in it that is imported."""

from __future__ import annotations

import ast
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.conftest import build_deb, target
from tools.distribution.build_wheel import ROOT

pytestmark = pytest.mark.slow

UNCOMPRESSED = "uses-no-compression-for-control-tarball,uses-no-compression-for-data-tarball"
"""True of the package that is built for tests, which saves the minute that xz takes."""


def test_two_builds_are_the_same_bytes(wheelhouse: Path, tmp_path: Path) -> None:
    found = []
    for name, umask in (("one", 0o022), ("two", 0o077)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777 & ~umask)
        made = build_deb(
            wheelhouse, tmp_path / name, "--uncompressed", SOURCE_DATE_EPOCH="1700000000", TMPDIR=str(tmp_path / name)
        )
        found.append(hashlib.sha256(made.read_bytes()).hexdigest())
    assert found[0] == found[1]


def test_lintian_finds_no_error(deb: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("no lintian here")
    ended = subprocess.run(
        ["lintian", "--fail-on", "error", "--suppress-tags", UNCOMPRESSED, str(deb)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def test_everything_is_where_it_belongs(deb: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", str(deb), str(tmp_path)], check=True)
    for place in (
        "etc/appliance/appliance.toml",
        f"{target().units}/appliance.service",
        "usr/lib/sysusers.d/appliance.conf",
        "usr/lib/tmpfiles.d/appliance.conf",
        "usr/share/appliance/models/digits/1/model.onnx",
        "usr/share/man/man1/appliance.1.gz",
        "usr/share/man/man1/appliance-bundle.1.gz",
        "usr/share/bash-completion/completions/appliance",
        "usr/share/zsh/vendor-completions/_appliance",
        "usr/share/fish/vendor_completions.d/appliance.fish",
        "usr/share/doc/appliance/copyright",
        "usr/share/doc/appliance/changelog.gz",
    ):
        assert (tmp_path / place).is_file(), place
    assert (tmp_path / "usr/bin/appliance").readlink() == Path("../lib/appliance/bin/appliance")
    packages = tmp_path / target().packages
    missing = [name for name in _imported() if not _there(packages, name)]
    assert not missing, "pruned, and imported by the appliance"


def _imported() -> set[str]:
    """Every module of the bundled libraries that the appliance's sources name in an import."""
    found: set[str] = set()
    for path in (ROOT / "appliance").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
    return {
        name
        for name in found
        if name.split(".")[0] in ("onnxruntime", "onnx", "numpy", "aiohttp", "zmq", "PIL", "typer")
    }


def _there(packages: Path, name: str) -> bool:
    path = packages.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists() or any(path.parent.glob(f"{path.name}.*.so"))
