"""Builds the package of one Debian release: offline, and twice the same bytes for the same sources and wheels.

    python tools/distribution/build_deb.py --download            # fill build/wheelhouse-3.11, once, with a network
    python tools/distribution/build_deb.py --output dist         # build dist/appliance_VERSION+deb12_amd64.deb, without one

For which Debian is told by the Python that runs this, or by --debian; for another one than this machine's, --interpreter names a
Python of that Debian's minor version, which makes the bytecode.

Nothing here depends on the time, the folder or the order of a folder's files: times are SOURCE_DATE_EPOCH (else the last
commit's), owners are root, modes are set, and what names the build machine is removed. dpkg-deb is all it needs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from appliance.release import system
from tools.distribution import environment, manpages, units
from tools.distribution.environment import PREFIX, ROOT, TARGETS, BuildError, Target

PACKAGE = "appliance"
ARCHITECTURE = "amd64"
FILES = Path(__file__).parent / "debian"
MAINTAINER = "Appliance maintainers <appliance@appliance.invalid>"
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")

CONTROL = """\
Package: {package}
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Pre-Depends: init-system-helpers (>= 1.54~)
Depends: {depends}
Section: science
Priority: optional
Description: on-premises inference appliance
 Runs neural networks for the programs beside it: ONNX models over ZeroMQ and
 HTTP, on one box, for years. Every model version has a process of its own.
 .
 Python libraries are bundled below /{prefix}, at the versions
 that were tested; ONNX Runtime on the CPU is among them.
"""


def main() -> int:
    """Download or build; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", choices=TARGETS, default=this_debian(), help="the release it is for")
    parser.add_argument("--interpreter", type=Path, help="a Python of that release's minor version")
    parser.add_argument("--wheelhouse", type=Path, help="default: build/wheelhouse-PYTHON")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--units", type=Path, default=ROOT / "systemd", help="the folder of units (systemd/)")
    parser.add_argument("--version", help="another version than pyproject.toml's, for tests of upgrades")
    parser.add_argument("--uncompressed", action="store_true", help="four times the size in a quarter of the time")
    parser.add_argument("--download", action="store_true", help="fill the wheelhouse and stop")
    options = parser.parse_args()
    target = TARGETS[options.debian]
    wheelhouse = options.wheelhouse or environment.wheelhouse(target)
    try:
        if options.download or not any(wheelhouse.glob("*.whl")):
            print(f"filling {wheelhouse}, which needs a package index", file=sys.stderr)
            environment.download(wheelhouse, target)
        if options.download:
            return 0
        package = build(
            wheelhouse,
            options.output,
            target=target,
            units_folder=options.units,
            version=options.version,
            interpreter=options.interpreter,
            compressed=not options.uncompressed,
        )
        print(package)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build(
    wheelhouse: Path,
    output: Path,
    *,
    target: Target,
    units_folder: Path,
    version: str | None = None,
    interpreter: Path | None = None,
    compressed: bool = True,
) -> Path:
    """The package's file. BuildError says what is missing."""
    if not any(wheelhouse.glob("*.whl")):
        raise BuildError(f"no wheels in {wheelhouse}: run this with --download where there is a network")
    if not (units_folder / "appliance.service").is_file():
        raise BuildError(f"no appliance.service in {units_folder}: the package would not start")
    epoch = source_date_epoch()
    version = version or project_version()
    # before anything of ours is started: what is derived from the process's own umask would differ between machines
    os.umask(0o022)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        tree.mkdir()
        environment.build(tree, wheelhouse, target, interpreter)
        if version != project_version():
            _restamp(tree / target.packages, version)
        enablable = _stage(tree, target, units_folder, version, epoch)
        _control(tree, target, version, enablable)
        _settle(tree, epoch)
        return pack(tree, output / f"{PACKAGE}_{debian_version(version, target)}_{ARCHITECTURE}.deb", epoch, compressed)


def pack(tree: Path, package: Path, epoch: int, compressed: bool) -> Path:
    """The package's file of a finished tree."""
    kind = ["-Zxz", "-z2", "--threads-max=2"] if compressed else ["-Znone"]
    command = ["dpkg-deb", "--root-owner-group", *kind, "--build", str(tree), str(package)]
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environ)
    return package


def this_debian() -> str:
    """The Debian whose Python is of the same minor version as ours; the oldest if none is."""
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    return next((name for name, target in TARGETS.items() if target.python == ours), min(TARGETS))


def debian_version(version: str, target: Target) -> str:
    """1.2.3+deb12: never two packages of one version, and an upgrade of the whole system finds the next one newer.

    `appliance.release.debian` reads it back.
    """
    return f"{version.replace('.dev', '~dev').replace('rc', '~rc')}+deb{target.debian}"


def project_version() -> str:
    """pyproject.toml's."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def source_date_epoch() -> int:
    """$SOURCE_DATE_EPOCH, else the last commit's time, else a fixed one (a source archive has no history)."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    asked = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.returncode == 0 and asked.stdout.strip() else 1_700_000_000


def _stage(tree: Path, target: Target, units_folder: Path, version: str, epoch: int) -> list[str]:
    """Everything that is not Python; the names of the units that can be enabled."""
    texts: dict[str, str] = {}
    for source in sorted(path for path in units_folder.rglob("*") if path.is_file()):
        name = source.relative_to(units_folder).as_posix()
        place = system.destination(name, target.units)
        _write(tree / place, source.read_bytes())
        if place.startswith(target.units):
            texts[name] = source.read_text()
    _write(tree / "etc/appliance/appliance.toml", (FILES / "appliance.toml").read_bytes())
    shutil.copytree(
        ROOT / "models", tree / "usr/share/appliance/models", ignore=shutil.ignore_patterns(".engines", "__pycache__")
    )
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/appliance").symlink_to(f"/{PREFIX}/bin/appliance".replace("/usr/", "../", 1))
    for name, text in manpages.pages(version, epoch).items():
        _write(tree / "usr/share/man/man1" / f"{name}.gz", _gzip(text.encode()))
    for place, text in manpages.completions().items():
        _write(tree / place, text.encode())
    _write(tree / system.DOC / "changelog.gz", _gzip(_changelog(debian_version(version, target), epoch).encode()))
    _write(tree / system.DOC / "CHANGELOG.md.gz", _gzip((ROOT / "CHANGELOG.md").read_bytes()))
    for source in sorted((ROOT / "docs").glob("*.md")):
        # systemd/README.md of the sources is systemd.md beside them here
        text = source.read_text().replace("../systemd/README.md", "systemd.md")
        _write(tree / system.DOC / source.name, text.encode())
    for folder in ("prometheus", "grafana"):
        for source in sorted((ROOT / "docs" / folder).iterdir()):
            _write(tree / system.DOC / folder / source.name, source.read_bytes())
    _write(tree / system.DOC / "copyright", _copyright(tree, target).encode())
    overrides = (FILES / "lintian-overrides").read_text().replace("@PYTHON@", target.python)
    _write(tree / "usr/share/lintian/overrides/appliance", overrides.encode())
    return units.enablable(texts)


def _restamp(packages: Path, version: str) -> None:
    """Another version in the code, so that a test has something to upgrade to."""
    module = packages / "appliance" / "__init__.py"
    module.write_text(module.read_text().replace(f'"{project_version()}"', f'"{version}"'))
    shutil.rmtree(module.parent / "__pycache__")


def _control(tree: Path, target: Target, version: str, enablable: list[str]) -> None:
    folder = tree / "DEBIAN"
    folder.mkdir()
    size = sum(_kibibytes(path) for path in tree.rglob("*"))
    _write(
        folder / "control",
        CONTROL.format(
            package=PACKAGE,
            version=debian_version(version, target),
            architecture=ARCHITECTURE,
            maintainer=os.environ.get("DEB_MAINTAINER", MAINTAINER),
            size=size,
            depends=", ".join(_depends(target)),
            prefix=PREFIX,
        ).encode(),
    )
    _write(folder / "conffiles", b"/etc/appliance/appliance.toml\n")
    for name in SCRIPTS:
        text = (FILES / name).read_text()
        # sockets before the service, or a stopped service would be started again by its socket
        stoppable = sorted(enablable, key=lambda unit: (not unit.endswith(".socket"), unit))
        text = text.replace("@ENABLABLE@", " ".join(enablable)).replace("@STOPPABLE@", " ".join(stoppable))
        _write(folder / name, text.encode())
    sums = []
    for path in sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()):
        name = path.relative_to(tree).as_posix()
        if not name.startswith(("DEBIAN/", "etc/")):
            sums.append(f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {name}\n")
    _write(folder / "md5sums", "".join(sums).encode())


def _depends(target: Target) -> list[str]:
    """The environment is bound to the minor version of Python; the wheels need that libc (cryptography's)."""
    major, minor = target.python.split(".")
    return [
        f"python3 (>= {target.python})", f"python3 (<< {major}.{int(minor) + 1})", "libc6 (>= 2.34)", "libgcc-s1",
        "libstdc++6 (>= 11)", "systemd | systemd-standalone-sysusers", "systemd | systemd-standalone-tmpfiles",
    ]  # fmt: skip


def _settle(tree: Path, epoch: int) -> None:
    """Modes by what a file is, and one time for all."""
    programs = {tree / PREFIX / "bin" / "appliance", *(tree / "DEBIAN" / name for name in SCRIPTS)}
    programs.update((tree / system.PROGRAMS).glob("*"))
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path in programs else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def _kibibytes(path: Path) -> int:
    """As Debian policy counts for Installed-Size: files rounded up, everything else one."""
    return -(-path.stat().st_size // 1024) if path.is_file() and not path.is_symlink() else 1


def _changelog(version: str, epoch: int) -> str:
    """Debian's form of the entry; the text for people is CHANGELOG.md beside it."""
    date = format_datetime(datetime.fromtimestamp(epoch, UTC))
    return (
        f"{PACKAGE} ({version}) stable; urgency=medium\n\n"
        f"  * Release {version.partition('+')[0]}; what changed is in CHANGELOG.md.gz.\n\n"
        f" -- {os.environ.get('DEB_MAINTAINER', MAINTAINER)}  {date}\n"
    )


def _copyright(tree: Path, target: Target) -> str:
    """Debian's machine-readable form, with what is bundled and under which licence by its own metadata."""
    text = (FILES / "copyright").read_text().replace("@PACKAGES@", f"/{target.packages}")
    for name, version, licence in environment.distributions(tree):
        if name != PACKAGE:
            text += f" .\n {name} {version}: {licence}\n"
    return text


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=9, mtime=0)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
