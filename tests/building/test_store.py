"""The store of engines, on a real disk: found or not found, sealed, altered, half written, pruned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from appliance.building.store import KEY_FILE, SIDECAR, EngineStore, Entry, StoreError, key_digest, new_sidecar

KEY = {"model": "m", "precision": "int8", "file model.onnx": "abc"}
DIGEST = key_digest(KEY)


def _keep(store: EngineStore, key: dict[str, str] = KEY, data: bytes = b"engine") -> Entry:
    digest = key_digest(key)
    with store.building("m", digest) as staging:
        (staging / "model.onnx").write_bytes(data)
        (staging / "build.log").write_text("built\n")
        return store.commit(staging, "m", digest, new_sidecar(key, "onnxruntime", "int8", "model.onnx", 1.5))


def test_what_is_kept_is_found_by_its_key_only(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    entry = _keep(store)
    assert entry.model_file.read_bytes() == b"engine"
    assert store.find("m", DIGEST) == entry
    for part in KEY:
        assert store.find("m", key_digest(KEY | {part: "other"})) is None
    assert store.find("other", DIGEST) is None


def test_every_part_of_a_key_counts_and_their_order_does_not() -> None:
    assert key_digest(dict(reversed(KEY.items()))) == DIGEST
    assert len({key_digest(KEY | {part: "x"}) for part in KEY} | {DIGEST, key_digest(KEY | {"more": ""})}) == 5


@pytest.mark.parametrize("name", ["model.onnx", SIDECAR])
def test_an_altered_file_is_not_found(tmp_path: Path, name: str) -> None:
    store = EngineStore(tmp_path)
    file = _keep(store).folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert store.find("m", DIGEST) is None


@pytest.mark.parametrize("name", ["model.onnx", SIDECAR])
def test_a_missing_or_cut_file_is_not_found(tmp_path: Path, name: str) -> None:
    store = EngineStore(tmp_path)
    file = _keep(store).folder / name
    file.write_bytes(file.read_bytes()[:-1])
    assert store.find("m", DIGEST) is None
    file.unlink()
    assert store.find("m", DIGEST) is None


def test_an_engine_from_another_device_is_not_found(tmp_path: Path) -> None:
    ours, theirs = EngineStore(tmp_path / "ours"), EngineStore(tmp_path / "theirs")
    _keep(ours)
    entry = _keep(theirs)
    target = tmp_path / "ours" / "m" / DIGEST
    for file in entry.folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    assert theirs.find("m", DIGEST) is not None
    assert ours.find("m", DIGEST) is None


def test_a_verdict_cannot_be_written_by_hand(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    entry = _keep(store)
    document = json.loads((entry.folder / SIDECAR).read_bytes()) | {"verified": "passed"}
    (entry.folder / SIDECAR).write_text(json.dumps(document))
    assert store.find("m", DIGEST) is None


def test_a_recorded_verdict_stays(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    store.record_verification(_keep(store), "failed", "settings", reason="cosine", summary="all of it")
    found = EngineStore(tmp_path).find("m", DIGEST)
    assert found is not None
    assert (found.sidecar.verified, found.sidecar.verified_by, found.sidecar.reason) == ("failed", "settings", "cosine")


def test_an_entry_under_another_name_is_not_found(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    other = key_digest({"model": "m2"})
    _keep(store).folder.rename(tmp_path / "m" / other)
    assert store.find("m", other) is None


def test_the_devices_key_is_for_its_owner_only(tmp_path: Path) -> None:
    _keep(EngineStore(tmp_path))
    file = tmp_path / KEY_FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_bytes()) == 32


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)

    def fail() -> None:
        with store.building("m", DIGEST) as staging:
            (staging / "half").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [child.name for child in (tmp_path / "m").iterdir()] == [f".{DIGEST}.lock"]


def test_building_again_replaces_what_was_kept(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    _keep(store)
    assert _keep(store, data=b"newer").model_file.read_bytes() == b"newer"
    assert len(store.entries()) == 1


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EngineStore(tmp_path)
    _keep(store)

    def full(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        _keep(store, data=b"newer")
    monkeypatch.undo()
    found = store.find("m", DIGEST)
    assert found is not None
    assert found.model_file.read_bytes() == b"engine"
    assert not list((tmp_path / "m").glob(".staging*"))


def test_pruning_removes_damage_and_the_least_recently_used(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    entries = [_keep(store, KEY | {"n": str(n)}, b"x" * 1000) for n in range(4)]
    for age, entry in enumerate(reversed(entries)):
        os.utime(entry.folder, (1000 - age, 1000 - age))
    (entries[2].folder / "model.onnx").write_bytes(b"altered")
    # sidecars differ by a byte or two: the digits of their times
    room = entries[0].nbytes + entries[3].nbytes
    removed = store.prune(room, keep=frozenset({entries[0].digest}))
    assert set(removed) == {entries[2].digest, entries[1].digest}
    assert {entry.digest for entry in store.entries()} == {entries[0].digest, entries[3].digest}


def test_pruning_leaves_a_build_alone_that_is_under_way_and_removes_an_abandoned_one(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    abandoned = tmp_path / "m" / f".staging-{key_digest({'other': 'x'})}-1"
    with store.building("m", DIGEST) as staging:
        abandoned.mkdir()
        store.prune(0)
        assert staging.exists()
    assert not abandoned.exists()


BUILDER = """
    import sys
    from pathlib import Path
    from appliance.building.store import EngineStore, key_digest, new_sidecar
    key = {"model": "m"}
    digest = key_digest(key)
    store = EngineStore(Path(sys.argv[1]))
    print("begin", flush=True)
    with store.building("m", digest) as staging:
        if store.find("m", digest) is not None:
            print("found", flush=True)
        else:
            (staging / "model.onnx").write_bytes(b"x")
            sys.stdin.readline()
            store.commit(staging, "m", digest, new_sidecar(key, "onnxruntime", "int8", "model.onnx", 1.0))
            print("built", flush=True)
"""


def test_of_two_builders_one_builds_and_the_other_finds(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(BUILDER), str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    first, second = start(), start()
    results = []
    for process in (first, second):
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
    for process in (first, second):
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in (first, second):
        output, _ = process.communicate(timeout=60)
        results.append(output.strip())
    assert sorted(results) == ["built", "found"]


DYING_BUILDER = """
    import os, sys
    from pathlib import Path
    left = int(sys.argv[2])
    def dying(call):
        def wrapped(*args, **kwargs):
            global left
            if left == 0:
                os._exit(1)
            left -= 1
            return call(*args, **kwargs)
        return wrapped
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    from appliance.building.store import EngineStore, key_digest, new_sidecar
    key = {"model": "m", "precision": "int8", "file model.onnx": "abc"}
    digest = key_digest(key)
    store = EngineStore(Path(sys.argv[1]))
    with store.building("m", digest) as staging:
        (staging / "model.onnx").write_bytes(b"newer")
        store.commit(staging, "m", digest, new_sidecar(key, "onnxruntime", "int8", "model.onnx", 1.0))
"""


@pytest.mark.parametrize("replacing", [False, True])
def test_a_power_cut_at_any_step_leaves_the_old_entry_or_the_new_one_or_none(tmp_path: Path, replacing: bool) -> None:
    """The process dies before its n-th call that changes the disk, for every n until it lives; what is found is whole."""
    code, found_data = textwrap.dedent(DYING_BUILDER), []
    for step in range(60):
        path = tmp_path / str(step)
        store = EngineStore(path)
        store._device_key()
        if replacing:
            _keep(store)
        died = subprocess.run([sys.executable, "-c", code, str(path), str(step)], timeout=60, check=False).returncode
        assert died in (0, 1)
        found = store.find("m", DIGEST)
        found_data.append(found.model_file.read_bytes() if found is not None else b"")
        assert _keep(store, data=b"after").model_file.read_bytes() == b"after"
        assert [entry.digest for entry in store.entries()] == [DIGEST]
        assert not list((path / "m").glob(".staging*"))
        if not died:
            break
    else:
        raise AssertionError("it never lived to the end")
    assert step > 6
    assert found_data[-1] == b"newer"
    assert set(found_data) <= {b"engine" if replacing else b"", b"", b"newer"}


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from appliance.building.store import EngineStore, StoreError, key_digest, new_sidecar
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    digest = key_digest({"model": "m"})
    store = EngineStore(Path(sys.argv[1]))
    try:
        with store.building("m", digest) as staging:
            (staging / "model.plan").write_bytes(bytes(1_000_000))
            store.commit(staging, "m", digest, new_sidecar({"model": "m"}, "tensorrt", "", "model.plan", 1.0))
    except StoreError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    """By the kernel's own refusal: a file size limit answers a write as a full disk does."""
    code = textwrap.dedent(FULL_DISK)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "the engines' folder cannot be written: File too large" in done.stdout
    left = {file.name for file in tmp_path.rglob("*") if file.is_file() and not file.name.endswith(".lock")}
    assert left <= {KEY_FILE}


def test_a_dropped_engine_is_not_found_and_dropping_twice_is_nothing(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    entry = _keep(store)
    store.drop("m", entry.digest)
    store.drop("m", entry.digest)
    store.drop("nobody", entry.digest)
    assert store.find("m", entry.digest) is None
    assert not list((tmp_path / "m").glob(".staging*"))
