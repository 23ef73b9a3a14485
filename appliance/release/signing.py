"""Ed25519 keys and signatures (RFC 8032), and the only place that knows the cryptography library.

Keys are PEM files, so that OpenSSL can check a bundle where this program is not installed yet.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from appliance.release.errors import BundleError

MAX_KEY_BYTES = 64 << 10


def generate(private: Path, public: Path) -> str:
    """Make a pair; its id. The private one is readable for its owner only. BundleError rather than replace a key."""
    for path in (private, public):
        if path.exists():
            raise BundleError(f"{path} exists, and a key is never overwritten", "name another file, or move it away")
    key = Ed25519PrivateKey.generate()
    _write_new(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write_new(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    return key_id(key.public_key())


def signer(private: Path) -> Callable[[bytes], bytes]:
    """What signs with the key in that file."""
    try:
        key = load_pem_private_key(_read(private), None)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{private} is no private key", "make one with `appliance bundle keygen`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"{private} is no Ed25519 key", "make one with `appliance bundle keygen`")
    return key.sign


class TrustedKeys:
    """The public keys in a folder's *.pub files; a file that is taken away is trusted no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = {key_id(key): key for key in map(_public, sorted(folder.glob("*.pub")))}

    def verify(self, message: bytes, signature: bytes) -> str:
        """The id of the key that signed the message; BundleError if none of these did."""
        for name, key in self.keys.items():
            try:
                key.verify(signature, message)
            except InvalidSignature:
                continue
            return name
        if not self.keys:
            raise BundleError(f"no key is trusted: {self.folder} has no *.pub", "put the maker's public key there")
        raise BundleError(
            "no trusted key signed this, or it was altered",
            f"trusted are the keys in {self.folder}: {', '.join(self.keys)}",
        )


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def _public(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(_read(path))
    except ValueError as error:
        raise BundleError(f"{path} is no public key", "take it out of the folder of trusted keys") from error
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(f"{path} is no Ed25519 key", "take it out of the folder of trusted keys")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as opened:
            return opened.read(MAX_KEY_BYTES)
    except OSError as error:
        raise BundleError(f"the key {path} cannot be read: {error.strerror}") from error


def _write_new(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(data)
        os.fsync(opened.fileno())
