"""One connection to one endpoint: a DEALER, and a monitor that tells when it is lost.

A single DEALER connected to several endpoints would deal requests out in turn, also to those that are slow or gone, so each
endpoint has its own. With IMMEDIATE a request never waits in a queue for a daemon that is not there. Both clients use it; it
knows frames and replies, no retry rule. One thread at a time.
"""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from appliance.core.errors import ApplianceError
from appliance.core.tensor import Buffer
from appliance.protocols.zmq_wire import Reply, decode_reply

RECONNECT_MS = 100
RECONNECT_MAX_MS = 2000
HEARTBEAT_MS = 5000
"""ZMTP heartbeats find a dead host behind a live socket; a hung daemon is found by the call's own timeout."""
COPY_BELOW_BYTES = 8192
"""libzmq gives smaller frames as slices of a shared buffer, at any alignment."""

_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


class Link:
    """A DEALER connected to `endpoint`. `losses` counts how often the connection ended."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.endpoint = endpoint
        self.losses = 0
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self.monitor, zmq.POLLIN)

    def writable(self) -> bool:
        """Whether a request could be sent now."""
        return bool(int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)

    def wait(self, milliseconds: int) -> bool:
        """Block until a reply comes or the connection ends; False if neither did in that time."""
        return bool(self._poller.poll(milliseconds))

    def send(self, frames: list[Buffer]) -> bool:
        """Send a request; False if there is no connection, or it is full."""
        try:
            self.socket.send(frames[0], _MORE)
        except zmq.Again:
            return False
        # libzmq checks for room once per message, at its first frame
        for frame in frames[1:-1]:
            self.socket.send(frame, _MORE)
        self.socket.send(frames[-1], _NOBLOCK)
        return True

    def receive(self) -> Reply | None:
        """The next reply, or None. What is no AIP1 reply is skipped."""
        while True:
            try:
                part = self.socket.recv(_NOBLOCK, False)
            except zmq.Again:
                return None
            frames: list[Buffer] = [_buffer(part)]
            while part.more:
                part = self.socket.recv(_NOBLOCK, False)
                frames.append(_buffer(part))
            try:
                return decode_reply(frames)
            except ApplianceError:
                continue

    def observe(self) -> None:
        """Take note of what the monitor has seen.

        libzmq tells of a loss before it takes the dead connection's queue away, and what is written into that is gone without a
        word. A new connection comes RECONNECT_MS later at the earliest: if one seems to be there before, it is the dead one.
        """
        losses = self.losses
        while int(self.monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            recv_monitor_message(self.monitor, zmq.NOBLOCK)
            self.losses += 1
        if self.losses != losses:
            until = time.monotonic() + RECONNECT_MS / 2000
            while self.writable() and time.monotonic() < until:
                time.sleep(0.0002)

    def close(self) -> None:
        """End the connection; unsent requests are dropped."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()


def _buffer(part: zmq.Frame) -> Buffer:
    return bytearray(part.buffer) if len(part) < COPY_BELOW_BYTES else part.buffer
