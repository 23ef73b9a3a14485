"""What the packaging tests build once: the wheels they need, the package in two releases, a wheel and a source archive."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.installed import InstalledBox
from tests.systemd.box import why_not
from tools.distribution.build_wheel import ROOT, copy_sources

UNITS = ROOT / "systemd" if (ROOT / "systemd" / "appliance.service").is_file() else Path(__file__).parent / "units"
"""What is shipped, else the least that starts."""


@pytest.fixture(scope="session")
def wheelhouse() -> Path:
    """The pinned wheels; $APPLIANCE_WHEELHOUSE, else build/wheelhouse, filled once where there is an index."""
    folder = Path(os.environ.get("APPLIANCE_WHEELHOUSE", ROOT / "build" / "wheelhouse"))
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the package is for Python 3.11")
    if not any(folder.glob("pip-*.whl")):
        build = [sys.executable, "tools/distribution/build_deb.py", "--download", "--wheelhouse", str(folder)]
        ended = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            pytest.skip(f"the wheels cannot be had: {ended.stderr[-300:]}")
    return folder


def build_deb(wheelhouse: Path, output: Path, *more: str, **environment: str) -> Path:
    """Build the package as `make deb` does."""
    command = [
        sys.executable,
        "tools/distribution/build_deb.py",
        "--wheelhouse",
        str(wheelhouse),
        "--output",
        str(output),
    ]
    command += ["--units", str(UNITS), *more]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert ended.returncode == 0, ended.stderr
    return Path(ended.stdout.strip())


@pytest.fixture(scope="session")
def deb(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of this checkout; $APPLIANCE_DEB is one that was built already."""
    if given := os.environ.get("APPLIANCE_DEB"):
        return Path(given)
    wheelhouse: Path = request.getfixturevalue("wheelhouse")
    if not Path("/usr/bin/dpkg-deb").exists():
        pytest.skip("no dpkg-deb here")
    return build_deb(wheelhouse, tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def installed(deb: Path) -> Iterator[InstalledBox]:
    """A booted machine on which `dpkg -i` has just installed the package, which enables and starts nothing.

    One for a module; a module whose tests change it in ways that others would notice cleans up or makes its own.
    """
    if reason := why_not():
        pytest.skip(reason)
    box = InstalledBox(deb)
    try:
        box.start()
        box.install(deb)
        yield box
    finally:
        box.remove()


@pytest.fixture(scope="session")
def newer_deb(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deb(wheelhouse, tmp_path_factory.mktemp("newer"), "--version", "9.9.9")


def project_wheel(folder: Path, version: str, *, breaks: bool = False) -> Path:
    """This checkout as a wheel of another version; one that breaks ends as soon as it shall serve."""
    from appliance import __version__

    source = folder / "source"
    source.mkdir(parents=True)
    copy_sources(source)
    for path in (source / "pyproject.toml", source / "appliance" / "__init__.py"):
        path.write_text(path.read_text().replace(f'"{__version__}"', f'"{version}"'))
    if breaks:
        (source / "appliance" / "daemon.py").write_text("raise RuntimeError('this release breaks on start')\n")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))
