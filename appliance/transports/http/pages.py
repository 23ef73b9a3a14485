"""The page's files: read once from the package, sent with what a browser needs to trust nothing else.

Knows no route but its own and no model. The chart library comes from its Python package; where that is absent, there is none.
"""

from __future__ import annotations

import gzip
import hashlib
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import msgspec

from appliance.core.errors import not_found
from appliance.transports.http.exchange import Exchange

TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".json": b"application/json",
    ".svg": b"image/svg+xml",
}

SECURITY = (
    b"Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"
    b"X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
    b"Cross-Origin-Opener-Policy: same-origin\r\nCross-Origin-Resource-Policy: same-origin\r\n"
)

CHARTS = "/page/plotly.js"
GZIP_LEVEL = 6


class PageFile(msgspec.Struct, frozen=True):
    """One file as it is sent, plain and compressed."""

    head: bytes
    tag: str
    plain: bytes
    packed: bytes


class Pages:
    """`/` and what it needs, under `/page/`."""

    def __init__(self) -> None:
        self._files: dict[str, PageFile] = {}
        self._paths = _paths()

    def knows(self, path: str) -> bool:
        """Whether that address is the page's."""
        return path in self._paths

    def kept(self, path: str) -> PageFile | None:
        """The file, if it was read before."""
        return self._files.get(path)

    def read(self, path: str) -> PageFile:
        """Read and compress it; blocks for a moment (the chart library: 0.3 s). NOT_FOUND if the installation lacks it."""
        file = self._files[path] = _read(path, self._paths[path])
        return file


def send(exchange: Exchange, file: PageFile) -> None:
    """Answer with the file; 304 if the browser has it."""
    head = file.head + b'ETag: "%b"\r\nCache-Control: no-cache\r\nVary: Accept-Encoding\r\n' % file.tag.encode()
    if file.tag in exchange.headers.get("If-None-Match", ""):
        exchange.reply(304, [], head)
    elif "gzip" in exchange.headers.get("Accept-Encoding", ""):
        exchange.reply(200, [file.packed], head + b"Content-Encoding: gzip\r\n")
    else:
        exchange.reply(200, [file.plain], head)


def _paths() -> dict[str, Path]:
    """Every address, and where its file lies; the table is fixed, so that no address names a file."""
    root = Path(str(resources.files("appliance"))) / "web"
    files = (file for file in sorted(root.rglob("*")) if file.suffix in TYPES)
    found = {f"/page/{file.relative_to(root).as_posix()}": file for file in files}
    if "/page/index.html" in found:
        found["/"] = found.pop("/page/index.html")
    spec = find_spec("plotly")
    if spec is not None and spec.origin is not None:
        found[CHARTS] = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return found


def _read(path: str, file: Path) -> PageFile:
    try:
        plain = file.read_bytes()
    except OSError as error:
        raise not_found(f"{path} is missing from this installation: reinstall it") from error
    head = b"Content-Type: %b\r\n" % TYPES[file.suffix] + SECURITY
    return PageFile(head, hashlib.sha256(plain).hexdigest()[:24], plain, gzip.compress(plain, GZIP_LEVEL, mtime=0))
