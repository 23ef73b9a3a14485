"""Binding without stealing, permissions, and leaving nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
import zmq

from appliance.config import ZmqConfig
from appliance.transports.zmq import ZmqTransport
from appliance.transports.zmq.endpoint import Endpoints, _lock
from tests.fakes.service import FakeService
from tests.transports.zmq.conftest import House, Wire


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _is_socket(path: Path) -> bool:
    return stat.S_ISSOCK(path.stat().st_mode)


async def test_a_second_daemon_is_refused_and_the_first_goes_on(house: House, wire: Wire) -> None:
    second = ZmqTransport(FakeService(), ZmqConfig(), ipc=house.ipc, tcp=None, events_ipc=None, events_tcp=None)
    with pytest.raises(FileExistsError, match="another daemon"):
        await second.start()
    await second.close()
    assert (await wire.dealer(house.ipc).ask({"op": "ping"}))["ok"] is True


async def test_a_tcp_port_in_use_is_a_clear_error(house: House) -> None:
    second = ZmqTransport(FakeService(), ZmqConfig(), ipc=None, tcp=house.tcp, events_ipc=None, events_tcp=None)
    with pytest.raises(OSError, match=f"cannot bind {house.tcp}") as caught:
        await second.start()
    assert caught.value.errno == errno.EADDRINUSE


async def test_a_failed_start_leaves_nothing(tmp_path: Path, house: House) -> None:
    path = tmp_path / "other" / "infer.ipc"
    second = ZmqTransport(FakeService(), ZmqConfig(), ipc=str(path), tcp=house.tcp, events_ipc=None, events_tcp=None)
    with pytest.raises(OSError, match="cannot bind"):
        await second.start()
    assert list(path.parent.iterdir()) == []


async def test_ipc_files_are_for_owner_and_group_and_so_is_their_directory(house: House) -> None:
    path = Path(house.ipc.removeprefix("ipc://"))
    assert _mode(path) == 0o660
    assert _mode(path.parent) & 0o027 == 0
    before = os.umask(0)
    os.umask(before)
    assert before != 0o117


async def test_after_close_no_file_is_left_and_the_endpoints_can_be_bound_again(house: House) -> None:
    await house.transport.close()
    assert list((house.folder / "run").iterdir()) == []
    assert house.transport.endpoints == []
    await house.make().start()
    await house.transport.close()
    await house.transport.close()


async def test_what_a_killed_daemon_left_is_taken_over(house: House, wire: Wire) -> None:
    path = Path(house.ipc.removeprefix("ipc://"))
    await house.transport.close()
    path.with_name("infer.ipc.lock").touch()
    context = zmq.Context()
    dead = context.socket(zmq.ROUTER)
    dead.bind(f"ipc://{path}")  # libzmq leaves the file of a closed socket
    dead.close(0)
    context.term()
    assert _is_socket(path)
    await house.make().start()
    assert (await wire.dealer(house.ipc).ask({"op": "ping"}))["ok"] is True


def test_a_lock_file_removed_while_we_lock_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "infer.ipc.lock"
    flock, calls = fcntl.flock, []

    def flock_as_the_other_daemon_leaves(fd: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(fd)
        flock(fd, operation)

    monkeypatch.setattr("fcntl.flock", flock_as_the_other_daemon_leaves)
    held, fd = _lock(tmp_path / "infer.ipc")
    assert (held, len(calls)) == (path, 2)
    assert os.fstat(fd).st_ino == path.stat().st_ino
    os.close(fd)


@pytest.mark.parametrize("endpoint", ["relative/x.ipc", "/tmp/" + "x" * 110])
def test_an_ipc_path_that_cannot_work_is_refused(endpoint: str) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    endpoints = Endpoints()
    with pytest.raises(OSError, match="ipc"):
        endpoints.bind(socket, endpoint)
    endpoints.remove()
    context.destroy(linger=0)


def test_a_file_that_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("keep me")
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    endpoints = Endpoints()
    with pytest.raises(FileExistsError, match="no socket"):
        endpoints.bind(socket, str(precious))
    endpoints.remove()
    context.destroy(linger=0)
    assert precious.read_text() == "keep me"
