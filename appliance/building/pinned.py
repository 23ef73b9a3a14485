"""Small files that stay with the engines of this box: sealed by its key like them, whole after a power cut, set aside when bad.

A timing cache holds compiled code, so one that was altered, or came from another device, is never given to the library.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
from pathlib import Path

from appliance.building.store import EngineStore, StoreError
from appliance.host.durable import write_durably

log = logging.getLogger(__name__)

SEAL_BYTES = 64
"""HMAC-SHA-256 in hexadecimal, before the data."""


class PinnedFile:
    """One such file of a store. `read` gives only what `write` of this device wrote under the same name."""

    def __init__(self, store: EngineStore, name: str) -> None:
        self._store = store
        self._name = name
        self.path: Path = store.path / name

    def read(self) -> bytes:
        """The data; empty if there is none. A file that is not ours, cut or altered is set aside."""
        try:
            sealed = self.path.read_bytes()
        except OSError:
            return b""
        seal, data = sealed[:SEAL_BYTES], sealed[SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(data)):
            self.set_aside("its seal does not fit")
            return b""
        return data

    def write(self, data: bytes) -> None:
        """Replace it. StoreError if it cannot be written; the old one stays then."""
        try:
            write_durably(self.path, self._seal(data) + data, mode=0o600)
        except OSError as error:
            raise StoreError(f"{self._name} cannot be written: {error.strerror}") from error

    def set_aside(self, reason: str) -> None:
        """Keep it from being read again, and keep it for whoever asks why."""
        log.warning("store.set_aside", extra={"fields": {"file": self._name, "reason": reason}})
        with contextlib.suppress(OSError):
            self.path.replace(self.path.with_name(f"{self._name}.bad"))

    def _seal(self, data: bytes) -> bytes:
        return self._store.seal(self._name.encode() + b"\0" + data).encode()
