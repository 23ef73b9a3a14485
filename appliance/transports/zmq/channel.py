"""The ROUTER socket on the event loop: whole messages in, whole messages out, never blocking on a peer.

It knows peers by routing id and nothing of what their messages say; `dispatcher` does. Rules it keeps, all of them measured:
libzmq's descriptor is edge-triggered, and any send may swallow the edge, so each send is followed by one look at EVENTS;
the socket is always drained, because its high-water mark is no admission control; a peer that does not read gets a bounded
outbox.
Routing ids are secrets (whoever knows one can disturb its owner): they appear in no log, event or error.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from appliance.core.tensor import Buffer
from appliance.transports.zmq.counters import Counters

log = logging.getLogger(__name__)

BURST_MESSAGES = 32
"""Messages taken before the loop's other work gets its turn."""
COPY_BELOW_BYTES = 8192
"""libzmq hands out smaller frames as slices of its 8 KiB read buffer: copying them frees that buffer and aligns them."""
ZERO_COPY_BYTES = 1 << 20
"""Larger frames are sent without a copy; below, the bookkeeping costs as much as the copy (no difference at 1.2 MB)."""
RETRY_S = 0.02
"""How often a full peer is tried again; its becoming writable usually wakes us sooner."""
WARN_INTERVAL_S = 1.0
MESSAGE_OVERHEAD_BYTES = 1024
"""What a waiting reply costs beside its frames; without it a peer could make us keep half a million tiny ones."""
FULL_OUTBOXES = 4
"""All outboxes together may hold as much as so many full ones; then the largest gives up its oldest reply."""

_NOBLOCK = int(zmq.NOBLOCK)  # plain integers: pyzmq spends half a microsecond per send on its flag enums
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)

_SENT, _FULL, _GONE = range(3)


class Receiver(Protocol):
    """Who takes the messages."""

    def message(self, frames: list[Buffer], *, cut: bool) -> None:
        """One message, routing id first. `cut`: it had more frames or bytes than allowed, and the rest is not here."""

    def peer_gone(self, routing_id: bytes) -> None:
        """That peer is not connected any more."""


class _Outbox:
    __slots__ = ("messages", "nbytes", "warn_at")

    def __init__(self) -> None:
        self.messages: deque[tuple[list[Buffer], int]] = deque()
        self.nbytes = 0
        self.warn_at = 0.0


class RouterChannel:
    """Drains and feeds one ROUTER socket that the caller has bound and will close."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        receiver: Receiver,
        counters: Counters,
        *,
        max_frames: int,
        max_message_bytes: int,
        outbox_bytes: int,
        report: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._socket = socket
        # the wrapper's own method looks at options of draft sockets first: a third of a frame's cost
        self._send: Callable[..., object] = super(zmq.Socket, socket).send
        self._receiver = receiver
        self._counters = counters
        self._max_frames = max_frames
        self._max_message_bytes = max_message_bytes
        self._outbox_bytes = outbox_bytes
        self._report = report
        self._outgoing: list[list[Buffer]] = []
        self._outboxes: dict[bytes, _Outbox] = {}
        self._waiting_bytes = 0
        self._armed = False
        self._unfinished = False
        self._retry: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._paused = False

    def start(self) -> None:
        """Watch the socket on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._rearm()

    def stop(self) -> None:
        """Let go of the loop and drop what is in the outboxes."""
        if self._loop is None:
            return
        self._loop.remove_reader(self._fd)
        self._send_outgoing()
        if self._retry is not None:
            self._retry.cancel()
        self._outboxes.clear()
        self._waiting_bytes = 0
        self._loop = None

    def pause(self) -> None:
        """Take no more messages; what is to be sent still goes."""
        self._paused = True

    @property
    def quiet(self) -> bool:
        """Nothing waits to be read or sent."""
        return self.idle and not int(self._socket.getsockopt(_EVENTS)) & _POLLIN

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent."""
        return not self._outboxes and not self._outgoing

    def send(self, frames: list[Buffer]) -> None:
        """Send a message, routing id first, on the loop's next turn. To a peer that has gone it is dropped.

        The answers of one batch come together; sent in one go they cost libzmq's thread one wake-up and one write, not one each.
        """
        if self._loop is not None:
            self._outgoing.append(frames)
            self._rearm()

    def _send_outgoing(self) -> None:
        """Send, or put into their peers' outboxes, the messages that came since the loop's last turn."""
        outgoing, self._outgoing = self._outgoing, []
        for frames in outgoing:
            try:
                if bytes(frames[0]) in self._outboxes or self._try_send(frames) == _FULL:
                    self._put(bytes(frames[0]), frames)
            except Exception:
                self._counters.handler_faults += 1
                log.exception("zmq.send_failed")

    def _rearm(self) -> None:
        if not self._armed and self._loop is not None:
            self._armed = True
            self._loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        self._armed = False
        if self._loop is None:
            return
        if self._outgoing:
            self._send_outgoing()
        if int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
            self._drain()
        elif self._unfinished:
            self._flush()

    def _drain(self) -> None:
        for _ in range(0 if self._paused else BURST_MESSAGES):
            try:
                if not self._receive():
                    break
            except Exception:
                # one message must not stop the socket; what failed is a fault of ours, and it is in the log
                self._counters.handler_faults += 1
                log.exception("zmq.message_failed")
        else:
            if not self._paused:
                self._rearm()
        if self._outboxes:
            self._flush()

    def _receive(self) -> bool:
        """Take one message and hand it on; False if there is none."""
        receive = self._socket.recv
        try:
            part = receive(_NOBLOCK, False)
        except zmq.Again:
            return False
        frames: list[Buffer] = [part.bytes]
        total = 0
        cut = False
        while part.more:
            part = receive(_NOBLOCK, False)
            size = len(part)
            total += size
            if len(frames) >= self._max_frames or total > self._max_message_bytes:
                cut = True  # keep receiving, so that the next message starts at its start, and keep nothing
            else:
                frames.append(part.bytes if size < COPY_BELOW_BYTES else part.buffer)
        self._counters.messages_received += 1
        self._receiver.message(frames, cut=cut)
        return True

    def _try_send(self, frames: list[Buffer]) -> int:
        send = self._send
        try:
            send(frames[0], _MORE)
        except zmq.Again:
            return _FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._gone(bytes(frames[0]))
            return _GONE
        # past the routing id nothing returns EAGAIN: libzmq checks the peer's high-water mark once per message
        try:
            for frame in frames[1:-1]:
                send(frame, _MORE, len(frame) < ZERO_COPY_BYTES)
        except BaseException:
            send(b"", _NOBLOCK)  # end the half message, or the next one would be taken for its continuation
            raise
        send(frames[-1], _NOBLOCK, len(frames[-1]) < ZERO_COPY_BYTES)
        self._counters.replies_sent += 1
        return _SENT

    def _gone(self, routing_id: bytes) -> None:
        self._counters.peers_gone += 1
        box = self._outboxes.pop(routing_id, None)
        if box is not None:
            self._waiting_bytes -= box.nbytes
        if self._loop is not None:
            # later, not now: we may be inside the service's callback, and the receiver will cancel requests there
            self._loop.call_soon(self._receiver.peer_gone, routing_id)

    def _put(self, routing_id: bytes, frames: list[Buffer]) -> None:
        box = self._outboxes.get(routing_id)
        if box is None:
            box = self._outboxes[routing_id] = _Outbox()
        nbytes = MESSAGE_OVERHEAD_BYTES + sum([len(frame) for frame in frames])
        box.messages.append((frames, nbytes))
        box.nbytes += nbytes
        self._waiting_bytes += nbytes
        self._counters.replies_delayed += 1
        if box.nbytes > self._outbox_bytes:
            self._shorten(routing_id, box, self._outbox_bytes)
        limit = FULL_OUTBOXES * self._outbox_bytes
        while self._waiting_bytes > limit:
            largest = max(self._outboxes, key=lambda item: self._outboxes[item].nbytes)
            other = self._outboxes[largest]
            self._shorten(largest, other, other.nbytes - (self._waiting_bytes - limit))
        self._arm_retry()

    def _shorten(self, routing_id: bytes, box: _Outbox, limit: int) -> None:
        """Drop the oldest replies until the box holds `limit` bytes."""
        dropped = 0
        while box.messages and box.nbytes > limit:
            self._take(box)
            dropped += 1
        if not box.messages:
            del self._outboxes[routing_id]
        self._dropped(box, dropped)

    def _take(self, box: _Outbox) -> None:
        nbytes = box.messages.popleft()[1]
        box.nbytes -= nbytes
        self._waiting_bytes -= nbytes

    def _dropped(self, box: _Outbox, count: int) -> None:
        self._counters.replies_dropped += count
        assert self._loop is not None
        now = self._loop.time()
        if now >= box.warn_at:
            box.warn_at = now + WARN_INTERVAL_S
            fields = {
                "reason": "peer does not read",
                "dropped": count,
                "dropped_in_all": self._counters.replies_dropped,
            }
            log.warning("zmq.reply_dropped", extra={"fields": fields})
            self._report("zmq.reply_dropped", fields)

    def _arm_retry(self) -> None:
        if self._retry is None and self._outboxes and self._loop is not None:
            self._retry = self._loop.call_later(RETRY_S, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        self._flush()

    def _flush(self) -> None:
        """Send what fits. Not more than a burst for each peer: the others are waiting for the loop."""
        self._unfinished = False
        for routing_id, box in list(self._outboxes.items()):
            for _ in range(BURST_MESSAGES):
                if self._try_send(box.messages[0][0]) != _SENT:
                    break
                self._take(box)
                if not box.messages:
                    del self._outboxes[routing_id]
                    break
            else:
                self._unfinished = True
        self._rearm()
        self._arm_retry()
