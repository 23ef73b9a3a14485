"""Listening sockets that outlive this process: taken from systemd where it passes them, else made and given into its keeping.

A socket is known by its address alone: a socket unit and the descriptor store pass theirs in any order and under any name. What
speaks on a socket is not known here; `daemon` asks for one per endpoint, and no other process of the appliance sees any of them.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import string
from pathlib import Path
from typing import TypeAlias

from appliance.host import systemd

BACKLOG = 512
"""Clients that may wait while the appliance restarts; net.core.somaxconn may allow fewer."""

SOCKET_UMASK = 0o117
"""Owner and group may connect to a unix socket."""

STORED = "appliance-"
"""What the names of descriptors begin with that we gave to systemd ourselves."""

NAME_LETTERS = frozenset(string.ascii_letters + string.digits + ".-_")

_TCP = re.compile(r"tcp://(?:(?P<v4>[0-9.]+)|\[(?P<v6>[0-9A-Fa-f:.]+)\]|\*):(?P<port>[0-9]{1,5})")

Address: TypeAlias = tuple[str, int] | str


class Listeners:
    """The listening sockets of one life. `inherited` are those of the life before, or of a socket unit: (name, socket)."""

    def __init__(self, inherited: list[tuple[str, socket.socket]], *, keep: bool) -> None:
        self.inherited = bool(inherited)
        self._keep = keep
        self._waiting = {address_of(given): (name, given) for name, given in inherited}
        self._doubles = [given for _, given in inherited if self._waiting[address_of(given)][1] is not given]

    @classmethod
    def from_environment(cls) -> Listeners:
        """Those that systemd passed; new ones are given to it if it is there."""
        found = []
        for name, descriptor in systemd.take_descriptors():
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                continue
            given = socket.socket(fileno=descriptor)
            if given.type != socket.SOCK_STREAM or not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                given.close()
                continue
            given.setblocking(False)
            found.append((name, given))
        return cls(found, keep=systemd.supervised())

    @property
    def survive(self) -> bool:
        """Whether the listeners outlive us: clients that come while we are gone wait."""
        return self._keep or self.inherited

    def tcp(self, host: str, port: int) -> list[socket.socket]:
        """Listeners for every address of a host; OSError if one is taken. Port 0 is any free one, and is not kept."""
        found = []
        try:
            for family, kind, protocol, _, address in dict.fromkeys(
                socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            ):
                wanted = (str(address[0]), int(address[1]))
                listener = self._take(wanted)
                if listener is None:
                    listener = _listen_tcp(family, kind, protocol, address)
                    self._give(listener, stored=port != 0)
                found.append(listener)
        except OSError as error:
            for listener in found:
                listener.close()
            raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
        return found

    def unix(self, path: str) -> socket.socket:
        """A listener at a path. One whose file was removed meanwhile is of no use to anybody, and is replaced.

        The caller has made sure that nobody else listens there.
        """
        listener = self._take(path)
        if listener is not None:
            if _is_socket(path):
                return listener
            listener.close()
            systemd.unstore(stored_name(path))
        Path(path).parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        if _is_socket(path):
            Path(path).unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(SOCKET_UMASK)
        try:
            listener.bind(path)
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        self._give(listener, stored=True)
        return listener

    def for_endpoint(self, endpoint: str) -> socket.socket | None:
        """The listener of a ZeroMQ endpoint (ipc://PATH or tcp://ADDRESS:PORT); None: the library is to bind it itself.

        That is so for any free port, and for a host or an interface named in words: ZeroMQ resolves those in its own way.
        """
        if endpoint.startswith("ipc://"):
            return self.unix(endpoint.removeprefix("ipc://"))
        match = _TCP.fullmatch(endpoint)
        if match is None or int(match["port"]) == 0:
            return None
        host = match["v4"] or match["v6"] or "0.0.0.0"  # noqa: S104  what the endpoint says
        return self.tcp(host, int(match["port"]))[0]

    def holds(self, address: Address) -> bool:
        """Whether a socket with that address was passed, and has not been taken yet."""
        return address in self._waiting

    def left_over(self) -> list[str]:
        """Let go of what nobody asked for; the addresses of those that a socket unit goes on listening on, in vain."""
        vain = []
        for address, (name, given) in self._waiting.items():
            if name.startswith(STORED):
                systemd.unstore(name)
            else:
                vain.append(address if isinstance(address, str) else f"{address[0]}:{address[1]}")
            given.close()
        for given in self._doubles:
            given.close()
        self._waiting.clear()
        self._doubles.clear()
        return vain

    def _take(self, address: Address) -> socket.socket | None:
        found = self._waiting.pop(address, None)
        return found[1] if found is not None else None

    def _give(self, listener: socket.socket, *, stored: bool) -> None:
        if self._keep and stored:
            systemd.store(stored_name(address_of(listener)), listener.fileno())


def address_of(listener: socket.socket) -> Address:
    """(host, port), or the path of a unix socket."""
    name = listener.getsockname()
    return name if isinstance(name, str) else (str(name[0]), int(name[1]))


def stored_name(address: Address) -> str:
    """A name for the descriptor store: ASCII, no colon, at most 255 characters (sd_notify(3))."""
    text = address if isinstance(address, str) else f"{address[0]}-{address[1]}"
    return (STORED + "".join(letter if letter in NAME_LETTERS else "_" for letter in text))[:255]


def _listen_tcp(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
