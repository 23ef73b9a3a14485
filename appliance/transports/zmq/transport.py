"""The ZeroMQ face: its sockets with every limit set before bind, and the order of starting, draining and closing.

It knows the parts in this folder and makes them; what they do is theirs. `daemon` drives it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from appliance.config import ZmqConfig
from appliance.protocols.zmq_wire import MAX_ENVELOPE_FRAMES
from appliance.transports.zmq.channel import RouterChannel
from appliance.transports.zmq.counters import Counters
from appliance.transports.zmq.dispatcher import Dispatcher
from appliance.transports.zmq.endpoint import Endpoints, Listen
from appliance.transports.zmq.events import EVENT_HWM, EventPublisher

if TYPE_CHECKING:
    from appliance.service import InferenceService

LEAST_LIBZMQ = (4, 3, 4)
"""Older ones have published remote memory faults (fixed in 4.3.3) and lack options that we set."""
LINGER_MS = 1000
"""How long the last replies may take to leave after close."""
MAX_SUBSCRIPTION_BYTES = 4096
QUIET_S = 0.25
"""How long `hand_over` looks for a moment between requests."""
TCP_KEEPALIVE_IDLE_S = 10
"""Dead hosts are found by TCP, not by ZMTP heartbeats: those end connections of older clients that do not answer them."""


class ZmqTransport:
    """AIP1 on one ROUTER socket and its events on one PUB socket, each bound to ipc, tcp, both or neither.

    Endpoints are ipc://PATH or a path, and tcp://HOST:PORT with port 0 or * for any free one. `report` takes what happens here
    and subscribers should hear of (topic, data); without it, such things are only logged and counted.
    """

    def __init__(
        self,
        service: InferenceService,
        config: ZmqConfig,
        *,
        ipc: str | None,
        tcp: str | None,
        events_ipc: str | None,
        events_tcp: str | None,
        report: Callable[[str, dict[str, Any]], None] | None = None,
        listen: Listen | None = None,
    ) -> None:
        self.counters = Counters()
        self._service = service
        self._config = config
        self._requests = [endpoint for endpoint in (ipc, tcp) if endpoint]
        self._events = [endpoint for endpoint in (events_ipc, events_tcp) if endpoint]
        self._report = report or (lambda topic, data: None)
        self.request_endpoints: list[str] = []
        self.event_endpoints: list[str] = []
        self._bound = Endpoints(listen) if listen is not None else Endpoints()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []
        self._channel: RouterChannel | None = None
        self._dispatcher: Dispatcher | None = None
        self._publisher: EventPublisher | None = None

    @property
    def endpoints(self) -> list[str]:
        """The addresses really bound: requests first, then events."""
        return self.request_endpoints + self.event_endpoints

    async def start(self) -> None:
        """Bind and serve. OSError (FileExistsError for an ipc endpoint in use) with a sentence says why it cannot."""
        if zmq.zmq_version_info() < LEAST_LIBZMQ:
            raise OSError(f"libzmq {'.'.join(map(str, LEAST_LIBZMQ))} or newer is needed, {zmq.zmq_version()} is here")
        self._context = zmq.Context(io_threads=1)
        try:
            self._start(self._context)
        except BaseException:
            await self.close()
            raise

    def _start(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        publisher = self._open(context, zmq.PUB)
        events = [self._bound.bind(publisher, endpoint) for endpoint in self._events]
        router = self._open(context, zmq.ROUTER)
        requests = [self._bound.bind(router, endpoint) for endpoint in self._requests]
        self.request_endpoints, self.event_endpoints = requests, events
        self._publisher = EventPublisher(
            publisher, self._service, self.counters, heartbeat_s=self._config.event_heartbeat_s
        )
        self._dispatcher = Dispatcher(self._service, self._config, self.counters, self._send)
        self._channel = RouterChannel(
            router,
            self._dispatcher,
            self.counters,
            max_frames=self._config.max_frames + MAX_ENVELOPE_FRAMES,
            max_message_bytes=self._config.max_message_bytes,
            outbox_bytes=self._config.outbox_bytes,
            report=self._report,
        )
        self._publisher.start()
        self._dispatcher.start(events)
        self._channel.start()

    def _send(self, frames: list[Any]) -> None:
        assert self._channel is not None
        self._channel.send(frames)

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        """A socket with its limits; libzmq ignores options that are set after bind."""
        socket = context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, self._config.handshake_timeout_ms)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, TCP_KEEPALIVE_IDLE_S)
        socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, TCP_KEEPALIVE_IDLE_S)
        socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        if kind == zmq.PUB:
            socket.setsockopt(zmq.SNDHWM, EVENT_HWM)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION_BYTES)
            return socket
        socket.setsockopt(zmq.RCVHWM, self._config.receive_hwm)
        socket.setsockopt(zmq.SNDHWM, self._config.send_hwm)
        socket.setsockopt(zmq.MAXMSGSIZE, self._config.max_message_bytes)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        return socket

    async def drain(self, timeout_s: float) -> None:
        """Wait until every admitted request is answered and every outbox is empty, or `timeout_s` have passed.

        New requests are still answered: the service refuses them with UNAVAILABLE. Unbinding would lose them.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self._busy() and loop.time() < end:  # noqa: ASYNC110 - only at the end; an event would cost every reply a check
            await asyncio.sleep(0.005)

    async def hand_over(self, timeout_s: float) -> None:
        """Read no more, answer what was read, and close: for sockets that listen on without us.

        That is done in a moment when nothing is under way, if one comes within QUIET_S. A request that was on its way is lost
        with its connection, and our clients ask again; to refuse it would end it.
        """
        if self._channel is not None and self._dispatcher is not None:
            loop = asyncio.get_running_loop()
            end = loop.time() + QUIET_S
            while (self._dispatcher.in_flight or not self._channel.quiet) and loop.time() < end:  # noqa: ASYNC110 - once per life
                await asyncio.sleep(0.001)
            self._channel.pause()
        await self.drain(timeout_s)
        await self.close()

    def _busy(self) -> bool:
        if self._channel is None or self._dispatcher is None:
            return False
        return self._dispatcher.in_flight > 0 or not self._channel.idle

    async def close(self) -> None:
        """End everything: what is still in flight is cancelled unanswered; ipc files and locks are removed."""
        if self._publisher is not None:
            self._publisher.stop()
        if self._dispatcher is not None:
            self._dispatcher.abandon_all()
        if self._channel is not None:
            self._channel.stop()
        for socket in self._sockets:
            socket.close()
        self._sockets.clear()
        self._publisher = self._dispatcher = self._channel = None
        if self._context is not None:
            context, self._context = self._context, None
            # waits up to LINGER_MS for the last replies to leave, so not on the loop
            await asyncio.to_thread(context.term)
        self._bound.remove()
        self.request_endpoints, self.event_endpoints = [], []
