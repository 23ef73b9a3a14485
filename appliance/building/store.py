"""Engines kept on this box: found by what they were made from, never used if this box did not make them or they were altered.

A folder per model and key: `<path>/<model>/<key>/{model file, engine.json, build.log, verification.json, verification.html}`.
Reports on models that serve as they are lie beside them, in folders `.as-is-<version>-<key>`.
The sidecar `engine.json` is sealed with a MAC by a key that only this device has: an engine file is executable code. Entries
appear whole, by a rename; whatever a power cut leaves is a folder that nobody finds and the next build removes. Knows no engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from appliance.host.durable import sync_file, sync_folder, write_durably

FORMAT = "2"
"""Part of every key: raised when what is kept here changes its meaning, so that old entries are not found."""

SIDECAR = "engine.json"
REPORT_JSON, REPORT_PAGE = "verification.json", "verification.html"
KEY_FILE = "device.key"
KEY_BYTES = 32
STAGING = ".staging-"
AS_IS = ".as-is-"
CHUNK_BYTES = 1 << 20


class StoreError(Exception):
    """The store cannot be read or written; the text says what and why."""


class Sidecar(msgspec.Struct, frozen=True):
    """What is known of an entry. `files` are SHA-256 digests; `key` the parts it is found by.

    `verified`: "" not yet, "passed", or "failed"; `verified_by` is the digest of the settings and inputs that said so, `reason`
    the first failure, `summary` a line on what was found. `inputs` and `outputs` by name ("FP32 [-1, 3, 224, 224]"); `golden` is
    a digest of the golden files it was made beside; `driver` was the GPU's; `log` is the end of the build's log. `mac` seals all.
    """

    key: dict[str, str]
    engine: str
    label: str
    model_file: str
    files: dict[str, str]
    created: float
    seconds: float
    verified: str = ""
    verified_by: str = ""
    reason: str = ""
    summary: str = ""
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    golden: str = ""
    driver: str = ""
    log: tuple[str, ...] = ()
    mac: str = ""


class Entry(msgspec.Struct, frozen=True):
    """An engine that is kept: its folder, and its sidecar, whose seal and digests were found good."""

    model: str
    digest: str
    folder: Path
    sidecar: Sidecar

    @property
    def model_file(self) -> Path:
        """What an engine loads."""
        return self.folder / self.sidecar.model_file

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())


def key_digest(key: Mapping[str, str]) -> str:
    """The name of an entry: SHA-256 of its key's parts and the format."""
    document = json.dumps([FORMAT, sorted(key.items())], separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest()[:32]


def file_digest(file: Path) -> str:
    """SHA-256 of a file. OSError if it cannot be read."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class EngineStore:
    """The folder of engines. Safe for several processes at once: one builds an entry, the others wait for it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _device_key(self) -> bytes:
        """This device's secret, made when first needed. StoreError if it cannot be kept."""
        file = self.path / KEY_FILE
        try:
            key = file.read_bytes()
        except FileNotFoundError:
            key = b""
        except OSError as error:
            raise StoreError(f"the device key cannot be read: {error.strerror}") from error
        if len(key) == KEY_BYTES:
            return key
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._locked(self.path / f".{KEY_FILE}.lock"):
                if file.exists() and len(file.read_bytes()) == KEY_BYTES:
                    return file.read_bytes()
                key = secrets.token_bytes(KEY_BYTES)
                write_durably(file, key, mode=0o600)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror}") from error
        return key

    @contextlib.contextmanager
    def _locked(self, file: Path) -> Iterator[None]:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def building(self, model: str, digest: str) -> Iterator[Path]:
        """Hold the right to build an entry, waiting while another process has it; gives a fresh folder to build in.

        The folder is removed afterwards, whatever happened, unless `commit` made it the entry. StoreError if it cannot be made.
        """
        folder = self.path / model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked(folder / f".{digest}.lock"):
                for left in folder.glob(f"{STAGING}{digest}-*"):
                    shutil.rmtree(left, ignore_errors=True)
                staging = folder / f"{STAGING}{digest}-{os.getpid()}"
                staging.mkdir()
                try:
                    yield staging
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise StoreError(f"the engines' folder cannot be written: {error.strerror}") from error

    def commit(self, staging: Path, model: str, digest: str, sidecar: Sidecar) -> Entry:
        """Make what was built the entry: digests, seal, sync, rename. An entry of that name is replaced. StoreError: not kept."""
        try:
            names = sorted(file.name for file in staging.iterdir() if file.is_file() and file.name != SIDECAR)
            kept = msgspec.structs.replace(
                sidecar, files={name: file_digest(staging / name) for name in names if not name.endswith(".log")}
            )
            for name in names:
                sync_file(staging / name)
            self._write_sidecar(staging, kept)
            sync_folder(staging)
            target = self.path / model / digest
            if target.exists():
                aside = target.with_name(f"{STAGING}{digest}-old-{os.getpid()}")
                target.rename(aside)
                staging.rename(target)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                staging.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise StoreError(f"the engine cannot be kept: {error.strerror}") from error
        found = self.find(model, digest)
        if found is None:
            raise StoreError("the engine was written and does not read back as it was written: is the disk failing?")
        return found

    def _write_sidecar(self, folder: Path, sidecar: Sidecar) -> None:
        write_durably(folder / SIDECAR, msgspec.json.encode(self._sealed(sidecar)))

    def _sealed(self, sidecar: Sidecar) -> Sidecar:
        blank = msgspec.structs.replace(sidecar, mac="")
        return msgspec.structs.replace(blank, mac=self.seal(msgspec.json.encode(blank, order="sorted")))

    def seal(self, document: bytes) -> str:
        """HMAC-SHA-256 by this device's key, in hexadecimal. StoreError if the key cannot be had."""
        return hmac.new(self._device_key(), document, hashlib.sha256).hexdigest()

    def find(self, model: str, digest: str) -> Entry | None:
        """The entry, if it is whole, sealed by this device, and unaltered; else None."""
        folder = self.path / model / digest
        try:
            sidecar = msgspec.json.decode((folder / SIDECAR).read_bytes(), type=Sidecar)
        except (OSError, msgspec.DecodeError):
            return None
        if not hmac.compare_digest(self._sealed(sidecar).mac, sidecar.mac) or key_digest(sidecar.key) != digest:
            return None
        try:
            if any(file_digest(folder / name) != wanted for name, wanted in sidecar.files.items()):
                return None
        except OSError:
            return None
        if sidecar.model_file not in sidecar.files:
            return None
        return Entry(model, digest, folder, sidecar)

    def record_verification(self, entry: Entry, verdict: str, by: str, *, reason: str, summary: str) -> Entry:
        """Keep a verdict ("passed", "failed") with the entry. StoreError if it cannot be written."""
        sidecar = msgspec.structs.replace(
            entry.sidecar, verified=verdict, verified_by=by, reason=reason, summary=summary
        )
        try:
            self._write_sidecar(entry.folder, sidecar)
        except OSError as error:
            raise StoreError(f"the verdict cannot be kept: {error.strerror}") from error
        return msgspec.structs.replace(entry, sidecar=sidecar)

    def report(self, model: str, digest: str) -> bytes | None:
        """The report that was kept with an entry, as JSON; None if there is none. StoreError if it cannot be read."""
        try:
            return (self.path / model / digest / REPORT_JSON).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"the report cannot be read: {error.strerror}") from error

    def keep_as_is(self, model: str, version: str, digest: str, files: Mapping[str, bytes]) -> Path:
        """Keep the report on a version that serves as it is, in place of an earlier one; its folder. StoreError: not kept."""
        folder = self.path / model / as_is(version, digest)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                write_durably(folder / name, data)
            for other in folder.parent.glob(f"{AS_IS}{version}-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        except OSError as error:
            raise StoreError(f"the report cannot be kept: {error.strerror}") from error
        return folder

    def drop(self, model: str, digest: str) -> None:
        """Forget an entry that turned out not to load; it is built anew when it is wanted. StoreError if it cannot be removed."""
        try:
            folder = self.path / model / digest
            with self._locked(folder.with_name(f".{digest}.lock")):
                if folder.exists():
                    aside = folder.with_name(f"{STAGING}{digest}-dropped-{os.getpid()}")
                    folder.rename(aside)
                    sync_folder(folder.parent)
                    shutil.rmtree(aside, ignore_errors=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"the engine cannot be removed: {error.strerror}") from error

    def used(self, entry: Entry) -> None:
        """Note that it was loaded now, for `prune`."""
        with contextlib.suppress(OSError):
            os.utime(entry.folder)

    def entries(self) -> list[Entry]:
        """Every good entry, by model, the newest first."""
        found = []
        with contextlib.suppress(OSError):
            for model in sorted(child for child in self.path.iterdir() if child.is_dir()):
                for folder in sorted(model.iterdir()):
                    if folder.is_dir() and not folder.name.startswith("."):
                        entry = self.find(model.name, folder.name)
                        if entry is not None:
                            found.append(entry)
        return sorted(found, key=lambda entry: (entry.model, -entry.sidecar.created))

    def prune(self, max_bytes: int, keep: frozenset[str] = frozenset()) -> list[str]:
        """Remove what is damaged, left behind, or too much, least recently used first; the digests removed.

        Digests in `keep` stay whatever they take.
        """
        removed = []
        sizes: list[tuple[float, int, Path]] = []
        if not self.path.is_dir():
            return []
        for model in (child for child in self.path.iterdir() if child.is_dir()):
            for folder in (child for child in model.iterdir() if child.is_dir()):
                if folder.name.startswith("."):
                    if folder.name.startswith(STAGING) and self._abandoned(folder):
                        shutil.rmtree(folder, ignore_errors=True)
                    continue
                entry = self.find(model.name, folder.name)
                if entry is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder.name)
                elif folder.name not in keep:
                    sizes.append((folder.stat().st_mtime, entry.nbytes, folder))
                else:
                    max_bytes -= entry.nbytes
        total = sum(size for _, size, _ in sizes)
        for _, size, folder in sorted(sizes):
            if total <= max_bytes:
                break
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
            total -= size
        return removed

    def _abandoned(self, staging: Path) -> bool:
        """Nobody holds the lock of the entry that was being built there."""
        digest = staging.name.removeprefix(STAGING).split("-")[0]
        try:
            descriptor = os.open(staging.parent / f".{digest}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)


def as_is(version: str, digest: str) -> str:
    """The name under which the report on a version that serves as it is is kept."""
    return f"{AS_IS}{version}-{digest}"


def new_sidecar(key: Mapping[str, str], engine: str, label: str, model_file: str, seconds: float) -> Sidecar:
    """A sidecar for what was just built; `commit` adds digests and seal."""
    return Sidecar(dict(key), engine, label, model_file, {}, time.time(), seconds)
