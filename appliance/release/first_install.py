"""Installs a bundle on a box that has no appliance yet: with nothing but the Python and the OpenSSL library of the system.

    python3 install_appliance.py appliance.bundle --key maker.pub

`appliance bundle create --with-installer` lays this file beside the bundle, so it stands alone: only the standard library, and
nothing of this project. It checks the signature with the given public key before it looks at anything, unpacks the package or the
wheels, and lets the release's own `appliance bundle install` do the rest. Who brings this program to the box is trusted as much
as who brings the key: carry both by hand, once. Afterwards every bundle is checked by what is installed.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import ctypes.util
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 512
SIGNATURE_BYTES = 64
MAX_MANIFEST_BYTES = 4 << 20
ED25519_PREFIX = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of the key in its DER form (RFC 8410)."""
EVP_PKEY_ED25519 = 1087
CONFIG = Path("/etc/appliance/appliance.toml")
KEYS = CONFIG.parent / "keys"
PROGRAM = Path("/usr/lib/appliance/bin/appliance")
STATE = Path("/var/lib/appliance-releases/state.json")


class RefusedError(Exception):
    """Nothing was changed, and why."""


def main(arguments: list[str] | None = None) -> int:
    """Check, install, and hand over; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the .bundle file, or the .parts index beside its parts")
    parser.add_argument("--key", type=Path, required=True, help="the maker's public key, maker.pub")
    options, more = parser.parse_known_args(arguments)
    try:
        return install(options.bundle, options.key, more)
    except (RefusedError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def install(bundle: Path, key: Path, more: list[str]) -> int:
    """Install what the bundle has; the exit status of the release's own `bundle install`, which is given `more`."""
    if os.geteuid() != 0:
        raise RefusedError("a first installation needs root")
    if STATE.exists() or PROGRAM.exists():
        raise RefusedError(f"the appliance is on this box already: `appliance bundle install {bundle}`")
    text = key.read_text(errors="replace")
    raw = public_key(text)
    trusted = trusted_place(key.name, raw)
    with open_bundle(bundle, raw) as source, tempfile.TemporaryDirectory(dir="/var/tmp") as work:
        manifest = read_manifest(source, raw)
        check_box(manifest["target"])
        unpack(source, manifest, Path(work))
        # trusted from now on, by being there
        KEYS.mkdir(parents=True, exist_ok=True)
        trusted.write_text(text)
        program = by_dpkg(Path(work)) if manifest["kind"] == "deb" else by_pip(Path(work))
        line = [str(program), "bundle", "install", str(bundle.resolve()), *more]
        return subprocess.run(line, check=False).returncode  # noqa: S603  the release that was just checked


def public_key(text: str) -> bytes:
    """The 32 bytes of an Ed25519 key in a PEM file's text."""
    lines = [line for line in text.splitlines() if line and not line.startswith("-----")]
    try:
        der = base64.b64decode("".join(lines), validate=True)
    except ValueError:
        der = b""
    if "BEGIN PUBLIC KEY" not in text or not der.startswith(ED25519_PREFIX) or len(der) != len(ED25519_PREFIX) + 32:
        raise RefusedError("the key is no Ed25519 public key in a PEM file: take the maker's .pub file")
    return der[-32:]


def trusted_place(name: str, raw_key: bytes) -> Path:
    """Where the key has to lie to be trusted from now on; RefusedError if another key lies there."""
    place = KEYS / (name if name.endswith(".pub") else f"{name}.pub")
    if place.exists() and public_key(place.read_text(errors="replace")) != raw_key:
        raise RefusedError(f"{place} is another key: look at who put it there, and give one of the two another name")
    return place


def signed(raw_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether that key made that Ed25519 signature, by the system's libcrypto (3 or 1.1.1)."""
    name = ctypes.util.find_library("crypto") or "libcrypto.so.3"
    crypto = ctypes.CDLL(name)
    for function in ("EVP_PKEY_new_raw_public_key", "EVP_MD_CTX_new"):
        getattr(crypto, function).restype = ctypes.c_void_p
    size = ctypes.c_size_t
    key = ctypes.c_void_p(crypto.EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, None, raw_key, size(32)))
    context = ctypes.c_void_p(crypto.EVP_MD_CTX_new())
    try:
        if not key or not context or crypto.EVP_DigestVerifyInit(context, None, None, None, key) != 1:
            raise RefusedError("the OpenSSL library of this box cannot check Ed25519 signatures")
        return bool(
            len(signature) == SIGNATURE_BYTES
            and crypto.EVP_DigestVerify(context, signature, size(len(signature)), message, size(len(message))) == 1
        )
    finally:
        crypto.EVP_MD_CTX_free(context)
        crypto.EVP_PKEY_free(key)


def open_bundle(path: Path, raw_key: bytes) -> BinaryIO:
    """The bytes of the bundle, from its file or from the parts of its signed index."""
    if not path.name.endswith(".parts"):
        return path.open("rb")
    data = path.read_bytes()
    if not signed(raw_key, data[SIGNATURE_BYTES:], data[:SIGNATURE_BYTES]):
        raise RefusedError(f"{path} was not signed with this key, or it was altered")
    names = [str(part["name"]) for part in json.loads(data[SIGNATURE_BYTES:])["parts"]]
    for name in names:
        if not (path.parent / name).is_file():
            raise RefusedError(f"the part {name} is missing: copy it beside {path.name}")
    return io.BufferedReader(Parts([path.parent / name for name in names]), 1 << 20)


class Parts(io.RawIOBase):
    """Files read one after the other."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__()
        self._left = list(reversed(paths))
        self._open: BinaryIO | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes of the present file, then of the next; 0 at the end."""
        while self._open is not None or self._left:
            if self._open is None:
                self._open = self._left.pop().open("rb")
            data = self._open.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self._open.close()
            self._open = None
        return 0

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open.close()
        super().close()


def read_manifest(source: BinaryIO, raw_key: bytes) -> dict[str, Any]:
    """The manifest at the beginning of a bundle, after its signature was found good."""
    name, size = _header(source)
    if name != "manifest.json" or not 0 < size <= MAX_MANIFEST_BYTES:
        raise RefusedError("this is no bundle of the appliance")
    document = _body(source, size)
    name, size = _header(source)
    if name != "manifest.sig" or size != SIGNATURE_BYTES or not signed(raw_key, document, _body(source, size)):
        raise RefusedError("the bundle was not signed with this key, or it was altered")
    manifest: dict[str, Any] = json.loads(document)
    if manifest.get("format") != "appliance-bundle-1" or manifest.get("kind") not in ("deb", "wheels"):
        raise RefusedError("the bundle has no release to begin with, or it is for a newer installer")
    return manifest


def check_box(target: dict[str, str]) -> None:
    """RefusedError if the bundle is for another box."""
    fields = dict(
        line.replace('"', "").split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    here = {
        "system": f"{fields.get('ID', 'linux')}-{fields.get('VERSION_ID', '')}".rstrip("-"),
        "machine": platform.machine(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    for what, has in here.items():
        if target[what] not in (has, "any"):
            raise RefusedError(f"the bundle is for {what} {target[what]}, this box has {has}: get the one for this box")


def unpack(source: BinaryIO, manifest: dict[str, Any], folder: Path) -> None:
    """Write the release's files and the configuration into the folder; RefusedError if one is not what was signed."""
    for file in manifest["files"]:
        if _header(source) != (file["name"], file["size"]):
            raise RefusedError(f"the bundle was altered at {file['name']}: copy it again")
        keep = file["name"].startswith(("release/", "configuration/"))
        target = folder / Path(file["name"]).name if keep else Path(os.devnull)
        digest = hashlib.sha256()
        with target.open("wb") as opened:
            for chunk in _chunks(source, file["size"]):
                digest.update(chunk)
                opened.write(chunk)
        if digest.hexdigest() != file["sha256"]:
            raise RefusedError(f"{file['name']} is not what was signed: copy the bundle again")


def by_dpkg(folder: Path) -> Path:
    """Install the package, to be started with every boot; the program that it brings. A configuration that came along is used."""
    (package,) = folder.glob("*.deb")
    brought = folder / CONFIG.name
    if brought.exists() and not CONFIG.exists():
        shutil.copyfile(brought, CONFIG)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    line = ["dpkg", "--force-confold", "--install", str(package)]
    if subprocess.run(line, env=environment, check=False).returncode != 0:  # noqa: S603
        raise RefusedError("dpkg could not install the package; what it says is above")
    if subprocess.run(["systemctl", "enable", "appliance.service"], check=False).returncode != 0:  # noqa: S607  systemd's own
        raise RefusedError(
            "the package is installed, but `systemctl enable appliance.service` failed; what it says is above"
        )
    return PROGRAM


def by_pip(folder: Path) -> Path:
    """An environment of the release's wheels that lives as long as this program; it builds the one that stays."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    pip = next((wheel for wheel in wheels if Path(wheel).name.startswith("pip-")), None)
    if pip is None:
        raise RefusedError("the bundle has no pip to unpack its wheels with: make it with tools/offline_bundle.py")
    place = folder / "environment"
    options = ["install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--no-compile"]
    options += ["--disable-pip-version-check", "--root-user-action=ignore"]
    for line in (
        [sys.executable, "-I", "-m", "venv", "--without-pip", str(place)],
        [str(place / "bin/python"), f"{pip}/pip", *options, *(wheel for wheel in wheels if wheel != pip)],
    ):
        if subprocess.run(line, check=False).returncode != 0:  # noqa: S603  wheels that were checked
            raise RefusedError("the release cannot be put together; what pip says is above")
    return place / "bin/appliance"


def _header(source: BinaryIO) -> tuple[str, int]:
    """Name and size in a tar header."""
    block = source.read(BLOCK)
    try:
        name, size = block[:100].rstrip(b"\0").decode("ascii"), int(block[124:135], 8)
        prefix = block[345:500].rstrip(b"\0").decode("ascii")
    except ValueError:
        raise RefusedError("this is no bundle of the appliance, or it ends early") from None
    return (f"{prefix}/{name}" if prefix else name), size


def _body(source: BinaryIO, size: int) -> bytes:
    return b"".join(_chunks(source, size))


def _chunks(source: BinaryIO, size: int) -> Iterator[bytes]:
    """That many bytes, and behind them what fills the block."""
    left = size
    while left:
        chunk = source.read(min(left, 1 << 20))
        if not chunk:
            raise RefusedError("the bundle ends early: copy it again")
        left -= len(chunk)
        yield chunk
    source.read(-size % BLOCK)


if __name__ == "__main__":
    sys.exit(main())
