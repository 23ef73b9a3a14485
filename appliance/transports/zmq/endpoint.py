"""Binds a socket to ipc and tcp endpoints without stealing one from somebody, and takes everything away again.

libzmq's ipc bind unlinks whatever lies at the path, another daemon's live socket included, so a lock file beside the endpoint
decides who may bind. The file mode comes from the umask at bind: 0660, owner and group may connect. It knows no protocol;
`transport` drives it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket as sockets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import zmq

SOCKET_UMASK = 0o117
DIRECTORY_MODE = 0o750
MAX_IPC_PATH_BYTES = 107
"""sockaddr_un.sun_path less its terminating zero."""


Listen: TypeAlias = Callable[[str], sockets.socket | None]
"""Gives a socket that listens at an endpoint, and goes on to do so after us; None: bind it yourself."""


def _no_listener(endpoint: str) -> sockets.socket | None:
    return None


class Endpoints:
    """The endpoints one transport has bound, and the locks that hold its ipc paths."""

    def __init__(self, listen: Listen = _no_listener) -> None:
        self._listen = listen
        self.addresses: list[str] = []
        self._paths: list[Path] = []
        self._locks: list[tuple[Path, int]] = []

    def bind(self, socket: zmq.Socket[bytes], endpoint: str) -> str:
        """Bind `endpoint` (ipc://PATH, a bare path, or tcp://HOST:PORT with port 0 or * for any) and return the real address.

        FileExistsError if another daemon holds the ipc path or something that is no socket lies there; OSError with errno
        and a sentence for everything else that keeps us from binding.
        """
        if "://" not in endpoint:
            endpoint = f"ipc://{endpoint}"
        if endpoint.startswith("ipc://"):
            self._bind_ipc(socket, Path(endpoint.removeprefix("ipc://")))
        else:
            self._bind(socket, endpoint)
        address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.addresses.append(address)
        return address

    def _bind_ipc(self, socket: zmq.Socket[bytes], path: Path) -> None:
        if not path.is_absolute():
            raise OSError(errno.EINVAL, "an ipc endpoint needs an absolute path", str(path))
        if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
            raise OSError(errno.ENAMETOOLONG, f"an ipc path may have {MAX_IPC_PATH_BYTES} bytes", str(path))
        path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        self._locks.append(_lock(path))
        if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "something that is no socket lies at the ipc endpoint", str(path))
        previous = os.umask(SOCKET_UMASK)
        try:
            lasting = self._bind(socket, f"ipc://{path}")
        finally:
            os.umask(previous)
        if not lasting:
            self._paths.append(path)

    def _bind(self, socket: zmq.Socket[bytes], endpoint: str) -> bool:
        """Whether the listener is one that outlives us: then its file stays."""
        listener = self._listen(endpoint)
        if listener is None:
            _bind(socket, endpoint)
            return False
        # libzmq owns the descriptor from now on; the option counts for every bind until it is taken back
        socket.setsockopt(zmq.USE_FD, listener.detach())
        try:
            _bind(socket, endpoint)
        finally:
            socket.setsockopt(zmq.USE_FD, -1)
        return True

    def remove(self) -> None:
        """Remove the ipc files, then the locks. The sockets must be closed already."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        for path, fd in self._locks:
            path.unlink(missing_ok=True)
            os.close(fd)
        self._paths.clear()
        self._locks.clear()
        self.addresses.clear()


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise OSError(error.errno, f"cannot bind {endpoint}: {error.strerror}") from error


def _lock(endpoint: Path) -> tuple[Path, int]:
    """An exclusive lock on `endpoint`'s lock file, held until its descriptor is closed. FileExistsError if another has it."""
    path = endpoint.with_name(endpoint.name + ".lock")
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the one before us may have removed the file between our open and our lock: then we hold a lock on nothing
            if _same_file(fd, path):
                return path, fd
        except BlockingIOError as error:
            os.close(fd)
            raise FileExistsError(
                errno.EEXIST, "another daemon serves this ipc endpoint; stop it, or set another path", str(endpoint)
            ) from error
        except OSError:
            os.close(fd)
            raise
        os.close(fd)


def _same_file(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
