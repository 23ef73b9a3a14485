"""kill -9 and power cuts at any moment: the file opens, is sound, and has what was said to be on the disk."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.recording.reader import RecordReader
from appliance.recording.recorder import Recorder

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH: what is not on the disk yet never comes there, as when the power goes."""
MNT_DETACH = 2
LIBC = ctypes.CDLL(None, use_errno=True)


def record(path: Path, begin: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.recording.recording_process", str(path), str(begin)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process


def sound(path: Path) -> int:
    """The newest number in a file that must be whole."""
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
    events = RecordReader(path).events(kind="e", limit=1)
    return int(events[0]["fields"]["n"]) if events else 0


def killed_again_and_again(path: Path, times: int) -> None:
    chance, last = random.Random(3), 0
    for _ in range(times):
        process = record(path, last)
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 60)):
            last = int(process.stdout.readline())
        process.kill()
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        last = int(rest[-1]) if rest else last
        found = sound(path)
        assert found >= last, "what was said to be on the disk is there"
        last = found
    assert not list(path.parent.glob("*.damaged-*"))


def test_a_recorder_that_is_killed_leaves_a_sound_file(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path / "r.sqlite3", 4)


@pytest.mark.slow
def test_a_recorder_that_is_killed_three_hundred_times_leaves_a_sound_file(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path / "r.sqlite3", 300)


class Disk:
    """An ext4 on a loop device, whose power can be cut."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.image, self.at = folder / "disk", folder / "at"
        self.at.mkdir()
        with self.image.open("wb") as file:
            file.truncate(mebibytes << 20)
        _run("mkfs.ext4", "-q", str(self.image))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.at))

    def unmount(self) -> None:
        _run("umount", str(self.at))

    def cut_power(self) -> None:
        descriptor = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, sys.byteorder))
        finally:
            os.close(descriptor)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    for program in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    try:
        made = Disk(tmp_path, request.param)
    except OSError as error:
        pytest.skip(f"a loop device cannot be mounted here: {error}")
    yield made
    LIBC.umount2(str(made.at).encode(), MNT_DETACH)


def cut_again_and_again(disk: Disk, times: int) -> int:
    """How many acknowledged commits were lost at most by one cut; each stands for a second."""
    chance, last, worst = random.Random(5), 0, 0
    path = disk.at / "r.sqlite3"
    for _ in range(times):
        process = record(path, last)
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 40)):
            last = int(process.stdout.readline())
        disk.cut_power()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        last = int(rest[-1]) if rest else last
        disk.unmount()
        disk.mount()
        found = sound(path)
        worst = max(worst, last - found)
        assert worst <= 2, "a commit is a second: at most two are lost"
        last = found
    assert not list(disk.at.glob("*.damaged-*"))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("disk", [64], indirect=True)
def test_three_hundred_power_cuts_corrupt_nothing(disk: Disk) -> None:
    assert cut_again_and_again(disk, 300) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("disk", [16], indirect=True)
def test_a_full_disk_drops_the_oldest_and_recording_goes_on(disk: Disk) -> None:
    path = disk.at / "r.sqlite3"
    recorder = Recorder(path, max_bytes=64 << 20)
    recorder.start()
    for number in range(3_000):
        recorder.record_event("e", "info", {"n": number, "pad": "x" * 900})
    assert recorder.flush()
    free = shutil.disk_usage(disk.at).free
    descriptor = os.open(disk.at / "others", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, free - (64 << 10))
    os.close(descriptor)
    for number in range(3_000, 6_000):
        recorder.record_event("e", "info", {"n": number, "pad": "x" * 900})
    assert recorder.flush(30.0), recorder.state
    state = recorder.state
    recorder.close()
    assert state.pruned > 0, "the oldest made room"
    assert state.dropped == 0
    newest = RecordReader(path).events(kind="e", limit=1)[0]["fields"]["n"]
    assert newest == 5_999
    assert sound(path) == 5_999
