"""The compiler of a running appliance over a real store: what it gives to be loaded, and what it removes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from appliance.building.store import EngineStore, Entry, key_digest, new_sidecar
from appliance.config import EnginesConfig
from appliance.core.request import ModelName
from appliance.lifecycle.compilation import ModelCompiler
from appliance.lifecycle.compiler import Artifact

ECHO = ModelName("echo")


def kept(store: EngineStore, name: str, size: int = 100) -> Entry:
    """An engine of that many bytes."""
    key = {"is": name}
    with store.building(ECHO, key_digest(key)) as staging:
        (staging / "model.onnx").write_bytes(name[:1].encode() * size)
        return store.commit(staging, ECHO, key_digest(key), new_sidecar(key, "onnxruntime", "fp16", "model.onnx", 0.1))


def artifact(entry: Entry) -> Artifact:
    return Artifact(entry.sidecar.engine, str(entry.model_file), entry.digest, entry.sidecar.label, verified=True)


async def test_an_engine_is_intact_until_a_byte_is_altered_though_size_and_time_stay(tmp_path: Path) -> None:
    entry = kept(EngineStore(tmp_path), "a")
    compiler = ModelCompiler(tmp_path, EnginesConfig())
    assert await compiler.intact(ECHO, artifact(entry))
    before = entry.model_file.stat()
    entry.model_file.write_bytes(b"b" + entry.model_file.read_bytes()[1:])
    os.utime(entry.model_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not await compiler.intact(ECHO, artifact(entry))


async def test_an_engine_that_is_gone_or_lies_elsewhere_is_not_intact(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    one, other = kept(store, "a"), kept(store, "b")
    compiler = ModelCompiler(tmp_path, EnginesConfig())
    mixed = Artifact("onnxruntime", str(other.model_file), one.digest, "fp16", verified=True)
    assert not await compiler.intact(ECHO, mixed)
    store.drop(ECHO, one.digest)
    assert not await compiler.intact(ECHO, artifact(one))
    assert await compiler.intact(ECHO, artifact(other))


async def test_what_was_loaded_last_is_the_last_to_be_removed(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    old, new = kept(store, "a"), kept(store, "b")
    for entry, day in ((old, 1), (new, 2)):
        os.utime(entry.folder, (day * 86400, day * 86400))
    assert await ModelCompiler(tmp_path, EnginesConfig()).intact(ECHO, artifact(old))
    assert store.prune(old.nbytes) == [new.digest]


async def test_what_is_not_in_use_any_more_is_removed_beyond_the_size_that_was_configured(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    entries = [kept(store, name, 400_000) for name in "abc"]
    for day, entry in enumerate(entries):
        os.utime(entry.folder, (day * 86400, day * 86400))
    compiler = ModelCompiler(tmp_path, EnginesConfig(max_size_mb=1))
    await compiler.prune(lambda: frozenset({entries[0].digest}))
    assert {entry.digest for entry in store.entries()} == {entries[0].digest, entries[2].digest}


async def test_pruning_waits_for_a_build_and_asks_only_then_what_is_in_use(tmp_path: Path) -> None:
    entry = kept(EngineStore(tmp_path), "a", 2 << 20)
    compiler = ModelCompiler(tmp_path, EnginesConfig(max_size_mb=1))
    in_use: set[str] = set()
    async with compiler._turn:
        pruning = asyncio.create_task(compiler.prune(lambda: frozenset(in_use)))
        await asyncio.sleep(0)
        in_use.add(entry.digest)
    await pruning
    assert entry.model_file.exists()
