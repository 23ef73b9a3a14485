"""Small bundles for tests, with keys of their own."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.release import archive, signing
from appliance.release.box import this_box
from appliance.release.errors import BundleError
from appliance.release.manifest import File, Manifest, Target

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


def verify(message: bytes, signature: bytes) -> str:
    from cryptography.exceptions import InvalidSignature

    try:
        KEY.public_key().verify(signature, message)
    except InvalidSignature as error:
        raise BundleError("no trusted key signed this, or it was altered") from error
    return signing.key_id(KEY.public_key())


def manifest_of(files: dict[str, bytes], **changes: object) -> Manifest:
    listed = tuple(File(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items()))
    values: dict[str, object] = {
        "format": "appliance-bundle-1",
        "version": "1.0.0",
        "created": "2026-01-01T00:00:00Z",
        "kind": "models" if not any(name.startswith("release/") for name in files) else "wheels",
        "target": Target("any", "any", "any"),
        "files": listed,
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def bytes_of(files: dict[str, bytes], *, key: Ed25519PrivateKey = KEY, **changes: object) -> bytes:
    target = io.BytesIO()
    archive.write(target, manifest_of(files, **changes), key.sign, lambda file: io.BytesIO(files[file.name]))
    return target.getvalue()


def read(data: bytes) -> dict[str, bytes]:
    reader = archive.Reader(io.BytesIO(data), verify)
    return {file.name: b"".join(chunks) for file, chunks in reader.files()}


def write_keys(folder: Path) -> Path:
    """A key pair in files: the private one's path; the public one is in folder/keys."""
    signing.generate(folder / "maker.key", folder / "keys" / "maker.pub")
    return folder / "maker.key"


HERE = this_box()
