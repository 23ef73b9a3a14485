"""The Python API of a TensorRT release, read from NVIDIA's own bindings on a machine without their libraries.

The extension in a bindings wheel needs a few C entry points; everything else is C++ behind pointers that these return. So it can
be imported over empty stub libraries of the same names. The wheels are NVIDIA's: downloaded when a test runs, kept in a cache
(`$APPLIANCE_TEST_CACHE`, else `~/.cache/appliance-tests`), never part of this repository.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec

from tests.contract.tensorrt.api import Api


class Release(msgspec.Struct, frozen=True):
    """One wheel: a distribution, its version, and the module in it."""

    distribution: str
    version: str
    module: str = "tensorrt_bindings"

    def __str__(self) -> str:
        return f"{'rtx-' if 'rtx' in self.module else ''}{self.version}"


RELEASES = (
    Release("tensorrt_cu12_bindings", "10.3.0"),
    Release("tensorrt_cu12_bindings", "10.13.3.9.post1"),
    Release("tensorrt_cu13_bindings", "10.16.1.11"),
    Release("tensorrt_cu13_bindings", "11.0.0.114"),
    Release("tensorrt_cu13_bindings", "11.4.0.106"),
    Release("tensorrt_rtx_cu13_bindings", "1.7.1.116", "tensorrt_rtx_bindings"),
)
"""The oldest that is supported, the last ones before and the first after an incompatible change, the newest; and RTX."""

DOWNLOAD_S = 120
SYSTEM = re.compile(r"^(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux)[-.]")
READER = Path(__file__).with_name("reader.py")


class UnavailableError(Exception):
    """The release cannot be had here; the text says why."""


def cache() -> Path:
    """Where wheels, dumps and the type checker's memory are kept."""
    given = os.environ.get("APPLIANCE_TEST_CACHE")
    folder = Path(given) if given else Path.home() / ".cache" / "appliance-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel(release: Release) -> Path:
    """The wheel for this interpreter, downloaded once. UnavailableError with pip's last words."""
    folder = cache() / "wheels"
    pattern = f"{release.distribution}-{release.version}-*cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    kept = sorted(folder.glob(pattern))
    if not kept:
        wanted = f"{release.distribution}=={release.version}"
        command = (
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(folder),
            wanted,
        )
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"{wanted} did not come within {DOWNLOAD_S} s") from error
        kept = sorted(folder.glob(pattern))
        if not kept:
            words = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise UnavailableError(
                f"{wanted} cannot be downloaded: {words[-1] if words else f'pip ended with {done.returncode}'}"
            )
    return kept[-1]


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError as error:
        raise UnavailableError(
            f"{command[0]} is needed to stand in for TensorRT's libraries, and is not installed"
        ) from error


def needed(extension: Path) -> list[str]:
    """The shared libraries that the extension asks for, but for the system's own."""
    names = re.findall(r"\(NEEDED\).*\[(.+?)\]", _run("readelf", "-d", "-W", str(extension)))
    return [name for name in names if not SYSTEM.match(name)]


def undefined(extension: Path) -> list[str]:
    """C entry points that TensorRT's libraries give: neither versioned (the system's) nor Python's nor C++ runtime's."""
    lines = (line.split() for line in _run("nm", "-D", "--undefined-only", str(extension)).splitlines())
    names = (words[-1] for words in lines if words[-2] == "U" and "@" not in words[-1])
    return [name for name in names if not name.startswith(("Py", "_Py", "_Z", "__"))]


def build_stubs(extension: Path, folder: Path) -> list[Path]:
    """A library for each that is needed: the first with all entry points, answering NULL, the others empty."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in undefined(extension))
    made = []
    for number, name in enumerate(needed(extension)):
        source = folder / f"{number}.c"
        source.write_text(symbols if number == 0 else "typedef int nothing;\n")
        _run("gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source))
        made.append(folder / name)
    return made


@functools.cache
def read(release: Release) -> Api:
    """The release's API, from the cache if this wheel was read before by this reader."""
    file = wheel(release)
    digest = hashlib.sha256(file.read_bytes() + READER.read_bytes()).hexdigest()[:24]
    kept = cache() / "dumps" / f"{release}-{digest}.json"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        site = cache() / "sites" / file.stem
        with zipfile.ZipFile(file) as archive:
            archive.extractall(site)
        extension = next((site / release.module).glob("*.so"))
        stubs = build_stubs(extension, site / "stubs")
        text = _run(sys.executable, str(READER), str(site), release.module, *map(str, stubs))
        draft = kept.with_name(f"{kept.name}.{os.getpid()}")
        draft.write_text(text)
        draft.rename(kept)
    return msgspec.json.decode(kept.read_bytes(), type=Api)
