"""The bytes of a bundle: a POSIX tar archive of which there is exactly one for a manifest. Pure, over open binary streams.

    manifest.json   what is in it, see `manifest`
    manifest.sig    64 bytes, Ed25519 over the bytes before
    the files       in the manifest's order

Any tar can unpack it, but the reader here never parses a header: it knows from the signed manifest which header has to come
next, and refuses every other byte. So there are no links, devices, modes, duplicates or foreign names to be careful about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from appliance.release.errors import BundleError
from appliance.release.manifest import MAX_MANIFEST_BYTES, File, Manifest, decode, encode

BLOCK = 512
CHUNK_BYTES = 1 << 20
SIGNATURE_BYTES = 64
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
END = bytes(2 * BLOCK)

Verify = Callable[[bytes, bytes], str]
"""(message, signature) -> the id of the trusted key that made it; BundleError if none did."""

AGAIN = "copy it again; `appliance bundle verify` tells which part is wrong where it came in parts"


def header(name: str, size: int) -> bytes:
    """The one ustar header of a file of that name and size (IEEE Std 1003.1, pax, "ustar Interchange Format")."""
    encoded = name.encode("ascii")
    prefix = b""
    if len(encoded) > 100:
        prefix, _, encoded = encoded.rpartition(b"/")
    if len(encoded) > 100 or len(prefix) > 155:
        raise BundleError(f"the name {name[:60]!r}… is too long for a bundle", "the last part may have 100 characters")
    fields = [
        encoded.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"00000000000\0",
        b" " * 8, b"0", bytes(100), b"ustar\x0000", b"root".ljust(32, b"\0"), b"root".ljust(32, b"\0"),
        b"0000000\0", b"0000000\0", prefix.ljust(155, b"\0"), bytes(12),
    ]  # fmt: skip
    fields[6] = b"%06o\0 " % sum(b"".join(fields))
    return b"".join(fields)


def write(
    target: BinaryIO, manifest: Manifest, sign: Callable[[bytes], bytes], contents: Callable[[File], BinaryIO]
) -> None:
    """Write the whole bundle; `contents` opens a file's bytes. BundleError if one is not what the manifest says."""
    document = encode(manifest)
    _write_member(target, MANIFEST, document)
    _write_member(target, SIGNATURE, sign(document))
    for file in manifest.files:
        target.write(header(file.name, file.size))
        digest = hashlib.sha256()
        written = 0
        with contents(file) as source:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
                digest.update(chunk)
                written += len(chunk)
        if written != file.size or digest.hexdigest() != file.sha256:
            raise BundleError(f"{file.name} changed while the bundle was written", "write it again")
        target.write(bytes(-file.size % BLOCK))
    target.write(END)


class Reader:
    """A bundle being read. After construction the signature is good and `manifest` may be looked at.

    BundleError at once if no trusted key signed it.
    """

    def __init__(self, source: BinaryIO, verify: Verify) -> None:
        self._source = source
        first = self._take(BLOCK, "its beginning")
        try:
            size = int(first[124:135], 8)
        except ValueError:
            size = -1
        if not 0 < size <= MAX_MANIFEST_BYTES or first != header(MANIFEST, size):
            raise BundleError("this is no bundle of the appliance", "name the .bundle file, or its .parts index")
        document = self._body(size, MANIFEST)
        self._expect(header(SIGNATURE, SIGNATURE_BYTES), SIGNATURE)
        signature = self._body(SIGNATURE_BYTES, SIGNATURE)
        self.key_id = verify(document, signature)
        self.manifest = decode(document)

    def files(self) -> Iterator[tuple[File, Iterator[bytes]]]:
        """Each file with its chunks, in order, and the archive's end behind them. The chunks of a file have to be taken
        before the next; its last chunk is handed out only after the digest was found right."""
        for file in self.manifest.files:
            self._expect(header(file.name, file.size), file.name)
            yield file, self._chunks(file)
        self._expect(END, "its end")
        if self._source.read(1):
            raise BundleError("there is something behind the end of the bundle", AGAIN)

    def _chunks(self, file: File) -> Iterator[bytes]:
        digest = hashlib.sha256()
        left = file.size
        while left:
            chunk = self._take(min(left, CHUNK_BYTES), file.name)
            digest.update(chunk)
            left -= len(chunk)
            if left:
                yield chunk
            else:
                last = chunk
        if digest.hexdigest() != file.sha256:
            raise BundleError(f"{file.name} is not what was signed", AGAIN)
        self._expect(bytes(-file.size % BLOCK), file.name)
        if file.size:
            yield last

    def _body(self, size: int, name: str) -> bytes:
        data = self._take(size, name)
        self._expect(bytes(-size % BLOCK), name)
        return data

    def _expect(self, wanted: bytes, name: str) -> None:
        if self._take(len(wanted), name) != wanted:
            raise BundleError(f"the bundle was altered at {name}", AGAIN)

    def _take(self, size: int, name: str) -> bytes:
        pieces = []
        left = size
        while left:
            piece = self._source.read(left)
            if not piece:
                raise BundleError(f"the bundle ends early, at {name}", AGAIN)
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


def _write_member(target: BinaryIO, name: str, data: bytes) -> None:
    target.write(header(name, len(data)) + data + bytes(-len(data) % BLOCK))
