"""Makes an offline bundle from this checkout: the Debian package or the wheels, with models, for boxes without a network.

    python tools/offline_bundle.py --key maker.key dist/appliance.bundle --deb
    python tools/offline_bundle.py --key maker.key --wheels --models models --part-size 64M dist/appliance.bundle

Wheels are the pinned ones of requirements/cpu.txt for that Debian's Python, from build/wheelhouse-PYTHON, filled at first.
The rest of the line goes to `appliance bundle create`, which signs and writes. Beside the bundle it lays install_appliance.py,
which a box without the appliance needs once: `python3 install_appliance.py NAME.bundle --key maker.pub`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.distribution import build_deb, environment
from tools.distribution.build_wheel import ROOT


def main() -> int:
    """Build the release and bundle it; the exit status of `bundle create`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--deb", nargs="?", const="", metavar="PACKAGE", help="with the Debian package: that one, else one built now"
    )
    kind.add_argument("--wheels", action="store_true", help="with wheels, for a slot")
    parser.add_argument(
        "--debian", choices=environment.TARGETS, default=build_deb.this_debian(), help="for which release"
    )
    parser.add_argument("--interpreter", type=Path, help="a Python of that release's minor version")
    parser.add_argument("--wheelhouse", type=Path, help="default: build/wheelhouse-PYTHON")
    parser.add_argument("--units", type=Path, default=ROOT / "systemd")
    parser.add_argument("--version", default=build_deb.project_version())
    options, rest = parser.parse_known_args()
    target = environment.TARGETS[options.debian]
    wheelhouse = options.wheelhouse or environment.wheelhouse(target)
    try:
        rest += ["--version", options.version, "--python", target.python, "--with-installer"]
        if options.deb:
            return create("--release", options.deb, "--system", f"debian-{target.debian}", *rest)
        if not any(wheelhouse.glob("*.whl")):
            environment.download(wheelhouse, target)
        with tempfile.TemporaryDirectory() as work:
            if options.deb is not None:
                package = build_deb.build(
                    wheelhouse,
                    Path(work),
                    target=target,
                    units_folder=options.units,
                    version=options.version,
                    interpreter=options.interpreter,
                )
                return create("--release", str(package), "--system", f"debian-{target.debian}", *rest)
            release = Path(work) / "release"
            collect_wheels(wheelhouse, release)
            return create("--release", str(release), *rest)
    except (environment.BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def collect_wheels(wheelhouse: Path, release: Path) -> None:
    """The wheels that a slot is made of: the pinned ones, this project's, and pip's to unpack them."""
    shutil.copytree(wheelhouse, release, ignore=shutil.ignore_patterns("pip-*", "setuptools-*", "appliance-*"))
    with tempfile.TemporaryDirectory() as work:
        shutil.copy2(environment.project_wheel(Path(work)), release)
    shutil.copy2(environment.pip_wheel(wheelhouse), release)


def create(*arguments: str) -> int:
    """`appliance bundle create` with these arguments; its exit status."""
    return subprocess.run([sys.executable, "-m", "appliance", "bundle", "create", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
