"""What the packaging tests build once: the wheels they need, the package in two releases, a wheel and a source archive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.packaging.installed import InstalledBox
from tests.systemd.box import TREE, why_not
from tools.distribution import environment
from tools.distribution.build_wheel import ROOT, copy_sources

UNITS = ROOT / "systemd" if (ROOT / "systemd" / "appliance.service").is_file() else Path(__file__).parent / "units"
"""What is shipped, else the least that starts."""


def target() -> environment.Target:
    """The Debian of the tree under test. Skips on any other distribution."""
    lines = Path(TREE, "etc/os-release").read_text().splitlines()
    fields = dict(line.replace('"', "").split("=", 1) for line in lines if "=" in line)
    if fields.get("ID") != "debian" or fields.get("VERSION_ID") not in environment.TARGETS:
        pytest.skip(f"there is a package for Debian {' and '.join(environment.TARGETS)}, and this is neither")
    return environment.TARGETS[fields["VERSION_ID"]]


def need_its_python() -> None:
    """Skips where this process has another Python than the Debian under test: its wheels would not run here."""
    if sys.version_info[:2] != tuple(int(part) for part in target().python.split(".")):
        pytest.skip(f"the pinned wheels at hand are for Python {target().python}")


def tree_python(folder: Path) -> Path:
    """A program that runs the Python of the tree under test, with that tree's libraries."""
    program = folder / "python"
    python = f"{TREE}/usr/bin/python{target().python}"
    loader = f"{TREE}/lib64/ld-linux-x86-64.so.2 --argv0 {python} --library-path {TREE}/usr/lib/x86_64-linux-gnu"
    program.write_text(f'#!/bin/sh\nexec {loader} {python} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture(scope="session")
def wheelhouse() -> Path:
    """The pinned wheels; $APPLIANCE_WHEELHOUSE, else build/wheelhouse-PYTHON, filled once where there is an index."""
    folder = Path(os.environ.get("APPLIANCE_WHEELHOUSE", environment.wheelhouse(target())))
    if not any(folder.glob("pip-*.whl")):
        try:
            environment.download(folder, target())
        except environment.BuildError as error:
            pytest.skip(f"the wheels cannot be had: {str(error)[-300:]}")
    return folder


def build_deb(wheelhouse: Path, output: Path, *more: str, **variables: str) -> Path:
    """Build the package as `make deb` does."""
    options = ["--wheelhouse", str(wheelhouse), "--output", str(output), "--units", str(UNITS)]
    options += ["--debian", target().debian]
    if TREE != "/":
        options += ["--interpreter", str(tree_python(output))]
    command = [sys.executable, "tools/distribution/build_deb.py", *options, *more]
    variables = {**os.environ, **variables}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=variables)
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
    return build_deb(wheelhouse, tmp_path_factory.mktemp("deb"), "--uncompressed")


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


def changed_deb(deb: Path, folder: Path, version: str, change: Callable[[Path], None] = lambda _: None) -> Path:
    """The package as another release, in which `change` may alter the installed tree. Seconds, where a build takes a minute."""
    from appliance import __version__

    tree = folder / version
    subprocess.run(["dpkg-deb", "--raw-extract", str(deb), str(tree)], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace(f"Version: {__version__}", f"Version: {version}"))
    package = tree / target().packages / "appliance"
    (package / "__init__.py").write_text(
        (package / "__init__.py").read_text().replace(f'"{__version__}"', f'"{version}"')
    )
    change(tree)
    # bytecode is never looked at twice: what was changed needs new one, made when it starts
    for stale in package.glob("__pycache__"):
        shutil.rmtree(stale)
    made = folder / f"appliance_{version}+deb{target().debian}_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(made)], check=True)
    shutil.rmtree(tree)
    return made


BREAKS = "raise RuntimeError('this release breaks on start')\n"
HANGS = """import time
from appliance.host import systemd
while True:
    systemd.extend_timeout(30)
    time.sleep(1)
"""


def breaks_on_start(tree: Path) -> None:
    """A change for `changed_deb`: it is installed, answers its command line, and ends as soon as it shall serve."""
    (tree / target().packages / "appliance/daemon.py").write_text(BREAKS)


def hangs_on_start(tree: Path) -> None:
    """The same, of a release that never comes up, and says all the time that it is about to."""
    (tree / target().packages / "appliance/daemon.py").write_text(HANGS)


def project_wheel(folder: Path, version: str, *, daemon: str = "") -> Path:
    """This checkout as a wheel of another version; with another daemon: `BREAKS`, `HANGS`."""
    from appliance import __version__

    source = folder / "source"
    source.mkdir(parents=True)
    copy_sources(source)
    for path in (source / "pyproject.toml", source / "appliance" / "__init__.py"):
        path.write_text(path.read_text().replace(f'"{__version__}"', f'"{version}"'))
    if daemon:
        (source / "appliance" / "daemon.py").write_text(daemon)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))
