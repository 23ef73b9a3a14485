"""The client for asyncio: many calls at once over the same connections, on the loop that runs it.

It watches libzmq's descriptors itself. zmq.asyncio is not used: a cancelled receive there can lose a message, and here a
cancelled call only forgets its id. After each send the socket is looked at once more, because sending may swallow the wake-up.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import zmq
from numpy.typing import ArrayLike

from appliance.client.arrays import Description, Result, description_of, to_result, to_tensors
from appliance.client.attempts import PREFERENCE_S, Attempts
from appliance.client.calls import Descriptions, Options, fields_of, infer_header, remaining_ttl_ms
from appliance.client.following import Follower, events_endpoint
from appliance.client.link import Link
from appliance.core.errors import ApplianceError, ErrorCode, invalid
from appliance.core.request import Parameter
from appliance.core.tensor import Buffer, Tensor
from appliance.protocols.zmq_wire import Reply, RequestHeader, WireEvent, decode_event, encode_request


class _LoopLink:
    """A link watched by the running loop: replies resolve the futures that wait for them; a lost connection gives them None."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, changed: asyncio.Event) -> None:
        self.link = Link(context, endpoint)
        self._changed = changed
        self._waiting: dict[str, asyncio.Future[Reply | None]] = {}
        self._armed = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._fds = [int(socket.getsockopt(zmq.FD)) for socket in (self.link.socket, self.link.monitor)]
        for fd in self._fds:
            self._loop.add_reader(fd, self._look)
        self._rearm()

    def send(self, frames: list[Buffer], request_id: str) -> asyncio.Future[Reply | None] | None:
        """The future of the reply, or None if the connection takes nothing now."""
        sent = self.link.send(frames)
        self._rearm()
        if not sent:
            return None
        future: asyncio.Future[Reply | None] = self._loop.create_future()
        self._waiting[request_id] = future
        return future

    def writable(self) -> bool:
        """Whether a request could be sent now."""
        events = int(self.link.socket.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN:
            self._rearm()
        return bool(events & zmq.POLLOUT)

    def forget(self, request_id: str) -> None:
        """Nobody waits for that reply any more."""
        self._waiting.pop(request_id, None)

    def close(self) -> None:
        """Let go of the loop and the connection; whoever waits gets None."""
        self._closed = True
        for fd in self._fds:
            self._loop.remove_reader(fd)
        self._lose()
        self.link.close()

    def _rearm(self) -> None:
        if not self._armed:
            self._armed = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._armed = False
        if self._closed:
            return
        while (reply := self.link.receive()) is not None:
            future = self._waiting.pop(reply.id, None)
            if future is not None and not future.done():
                future.set_result(reply)
        losses = self.link.losses
        self.link.observe()
        if self.link.losses != losses:
            self._lose()
        self._changed.set()

    def _lose(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_result(None)


class _Subscription:
    """A SUB socket watched by the running loop."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.subscribe(b"")
        self._socket.connect(endpoint)
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._arrived.set)

    async def next(self) -> WireEvent:
        """The next event; INVALID_ARGUMENT once closed."""
        while not self._socket.closed:
            self._arrived.clear()
            try:
                return decode_event(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                await self._arrived.wait()
            except ApplianceError:
                continue
        raise invalid("this client is closed")

    def close(self) -> None:
        """Let go of the loop and the socket; may be called twice."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close()
            self._arrived.set()


class AsyncClient:
    """As `Client`, for asyncio: any number of calls at once, from the one loop on which it was first used."""

    def __init__(self, endpoints: str | Sequence[str], *, timeout_s: float = 5.0) -> None:
        self._addresses = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if not self._addresses:
            raise invalid("a client needs at least one endpoint")
        self._timeout_s = timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] | None = zmq.Context()
        self._links: list[_LoopLink] = []
        self._changed = asyncio.Event()
        self._preferred = 0
        self._ids = itertools.count(1)
        self._descriptions = Descriptions()
        self._subscriptions: list[_Subscription] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections; calls and `events` that wait end with INVALID_ARGUMENT. May be called twice."""
        context, self._context = self._context, None
        if context is None:
            return
        for subscription in self._subscriptions:
            subscription.close()
        for link in self._links:
            link.close()
        self._links = []
        self._changed.set()
        context.term()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        ttl_ms: float | None = None,
        priority: int = 0,
        stream: str = "",
        classification: int = 0,
        idempotent: bool = True,
        parameters: Mapping[str, Parameter] | None = None,
        timeout_s: float | None = None,
    ) -> Result:
        """As `Client.infer`. A cancelled call is cancelled at the appliance too, if it still waits there."""
        options = Options(
            version=version,
            outputs=outputs,
            ttl_ms=ttl_ms,
            priority=priority,
            stream=stream,
            classification=classification,
            idempotent=idempotent,
            parameters=parameters or {},
        )
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        started = time.monotonic()
        description = self._descriptions.get(model, version)
        if description is None:
            description = await self.describe(model, version=version, timeout_s=timeout_s)
        tensors = to_tensors(description, inputs)
        left = max(0.001, timeout_s - (time.monotonic() - started))
        reply = await self._call(infer_header(model, options), tensors, timeout_s=left, ttl_ms=ttl_ms, learn=True)
        if reply.response is None:
            raise ApplianceError(ErrorCode.INTERNAL, "the appliance's answer holds no outputs")
        return to_result(reply.response)

    async def describe(self, model: str, *, version: str = "", timeout_s: float | None = None) -> Description:
        """As `Client.describe`."""
        reply = await self._call(RequestHeader(op="describe", model=model, version=version), timeout_s=timeout_s)
        description = description_of(reply.fields)
        self._descriptions.put(model, version, description, reply.boot)
        return description

    async def hello(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """As `Client.hello`."""
        return (await self._call(RequestHeader(op="hello", proto=(1, 1)), timeout_s=timeout_s)).fields

    async def ping(self, *, timeout_s: float | None = None) -> bool:
        """As `Client.ping`."""
        return bool(fields_of(await self._call(RequestHeader(op="ping"), timeout_s=timeout_s), "ready"))

    async def models(self, *, timeout_s: float | None = None) -> list[dict[str, str]]:
        """As `Client.models`."""
        reply = await self._call(RequestHeader(op="models"), timeout_s=timeout_s)
        models: list[dict[str, str]] = fields_of(reply, "models")
        return models

    async def stats(
        self, model: str = "", *, version: str = "", timeout_s: float | None = None
    ) -> list[dict[str, Any]]:
        """As `Client.stats`."""
        reply = await self._call(RequestHeader(op="stats", model=model, version=version), timeout_s=timeout_s)
        stats: list[dict[str, Any]] = fields_of(reply, "stats")
        return stats

    async def snapshot(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """As `Client.snapshot`."""
        reply = await self._call(RequestHeader(op="snapshot"), timeout_s=timeout_s)
        snapshot: dict[str, Any] = fields_of(reply, "snapshot")
        return snapshot

    async def events(self, topics: Sequence[str] = ()) -> AsyncIterator[WireEvent]:
        """As `Client.events`, for ever; end it by leaving the loop (and `aclose`) or by cancelling its task."""
        follower = Follower(topics)
        hello = await self.hello()
        if self._context is None:
            raise invalid("this client is closed")
        endpoint = events_endpoint(self._addresses[self._preferred], hello.get("events", ()))
        subscription = _Subscription(self._context, endpoint)
        self._subscriptions.append(subscription)
        try:
            yield follower.caught_up(await self.snapshot())
            while True:
                event = await subscription.next()
                seen = follower.take(event)
                if follower.behind:
                    yield follower.caught_up(await self.snapshot())
                    seen = follower.take(event)
                if seen:
                    yield event
        finally:
            self._subscriptions.remove(subscription)
            subscription.close()

    def _open(self) -> None:
        if self._context is None:
            raise invalid("this client is closed")
        if not self._links:
            self._links = [_LoopLink(self._context, address, self._changed) for address in self._addresses]

    async def _call(
        self,
        header: RequestHeader,
        tensors: Sequence[Tensor] = (),
        *,
        timeout_s: float | None,
        ttl_ms: float | None = None,
        learn: bool = False,
    ) -> Reply:
        self._open()
        started = time.monotonic()
        header.id = str(next(self._ids))
        attempts = Attempts(
            len(self._links),
            first=self._preferred,
            idempotent=header.idem,
            now=started,
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
        )
        while True:
            index = await self._connected(attempts)
            now = time.monotonic()
            if header.op == "infer":
                header.ttl_ms = remaining_ttl_ms(ttl_ms, started, attempts.deadline, now)
            reply = await self._attempt(index, header, tensors, attempts, attempts.until(now))
            if reply is None:
                continue
            if learn:
                self._descriptions.learn(header.model, header.version, reply)
            if reply.error is None:
                self._preferred = index
                return reply
            attempts.refused(index, reply.error)

    async def _connected(self, attempts: Attempts) -> int:
        preferred_until = min(attempts.deadline, time.monotonic() + PREFERENCE_S)
        index = await self._writable(attempts.candidates[:1], preferred_until)
        if index is None:
            index = await self._writable(attempts.candidates, attempts.deadline)
        if index is None:
            raise attempts.nobody()
        return index

    async def _writable(self, candidates: Sequence[int], until: float) -> int | None:
        """The first candidate that can take a request, or None if there is none by then."""
        while True:
            self._open()
            self._changed.clear()
            for index in candidates:
                if self._links[index].writable():
                    return index
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                return None

    async def _attempt(
        self, index: int, header: RequestHeader, tensors: Sequence[Tensor], attempts: Attempts, until: float
    ) -> Reply | None:
        link = self._links[index]
        future = link.send(encode_request(header, tensors), header.id)
        if future is None:
            return None
        try:
            async with asyncio.timeout(until - time.monotonic()):
                reply = await future
        except TimeoutError:
            attempts.timed_out(index)
            return None
        except asyncio.CancelledError:
            link.send(encode_request(RequestHeader(op="cancel", ids=(header.id,))), "")
            link.forget("")
            raise
        finally:
            link.forget(header.id)
        if reply is None:
            self._open()
            attempts.lost(index)
        return reply
