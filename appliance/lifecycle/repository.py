"""What is on disk: model folders, their manifests, their versions. Read anew on every scan; nothing is kept, nothing is run.

A folder that is wrong is reported with its reason and serves nothing; it never keeps the others from being seen. Names come from
the directory listing and are checked against a pattern; a name from a client is only ever looked up here, never joined to a path.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import msgspec

from appliance.building.version_files import version_files
from appliance.config import ConfigError, decode_toml
from appliance.core.manifest import MODEL_NAME_PATTERN, ModelManifest
from appliance.core.request import ModelName

NAME = re.compile(MODEL_NAME_PATTERN)
VERSION = re.compile(r"^[1-9][0-9]{0,9}$")
NOT_OURS = frozenset({"lost+found"})
"""At the top of every ext4: a models folder may be a disk of its own."""
MAX_LABELS = 1_000_000
MAX_MANIFEST_BYTES = 1 << 20

ENGINE_FILES = {"model.onnx": "onnxruntime"}
"""Which engine runs a file of that name as it is; the others are built from it."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Numbers of devices and files are alike on boxes that were installed alike; this is not."""

BUILT_ENGINES = ("tensorrt", "tensorrt_rtx")


class VersionFolder(msgspec.Struct, frozen=True):
    """One version on disk. `fingerprint` changes when any of its files, the manifest or the labels change."""

    version: int
    engine: str
    model_file: str
    fingerprint: str


class ModelFolder(msgspec.Struct, frozen=True):
    """One model on disk. With a `problem`, nothing of it can be served; per-version problems are in `broken`."""

    name: ModelName
    manifest: ModelManifest
    labels: tuple[str, ...]
    versions: dict[int, VersionFolder]
    broken: dict[int, str]
    problem: str = ""


class Repository:
    """The models folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def identity(self) -> str:
        """The same for the same folder on the same box, by whatever path, and no path; empty if it cannot be looked at.

        By it a command sees whether a running appliance serves the folder that the command works on.
        """
        try:
            status, boot = self._path.stat(), BOOT_ID.read_text()
        except OSError:
            return ""
        return hashlib.sha256(f"{boot} {status.st_dev} {status.st_ino}".encode()).hexdigest()[:32]

    def scan(self) -> dict[ModelName, ModelFolder]:
        """Every model folder, by name. OSError if the repository itself cannot be read."""
        found = {}
        for entry in sorted(self._path.iterdir()):
            if entry.name.startswith(".") or entry.name in NOT_OURS or not entry.is_dir():
                continue
            # what is no UTF-8 could be shown to nobody
            name = ModelName(os.fsencode(entry.name).decode(errors="replace"))
            if NAME.match(entry.name) is None:
                problem = "the folder's name must be letters, digits, '.', '_' or '-', and start with a letter or digit"
                found[name] = ModelFolder(name, ModelManifest(), (), {}, {}, problem)
            else:
                found[name] = self._read(name, entry)
        return found

    def read(self, name: ModelName) -> ModelFolder | None:
        """One model folder, or None if there is none of that name."""
        if NAME.match(name) is None:
            return None
        path = self._path / name
        return self._read(name, path) if path.is_dir() else None

    def _read(self, name: ModelName, path: Path) -> ModelFolder:
        try:
            manifest, text = _manifest(path)
            labels = _labels(path, manifest)
        except (ConfigError, OSError, ValueError) as error:
            return ModelFolder(name, ModelManifest(), (), {}, {}, _words(error))
        versions: dict[int, VersionFolder] = {}
        broken: dict[int, str] = {}
        try:
            numbered = [child for child in path.iterdir() if VERSION.match(child.name) and child.is_dir()]
        except OSError as error:
            return ModelFolder(name, manifest, labels, {}, {}, _words(error))
        common = hashlib.sha256(text.encode() + "\n".join(labels).encode()).hexdigest()
        for child in numbered:
            try:
                versions[int(child.name)] = _version(child, manifest, common)
            except (OSError, ValueError) as error:
                broken[int(child.name)] = _words(error)
        problem = "" if versions or broken else "it has no version folder (1, 2, …)"
        return ModelFolder(name, manifest, labels, versions, broken, problem)


def _manifest(path: Path) -> tuple[ModelManifest, str]:
    file = path / "model.toml"
    if not file.exists():
        return ModelManifest(), ""
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"model.toml is larger than {MAX_MANIFEST_BYTES} bytes")
    text = file.read_text()
    return decode_toml(text, ModelManifest, file="model.toml"), text


def _labels(path: Path, manifest: ModelManifest) -> tuple[str, ...]:
    name = manifest.labels or "labels.txt"
    if "/" in name or name.startswith("."):
        raise ValueError(f"labels must name a file in the model's folder, {name!r} does not")
    file = path / name
    if not file.exists():
        if manifest.labels:
            raise ValueError(f"the labels file {name!r} is missing")
        return ()
    labels = tuple(line.strip() for line in file.read_text().splitlines())
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{name} holds {len(labels)} labels, at most {MAX_LABELS} are allowed")
    return labels


def _version(path: Path, manifest: ModelManifest, common: str) -> VersionFolder:
    """A version folder; ValueError if no engine can run what is in it."""
    version = int(path.name)
    if manifest.engine in BUILT_ENGINES and manifest.device == "cpu":
        raise ValueError(f'engine = "{manifest.engine}" needs a GPU: set device = "cuda"')
    if manifest.engine == "loopback":
        return VersionFolder(version, "loopback", "", common)
    for file_name, engine in ENGINE_FILES.items():
        file = path / file_name
        if manifest.engine in ("", engine, *BUILT_ENGINES) and file.is_file():
            return VersionFolder(version, engine, str(file.resolve()), _fingerprint(path, common))
    raise ValueError(f"version {version} holds no {' or '.join(ENGINE_FILES)}")


def _fingerprint(path: Path, common: str) -> str:
    """Names, sizes and times of a version's files, wherever they lie in it, and what else counts for it."""
    files, links = version_files(path)
    stamps: list[tuple[str, ...] | tuple[str, int, int]] = [
        (name, (status := file.stat()).st_size, status.st_mtime_ns) for name, file in files.items()
    ]
    stamps += links.items()
    return hashlib.sha256(repr((common, stamps)).encode()).hexdigest()


def _words(error: Exception) -> str:
    """An error's text without the folder it happened in: reasons are shown to clients."""
    if isinstance(error, OSError):
        return f"{error.strerror or type(error).__name__}"
    return str(error)
