"""Sockets that outlive a process: taken by their address, given into keeping, let go of when nobody wants them."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.host import listeners, systemd
from appliance.host.listeners import Listeners, address_of, stored_name


class Keeper:
    """What systemd would be told to keep and to drop."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self.dropped: list[str] = []

    def store(self, name: str, descriptor: int) -> None:
        assert stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        self.kept[name] = descriptor

    def unstore(self, name: str) -> None:
        self.dropped.append(name)


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Keeper:
    made = Keeper()
    monkeypatch.setattr(systemd, "store", made.store)
    monkeypatch.setattr(systemd, "unstore", made.unstore)
    return made


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a unix socket's has 107 characters."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def listening(host: str = "127.0.0.1") -> socket.socket:
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def test_an_inherited_listener_is_taken_by_its_address_whatever_its_name(keeper: Keeper) -> None:
    given_ = listening()
    port = given_.getsockname()[1]
    made = Listeners([("anything", given_)], keep=True)
    assert made.holds(("127.0.0.1", port))
    (taken,) = made.tcp("127.0.0.1", port)
    assert taken is given_
    assert not made.holds(("127.0.0.1", port))
    assert keeper.kept == {}
    assert made.left_over() == []
    taken.close()


def test_a_new_listener_is_given_into_keeping_and_accepts(keeper: Keeper) -> None:
    with listening() as free:
        port = free.getsockname()[1]
    (made,) = Listeners([], keep=True).tcp("127.0.0.1", port)
    assert keeper.kept == {f"appliance-127.0.0.1-{port}": made.fileno()}
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    made.close()


def test_a_free_port_is_kept_by_nobody_and_neither_is_one_without_a_manager(keeper: Keeper, folder: Path) -> None:
    (free,) = Listeners([], keep=True).tcp("127.0.0.1", 0)
    alone = Listeners([], keep=False)
    unix = alone.unix(str(folder / "a.sock"))
    assert keeper.kept == {}
    assert not alone.survive
    for one in (free, unix):
        one.close()


def test_a_port_that_is_taken_is_said_with_its_address() -> None:
    with listening() as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            Listeners([], keep=False).tcp("127.0.0.1", port)


def test_a_unix_socket_lets_owner_and_group_in_and_nobody_else(keeper: Keeper, folder: Path) -> None:
    path = folder / "new/a.sock"
    made = Listeners([], keep=True).unix(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    assert list(keeper.kept) == [stored_name(str(path))]
    made.close()


def test_an_inherited_unix_socket_is_taken_while_its_file_is_there(keeper: Keeper, folder: Path) -> None:
    path = str(folder / "a.sock")
    first = Listeners([], keep=False).unix(path)
    second = Listeners([("x", first)], keep=True).unix(path)
    assert second is first
    Path(path).unlink()
    third = Listeners([("x", second)], keep=True).unix(path)
    assert third is not second
    assert second.fileno() == -1, "closed: nobody can reach it any more"
    assert keeper.dropped == [stored_name(path)]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    third.close()


def test_a_file_that_a_dead_process_left_is_replaced_but_not_one_that_is_no_socket(folder: Path) -> None:
    path = folder / "a.sock"
    Listeners([], keep=False).unix(str(path)).close()
    Listeners([], keep=False).unix(str(path)).close()
    path.unlink()
    path.write_text("somebody's work")
    with pytest.raises(OSError, match="in use"):
        Listeners([], keep=False).unix(str(path))
    assert path.read_text() == "somebody's work"


def test_what_nobody_asked_for_is_dropped_if_it_was_ours_and_reported_if_a_socket_unit_has_it(
    keeper: Keeper, folder: Path
) -> None:
    ours, units = listening(), listening()
    unix = Listeners([], keep=False).unix(str(folder / "a.sock"))
    made = Listeners([("appliance-old", ours), ("appliance.socket", units), ("appliance.socket", unix)], keep=True)
    port = units.getsockname()[1]
    assert made.left_over() == [f"127.0.0.1:{port}", str(folder / "a.sock")]
    assert keeper.dropped == ["appliance-old"]
    assert {one.fileno() for one in (ours, units, unix)} == {-1}
    assert made.left_over() == []


def test_the_same_address_twice_is_one_listener_and_the_other_is_closed() -> None:
    first = listening()
    second = socket.socket(fileno=os.dup(first.fileno()))
    made = Listeners([("stored", first), ("unit", second)], keep=True)
    (taken,) = made.tcp(*first.getsockname())
    made.left_over()
    assert (first.fileno() == -1) != (second.fileno() == -1)
    assert taken.fileno() != -1
    taken.close()


@pytest.mark.parametrize(
    "endpoint", ["tcp://*:0", "tcp://eth0:5570", "tcp://localhost:5570", "inproc://x", "tcp://1.2.3.4", "tcp://[::1]"]
)
def test_endpoints_that_only_the_library_understands_are_left_to_it(endpoint: str) -> None:
    assert Listeners([], keep=False).for_endpoint(endpoint) is None


def test_endpoints_with_an_address_are_ours(folder: Path) -> None:
    # both at once, or the second might get the first one's
    with listening() as free, listening() as other:
        port, another = free.getsockname()[1], other.getsockname()[1]
    made = Listeners([], keep=False)
    for endpoint, address in (
        (f"tcp://127.0.0.1:{port}", ("127.0.0.1", port)),
        (f"tcp://*:{another}", None),
        (f"ipc://{folder}/a.ipc", f"{folder}/a.ipc"),
    ):
        found = made.for_endpoint(endpoint)
        assert found is not None
        assert address in (None, address_of(found))
        found.close()


def test_only_listening_stream_sockets_of_the_environment_are_taken(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    one, other = socket.socketpair()
    with listening() as good, one, other, (folder / "file").open("w") as file:
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        given_ = [("a", os.dup(good.fileno())), ("b", os.dup(one.fileno()))]
        given_ += [("c", os.dup(datagram.fileno())), ("d", os.dup(file.fileno()))]
        datagram.close()
        monkeypatch.setattr(systemd, "take_descriptors", lambda: given_)
        monkeypatch.setattr(systemd, "supervised", lambda: False)
        made = Listeners.from_environment()
        assert made.inherited
        assert made.survive, "a socket unit's, though nobody keeps ours"
        assert made.left_over() == ["{}:{}".format(*good.getsockname())]
        for _, descriptor in given_:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


@given(st.one_of(st.text(min_size=1), st.tuples(st.text(min_size=1), st.integers(0, 65535))))
def test_the_name_for_the_store_is_one_that_systemd_takes(address: tuple[str, int] | str) -> None:
    name = stored_name(address)
    assert name.startswith(listeners.STORED)
    assert len(name) <= 255
    assert name.isascii()
    assert ":" not in name
    assert not any(letter.isspace() or ord(letter) < 32 for letter in name)
