"""The blocking client. One client belongs to one thread: libzmq's sockets may not be shared, so give each thread its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
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
from appliance.core.tensor import Tensor
from appliance.protocols.zmq_wire import Reply, RequestHeader, WireEvent, decode_event, encode_request


class Client:
    """Calls an appliance at one of `endpoints` (ipc://… or tcp://…; the first that works, and the others when it does not).

    `timeout_s` is for a whole call, retries included, unless the call says otherwise. Every method raises ApplianceError:
    DEADLINE_EXCEEDED for no answer in time, UNAVAILABLE for no connection, and whatever the appliance answers.
    """

    def __init__(self, endpoints: str | Sequence[str], *, timeout_s: float = 5.0) -> None:
        addresses = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if not addresses:
            raise invalid("a client needs at least one endpoint")
        self._timeout_s = timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links = [Link(self._context, address) for address in addresses]
        self._preferred = 0
        self._ids = itertools.count(1)
        self._descriptions = Descriptions()
        self._subscribers: list[zmq.Socket[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections, those of `events` too. May be called twice."""
        for subscriber in self._subscribers:
            subscriber.close()
        for link in self._links:
            link.close()
        self._links = []
        self._context.term()

    def infer(
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
        """Run `model` on `inputs`. dtype and shape are checked against the model's description before anything is sent.

        `ttl_ms`: the appliance gives up after that (the call's timeout if None). `priority` 1 is the highest, 0 the model's
        default. A newer request of the same `stream` replaces a waiting older one, which gets SUPERSEDED. `classification` asks
        for so many top classes instead of the tensors. `idempotent` False: never run twice, not here and not there.
        """
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
            description = self.describe(model, version=version, timeout_s=timeout_s)
        tensors = to_tensors(description, inputs)
        left = max(0.001, timeout_s - (time.monotonic() - started))
        reply = self._call(infer_header(model, options), tensors, timeout_s=left, ttl_ms=ttl_ms, learn=True)
        if reply.response is None:
            raise ApplianceError(ErrorCode.INTERNAL, "the appliance's answer holds no outputs")
        return to_result(reply.response)

    def describe(self, model: str, *, version: str = "", timeout_s: float | None = None) -> Description:
        """Inputs, outputs, labels and more of a model version (the newest ready one by default); asked anew each time."""
        reply = self._call(RequestHeader(op="describe", model=model, version=version), timeout_s=timeout_s)
        description = description_of(reply.fields)
        self._descriptions.put(model, version, description, reply.boot)
        return description

    def hello(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """What the appliance is: `server`, `proto`, `features`, `limits`, `events`, `boot`."""
        return self._call(RequestHeader(op="hello", proto=(1, 1)), timeout_s=timeout_s).fields

    def ping(self, *, timeout_s: float | None = None) -> bool:
        """Whether all models that should be served are ready. Any answer at all shows that the appliance lives."""
        return bool(fields_of(self._call(RequestHeader(op="ping"), timeout_s=timeout_s), "ready"))

    def models(self, *, timeout_s: float | None = None) -> list[dict[str, str]]:
        """Every model version: `name`, `version`, `state`, `reason`."""
        models: list[dict[str, str]] = fields_of(self._call(RequestHeader(op="models"), timeout_s=timeout_s), "models")
        return models

    def stats(self, model: str = "", *, version: str = "", timeout_s: float | None = None) -> list[dict[str, Any]]:
        """Counts and summed durations of each model version."""
        reply = self._call(RequestHeader(op="stats", model=model, version=version), timeout_s=timeout_s)
        stats: list[dict[str, Any]] = fields_of(reply, "stats")
        return stats

    def snapshot(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Everything that events tell changes of, and `seq`, the last event that it includes."""
        snapshot: dict[str, Any] = fields_of(self._call(RequestHeader(op="snapshot"), timeout_s=timeout_s), "snapshot")
        return snapshot

    def events(self, topics: Sequence[str] = (), *, timeout_s: float | None = None) -> Iterator[WireEvent]:
        """Events as they happen, for ever. The first is a "snapshot"; another one comes whenever events were lost between.

        `topics` are prefixes of what to give (all if empty). DEADLINE_EXCEEDED when `timeout_s` passes without an event.
        """
        follower = Follower(topics)
        hello = self.hello()
        subscriber = self._context.socket(zmq.SUB)
        self._subscribers.append(subscriber)
        try:
            subscriber.setsockopt(zmq.LINGER, 0)
            subscriber.subscribe(b"")
            subscriber.connect(events_endpoint(self._links[self._preferred].endpoint, hello.get("events", ())))
            yield follower.caught_up(self.snapshot())
            until = None if timeout_s is None else time.monotonic() + timeout_s
            while True:
                event = _next_event(subscriber, until)
                seen = follower.take(event)
                if follower.behind:
                    yield follower.caught_up(self.snapshot())
                    seen = follower.take(event)
                if seen:
                    yield event
                    until = None if timeout_s is None else time.monotonic() + timeout_s
        finally:
            self._subscribers.remove(subscriber)
            subscriber.close()

    def _call(
        self,
        header: RequestHeader,
        tensors: Sequence[Tensor] = (),
        *,
        timeout_s: float | None,
        ttl_ms: float | None = None,
        learn: bool = False,
    ) -> Reply:
        if not self._links:
            raise invalid("this client is closed")
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
            index = self._connected(attempts)
            now = time.monotonic()
            if header.op == "infer":
                header.ttl_ms = remaining_ttl_ms(ttl_ms, started, attempts.deadline, now)
            reply = self._attempt(index, header, tensors, attempts, attempts.until(now))
            if reply is None:
                continue
            if learn:
                self._descriptions.learn(header.model, header.version, reply)
            if reply.error is None:
                self._preferred = index
                return reply
            attempts.refused(index, reply.error)

    def _connected(self, attempts: Attempts) -> int:
        """The first candidate that can take a request, waiting for one until the deadline."""
        best = attempts.candidates[0]
        if self._links[best].writable():
            return best
        preferred_until = min(attempts.deadline, time.monotonic() + PREFERENCE_S)
        if self._links[best].socket.poll(_milliseconds(preferred_until), zmq.POLLOUT):
            return best
        poller = zmq.Poller()
        for index in attempts.candidates:
            poller.register(self._links[index].socket, zmq.POLLOUT)
        sockets = [socket for socket, _ in poller.poll(_milliseconds(attempts.deadline))]
        for index in attempts.candidates:
            if self._links[index].socket in sockets:
                return index
        raise attempts.nobody()

    def _attempt(
        self, index: int, header: RequestHeader, tensors: Sequence[Tensor], attempts: Attempts, until: float
    ) -> Reply | None:
        """One try at one endpoint: the reply to it, or None if the connection or the time was lost and another may follow."""
        link = self._links[index]
        link.observe()
        losses = link.losses
        if not link.send(encode_request(header, tensors)):
            return None
        while True:
            ready = link.wait(_milliseconds(until))
            while (reply := link.receive()) is not None:
                if reply.id == header.id:
                    return reply
            link.observe()
            if link.losses != losses:
                attempts.lost(index)
                return None
            if not ready and time.monotonic() >= until:
                attempts.timed_out(index)
                return None


def _milliseconds(until: float) -> int:
    return max(0, int((until - time.monotonic()) * 1000) + 1)


def _next_event(subscriber: zmq.Socket[bytes], until: float | None) -> WireEvent:
    while True:
        if subscriber.closed:
            raise invalid("this client is closed")
        if not subscriber.poll(None if until is None else _milliseconds(until)):
            raise ApplianceError(ErrorCode.DEADLINE_EXCEEDED, "no event came in time")
        try:
            return decode_event(subscriber.recv_multipart())
        except ApplianceError:
            continue
