"""What a process gives up, tried in a child; and that less is given up, and said, where the kernel offers less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.host import landlock, sandbox
from appliance.host.sandbox import Sandbox

NEEDS_LANDLOCK = pytest.mark.skipif(landlock.release() < landlock.OLDEST, reason="this kernel's Landlock is too old")

TRY = """
import errno, os, sys
from pathlib import Path
from appliance.host.sandbox import Sandbox
writable, other, hidden = map(Path, sys.argv[1:4])
chosen = Sandbox.of_this_kernel()
if sys.argv[4:]:
    chosen = Sandbox(int(sys.argv[4]), False, chosen.hidden)
chosen.enter(*[writable] if writable.name else [])
def outcome(name, attempt):
    try:
        attempt()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    else:
        print(name, "ok")
outcome("write", lambda: (writable / "new").write_text("x"))
outcome("truncate", lambda: os.truncate(writable / "new", 0))
outcome("folder", lambda: (writable / "folder").mkdir())
outcome("rename", lambda: (writable / "new").rename(writable / "folder/new"))
outcome("remove", lambda: (writable / "folder/new").unlink())
outcome("write elsewhere", lambda: (other / "new").write_text("x"))
outcome("append elsewhere", lambda: open(other / "file", "a"))
outcome("truncate elsewhere", lambda: os.truncate(other / "file", 0))
outcome("remove elsewhere", lambda: (other / "file").unlink())
outcome("rename elsewhere", lambda: (other / "file").rename(other / "name"))
outcome("folder elsewhere", lambda: (other / "folder").mkdir())
outcome("read elsewhere", lambda: (other / "file").read_text())
outcome("list elsewhere", lambda: os.listdir(other))
outcome("read hidden", lambda: (hidden / "secret").read_text())
outcome("list hidden", lambda: os.listdir(hidden))
outcome("null", lambda: Path("/dev/null").write_text("x"))
outcome("own name", lambda: Path("/proc/self/task", str(os.getpid()), "comm").write_text("x"))
outcome("other's name", lambda: open(f"/proc/{os.getppid()}/comm", "w"))
outcome("signal", lambda: os.kill(os.getppid(), 0))
import resource, tempfile
print("core", resource.getrlimit(resource.RLIMIT_CORE))
outcome("temporary", lambda: tempfile.TemporaryFile())
outcome("memory", lambda: os.ftruncate(os.memfd_create("x"), 4096))
"""
OK = {
    "write",
    "truncate",
    "folder",
    "rename",
    "remove",
    "read elsewhere",
    "list elsewhere",
    "null",
    "own name",
    "temporary",
    "memory",
}


def _tried(tmp_path: Path, *arguments: str) -> dict[str, str]:
    for name in ("writable", "other", "hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/file").write_text("x")
    (tmp_path / "hidden/secret").write_text("x")
    folders = [str(tmp_path / name) for name in ("writable", "other", "hidden")]
    environment = {**os.environ, "CREDENTIALS_DIRECTORY": folders[2], "TMPDIR": folders[0]}
    environment.pop("CONFIGURATION_DIRECTORY", None)
    done = subprocess.run(
        [sys.executable, "-c", TRY, *folders, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if not line.startswith("core"))
    assert "core (0, 0)" in done.stdout
    return found


@NEEDS_LANDLOCK
@pytest.mark.skipif(landlock.release() < landlock.WITH_SCOPES, reason="this kernel leaves signals alone")
def test_only_its_own_folders_can_be_written_and_secrets_not_even_read(tmp_path: Path) -> None:
    found = _tried(tmp_path)
    assert {name for name, outcome in found.items() if outcome == "ok"} == OK
    assert set(found.values()) <= {"ok", "EACCES", "EPERM"}
    assert found["signal"] == "EPERM"


@NEEDS_LANDLOCK
@pytest.mark.parametrize("release", [2, 3, 4])
def test_older_releases_of_landlock_do_the_same_for_files_as_far_as_they_know_them(
    tmp_path: Path, release: int
) -> None:
    found = _tried(tmp_path, str(release))
    beyond = {"signal"} | ({"truncate elsewhere"} if release < landlock.WITH_TRUNCATE else set())
    assert {name for name, outcome in found.items() if outcome == "ok"} == OK | beyond


def test_a_kernel_without_landlock_gives_up_nothing_of_files_and_says_so(tmp_path: Path) -> None:
    found = _tried(tmp_path, "0")
    assert found["write elsewhere"] == "ok"
    assert "no Landlock" in Sandbox(0, seccomp=True).limits[0]


@pytest.mark.parametrize(
    ("sandbox", "said", "description"),
    [
        (Sandbox(7, seccomp=True), [], "Landlock 7 and seccomp"),
        (Sandbox(2, seccomp=True), ["signals"], "Landlock 2 and seccomp"),
        (Sandbox(0, seccomp=True), ["files"], "seccomp"),
        (Sandbox(6, seccomp=False), ["network"], "Landlock 6"),
        (Sandbox(0, seccomp=False), ["files", "network"], "none"),
    ],
)
def test_what_is_missing_is_said_in_words(sandbox: Sandbox, said: list[str], description: str) -> None:
    assert [next(word for word in said if word in limit) for limit in sandbox.limits] == said
    assert sandbox.description == description


def test_a_landlock_that_forbids_renames_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "release", lambda: 1)
    assert Sandbox.of_this_kernel().landlock == 0


def test_all_but_what_is_hidden_is_allowed(tmp_path: Path) -> None:
    for name in ("a/secret", "a/open", "b", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/secret")
    found = set(landlock.all_but([tmp_path / "a/secret", tmp_path / "c", tmp_path / "missing"]))
    assert {tmp_path / "a/open", tmp_path / "b"} <= found
    assert Path("/usr") in found
    assert found.isdisjoint(
        {tmp_path, tmp_path / "a", tmp_path / "a/secret", tmp_path / "c", tmp_path / "link", Path("/")}
    )
    assert landlock.all_but([tmp_path / "missing"]) == [Path("/")]


def test_what_lies_in_something_hidden_is_hidden_with_it(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    found = landlock.all_but([tmp_path / "a", tmp_path / "a/b/c"])
    assert not [path for path in found if path.is_relative_to(tmp_path / "a")]


def test_missing_nodes_of_a_gpu_are_made_by_its_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-modprobe"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sandbox.make_nodes(tmp_path / "no-driver", tmp_path / "node")
    assert not (tmp_path / "asked").exists()
    sandbox.make_nodes(tmp_path, tmp_path / "node")
    assert (tmp_path / "asked").read_text() == "-c 0 -u\n"


def test_where_a_driver_is_loaded_its_caches_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_CACHE_PATH", raising=False)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    assert sandbox.driver_folders(tmp_path / "no-driver") == ()
    assert sandbox.driver_folders(tmp_path) == [Path(sandbox.MPS), tmp_path / "home/.nv/ComputeCache"]
    assert (tmp_path / "home/.nv/ComputeCache").is_dir()
    monkeypatch.setenv("CUDA_CACHE_PATH", str(tmp_path / "cuda"))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
    assert sandbox.driver_folders(tmp_path) == [tmp_path / "mps", tmp_path / "cuda"]
    monkeypatch.delenv("CUDA_CACHE_PATH")
    monkeypatch.delenv("HOME")
    assert sandbox.driver_folders(tmp_path) == [tmp_path / "mps"], "a user without a home has no cache"
