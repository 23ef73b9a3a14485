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
from dataclasses import dataclass
from pathlib import Path

from tools.distribution.build_wheel import ROOT, copy_sources

PREFIX = "usr/lib/appliance"


@dataclass(frozen=True)
class Target:
    """A release of Debian: its number, its Python's, the minor number of its glibc (2.36), and where its units belong."""

    debian: str
    python: str
    glibc: int
    units: str

    @property
    def abi(self) -> str:
        """cp311."""
        return f"cp{self.python.replace('.', '')}"

    @property
    def packages(self) -> str:
        """The folder of the bundled libraries, below the root."""
        return f"{PREFIX}/lib/python{self.python}/site-packages"


TARGETS = {
    "12": Target("12", "3.11", 36, "lib/systemd/system"),
    # /lib is for base packages only there (UsrMerge)
    "13": Target("13", "3.13", 41, "usr/lib/systemd/system"),
}
"""One package for each: compiled wheels and bytecode are bound to a minor version of Python."""

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


def wheelhouse(target: Target) -> Path:
    """Where a target's wheels are kept."""
    return ROOT / "build" / f"wheelhouse-{target.python}"


def download(wheelhouse: Path, target: Target) -> None:
    """Fill the wheelhouse with the pinned wheels for that Debian; the only step that uses a network."""
    wheelhouse.mkdir(parents=True, exist_ok=True)
    _pip("download", *_target_options(target), "--dest", str(wheelhouse), *_requirements())
    # for slots, which have none of their own; it unpacks on the box and is not part of what runs
    _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheelhouse), "pip")


def build(tree: Path, wheelhouse: Path, target: Target, interpreter: Path | None = None) -> None:
    """Make the environment below `tree`, from the wheelhouse and this checkout only. `interpreter`: see `compiler`."""
    compiling = compiler(target, interpreter)
    home = tree / PREFIX
    packages = tree / target.packages
    packages.mkdir(parents=True)
    offline = ("--no-index", "--find-links", str(wheelhouse), "--target", str(packages), "--no-compile", "--no-deps")
    _pip("install", *_target_options(target), *offline, *_requirements())
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
        (binaries / name).symlink_to(f"/usr/bin/python{target.python}")
    (binaries / "appliance").write_text(LAUNCHER)
    (binaries / "appliance").chmod(0o755)
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n"
    )
    _compile(home, compiling)


def compiler(target: Target, given: Path | None = None) -> Path:
    """What makes the bytecode: of the target's minor version, Debian's own if it is here. BuildError if there is none."""
    wanted = tuple(int(part) for part in target.python.split("."))
    named = [given] if given else [Path(f"/usr/bin/python{target.python}"), Path(sys.executable)]
    for path in named:
        ask = [str(path), "-I", "-c", "import sys; print(*sys.version_info[:2])"]
        try:
            asked = subprocess.run(ask, capture_output=True, text=True, check=False)
        except OSError:
            continue
        if asked.returncode == 0 and tuple(int(part) for part in asked.stdout.split()) == wanted:
            return path
    raise BuildError(
        f"the package for Debian {target.debian} needs bytecode of Python {target.python}, and {named[0]} is none: "
        "build it on that Debian, or name such an interpreter with --interpreter"
    )


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


def _target_options(target: Target) -> tuple[str, ...]:
    options = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python]
    for abi in (target.abi, "abi3", "none"):
        options += ["--abi", abi]
    # what that glibc runs; 2014 is 2.17 in the words of older wheels
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(17, target.glibc + 1)]
    for platform in ("manylinux2014_x86_64", *platforms, "any"):
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


def _compile(home: Path, interpreter: Path) -> None:
    """Bytecode beside the sources, found valid without looking at times: the tree is read-only to the service.

    One process, so that the same source always gives the same bytes; with the paths that the files will have.
    """
    command = [str(interpreter), "-I", "-m", "compileall", "-q", "-j1", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(home), "-p", f"/{PREFIX}", str(home / "lib")]
    # files that are no Python of this version (templates, tests of parsers) are left as they are
    subprocess.run(command, capture_output=True, check=False, env={"PYTHONHASHSEED": "0", "PATH": os.environ["PATH"]})
