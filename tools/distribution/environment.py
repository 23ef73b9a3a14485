"""The virtual environment inside the package: pinned wheels, checked by their hashes, unpacked without any network.

It is put together file by file rather than by `venv`, so that it can be built anywhere and is meant for one place:
/usr/lib/appliance. `build_deb.py` drives it; what the result is packed into is not known here.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.distribution.build_wheel import ROOT, copy_sources

PREFIX = "usr/lib/appliance"
PYTHON = "3.11"
"""Debian 12's."""

PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 26, 27, 28, 31, 34, 35, 36)))
"""What Debian 12's glibc 2.36 runs."""

UNUSED = (
    "numpy/**/tests", "onnx/backend/test", "onnxruntime/tools",
    "setuptools", "_distutils_hack", "pkg_resources",
    "distutils-precedence.pth",
    # of Plotly the page takes plotly.min.js, and its Python code is never imported
    "_plotly_utils", "narwhals", "plotly/[!p_]*", "plotly/plotly", "plotly/package_data/[!p]*",
)  # fmt: skip
"""A third of the size, and nothing of ours imports it."""

LAUNCHER = f"""#!/{PREFIX}/bin/python3 -I
import sys

from appliance.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


class BuildError(Exception):
    """The package cannot be built: why, and what to do."""


def download(wheelhouse: Path) -> None:
    """Fill the wheelhouse with the pinned wheels for Debian 12; the only step that uses a network."""
    wheelhouse.mkdir(parents=True, exist_ok=True)
    _pip("download", *_target_options(), "--dest", str(wheelhouse), *_requirements())
    # for slots, which have none of their own; it unpacks on the box and is not part of what runs
    _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheelhouse), "pip")


def build(tree: Path, wheelhouse: Path) -> None:
    """Make the environment below `tree`, from the wheelhouse and this checkout only."""
    if sys.version_info[:2] != tuple(int(part) for part in PYTHON.split(".")):
        raise BuildError(
            f"the package is for Python {PYTHON}; this is {sys.version.split()[0]}: run it with python{PYTHON}"
        )
    home = tree / PREFIX
    packages = home / "lib" / f"python{PYTHON}" / "site-packages"
    packages.mkdir(parents=True)
    offline = ("--no-index", "--find-links", str(wheelhouse), "--target", str(packages), "--no-compile", "--no-deps")
    _pip("install", *_target_options(), *offline, *_requirements())
    wheel = project_wheel(tree.parent / "wheel")
    _pip("install", *offline, "--upgrade", str(wheel))
    for name in ("bin", "share"):  # commands of others, and what the package itself puts into /usr/share
        shutil.rmtree(packages / name, ignore_errors=True)
    for pattern in UNUSED:
        for found in sorted(packages.glob(pattern), reverse=True):
            if found.is_dir():
                shutil.rmtree(found)
            else:
                found.unlink()
    _forget_the_build(packages)
    binaries = home / "bin"
    binaries.mkdir()
    for name in ("python3", "python"):
        (binaries / name).symlink_to(f"/usr/bin/python{PYTHON}")
    (binaries / "appliance").write_text(LAUNCHER)
    (binaries / "appliance").chmod(0o755)
    (home / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {PYTHON}\n")
    _compile(home)


def pip_wheel(wheelhouse: Path) -> Path:
    """The wheelhouse's pip."""
    found = sorted(wheelhouse.glob("pip-*.whl"))
    if not found:
        raise BuildError(f"no pip in {wheelhouse}: remove the folder and fill it anew with --download")
    return found[-1]


def project_wheel(work: Path) -> Path:
    """This checkout as a wheel, built from a copy so that nothing is left beside the sources."""
    source = work / "source"
    source.mkdir(parents=True)
    copy_sources(source)
    _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(work), str(source))
    shutil.rmtree(source)
    return next(work.glob("appliance-*.whl"))


def distributions(tree: Path) -> list[tuple[str, str, str]]:
    """What is bundled, from its own metadata: (name, version, licence)."""
    found = []
    for metadata in sorted((tree / PREFIX).glob("lib/*/site-packages/*.dist-info/METADATA")):
        fields: dict[str, str] = {}
        for line in metadata.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            key, separator, value = line.partition(": ")
            if separator and (key not in fields or value.startswith("License ::")):
                fields[key] = value
        stated = fields.get("License-Expression") or fields.get("License") or fields.get("Classifier", "")
        found.append(
            (fields["Name"], fields["Version"], " ".join(stated.split("::")[-1].split())[:60] or "see its files")
        )
    return found


def _target_options() -> tuple[str, ...]:
    options = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON]
    for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none"):
        options += ["--abi", abi]
    for platform in (*PLATFORMS, "any"):
        options += ["--platform", platform]
    return tuple(options)


def _requirements() -> tuple[str, ...]:
    return "--require-hashes", "--requirement", str(ROOT / "requirements" / "cpu.txt")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False
    )
    if ended.returncode != 0:
        raise BuildError(f"pip {arguments[0]} failed:\n{ended.stderr.strip()[-3000:]}")


def _forget_the_build(packages: Path) -> None:
    """Remove what names the machine or the moment of the build, and put every RECORD in order."""
    for folder in packages.glob("*.dist-info"):
        for name in ("direct_url.json", "REQUESTED", "INSTALLER"):
            (folder / name).unlink(missing_ok=True)
        record = folder / "RECORD"
        rows = [row for row in csv.reader(io.StringIO(record.read_text())) if row and (packages / row[0]).is_file()]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(sorted(rows))
        record.write_text(text.getvalue())


def _compile(home: Path) -> None:
    """Bytecode beside the sources, found valid without looking at times: the tree is read-only to the service.

    By Debian's interpreter if it is here (its bytecode is the one that will run), one process, so that the same source
    always gives the same bytes; with the paths that the files will have.
    """
    interpreter = f"/usr/bin/python{PYTHON}" if Path(f"/usr/bin/python{PYTHON}").exists() else sys.executable
    command = [interpreter, "-I", "-m", "compileall", "-q", "-j1", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(home), "-p", f"/{PREFIX}", str(home / "lib")]
    # files that are no Python of this version (templates, tests of parsers) are left as they are
    subprocess.run(command, capture_output=True, check=False, env={"PYTHONHASHSEED": "0", "PATH": os.environ["PATH"]})
