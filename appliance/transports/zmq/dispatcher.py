"""AIP1 requests to service calls, and outcomes to replies. One request, one reply, and limits before anything is queued.

It knows the protocol's operations and the service, and no socket: `channel` gives it messages and takes its replies.
There is no task per request: the service calls back, and the reply is encoded and sent in that call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.config import ZmqConfig
from appliance.core.errors import ApplianceError, ErrorCode, invalid, unsupported
from appliance.core.request import InferenceResponse, ModelName, Version
from appliance.core.tensor import Buffer
from appliance.observability.requests import RequestLog
from appliance.protocols import zmq_wire as wire
from appliance.transports.zmq.counters import Counters

if TYPE_CHECKING:
    from appliance.service import InferenceService, Outcome, Ticket

log = logging.getLogger(__name__)

WARN_INTERVAL_S = 1.0

Send = Callable[[list[Buffer]], None]


class _Peer:
    """A connected peer with requests in flight. It exists no longer than they do."""

    __slots__ = ("gone", "pending", "routing_id")

    def __init__(self, routing_id: bytes) -> None:
        self.routing_id = routing_id
        self.pending: set[_Pending] = set()
        self.gone = False


class _Pending:
    """An admitted request: where its answer goes."""

    __slots__ = ("dispatcher", "envelope", "id", "nbytes", "peer", "ticket")

    ticket: Ticket

    def __init__(
        self, dispatcher: Dispatcher, peer: _Peer, envelope: list[Buffer], request_id: str, nbytes: int
    ) -> None:
        self.dispatcher = dispatcher
        self.peer = peer
        self.envelope = envelope
        self.id = request_id
        self.nbytes = nbytes

    def done(self, outcome: Outcome) -> None:
        """The service's callback."""
        self.dispatcher.finish(self, outcome)


class Dispatcher:
    """Serves every operation of the protocol. `send` takes a whole reply, envelope first."""

    def __init__(self, service: InferenceService, config: ZmqConfig, counters: Counters, send: Send) -> None:
        self._service = service
        self._config = config
        self._counters = counters
        self._send = send
        self._peers: dict[bytes, _Peer] = {}
        self._bytes_in_flight = 0
        self._warn_at = 0.0
        self._unreadable = RequestLog("request.refused")
        self._events: Sequence[str] = ()
        self._boot = ""
        self._operations: dict[str, Callable[[wire.RequestHeader, wire.Message], dict[str, Any]]] = {
            "hello": self._hello,
            "ping": self._ping,
            "models": self._models,
            "describe": self._describe,
            "stats": self._stats,
            "cancel": self._cancel,
            "snapshot": self._snapshot,
        }

    def start(self, events: Sequence[str]) -> None:
        """Learn our boot id; `events` are the addresses that `hello` names."""
        self._boot = self._service.describe_server().boot_id
        self._events = events

    @property
    def in_flight(self) -> int:
        """Admitted requests that are not answered yet."""
        return sum([len(peer.pending) for peer in self._peers.values()])

    def message(self, frames: list[Buffer], *, cut: bool) -> None:
        """Serve one message, routing id first."""
        if len(frames) < 2:
            self._counters.messages_unreadable += 1
            return
        count = wire.envelope_length(frames)
        try:
            if cut or len(frames) - count > self._config.max_frames:
                raise self._too_large()
            message = wire.split(frames, count, max_header_bytes=self._config.max_header_bytes)
            header = wire.decode_header(message.header)
        except ApplianceError as error:
            self._counters.messages_malformed += 1
            self._warn(error)
            request_id = wire.salvage_id(frames[count + 1]) if self._worth_salvaging(frames, count) else ""
            self._reply(frames[:count], wire.encode_error(error, request_id, self._boot))
            return
        try:
            if header.op == "infer":
                self._infer(header, message)
            else:
                fields = self._operation(header, message)
                self._reply(message.envelope, wire.encode_fields(fields, header.id, self._boot))
        except ApplianceError as error:
            self._reply(message.envelope, wire.encode_error(error, header.id, self._boot))
        except Exception:
            log.exception("zmq.operation_failed", extra={"fields": {"op": header.op[:32], "id": header.id}})
            self._counters.handler_faults += 1
            self._reply(message.envelope, wire.encode_error(_our_fault(), header.id, self._boot))

    def _warn(self, error: ApplianceError) -> None:
        """One line a second for all who send nonsense together; the counter has the rest."""
        now = time.monotonic()
        if now >= self._warn_at:
            self._warn_at = now + WARN_INTERVAL_S
            refused = self._counters.messages_malformed
            fields = {"code": error.code, "reason": error.message, "refused_in_all": refused}
            log.warning("zmq.message_refused", extra={"fields": fields})

    def _worth_salvaging(self, frames: list[Buffer], count: int) -> bool:
        return (
            len(frames) > count + 1
            and frames[count] == wire.PROTOCOL
            and len(frames[count + 1]) <= self._config.max_header_bytes
        )

    def _too_large(self) -> ApplianceError:
        return ApplianceError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"a message may have {self._config.max_frames} frames and {self._config.max_message_bytes} bytes in all",
        )

    def _operation(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        operation = self._operations.get(header.op)
        if operation is None:
            if not header.op:
                raise invalid(f'the header needs "op": one of {", ".join(wire.OPERATIONS)}')
            raise unsupported(f"unknown op {header.op[:32]!r}; use one of {', '.join(wire.OPERATIONS)}")
        return operation(header, message)

    def _infer(self, header: wire.RequestHeader, message: wire.Message) -> None:
        routing_id = bytes(message.envelope[0])
        nbytes = len(message.header) + sum([len(frame) for frame in message.tensors])
        peer = self._peers.get(routing_id)
        if peer is None:
            peer = _Peer(routing_id)
        try:
            self._check_room(peer, nbytes)
            request = wire.to_inference(header, message.tensors)
        except ApplianceError as error:
            self._unreadable.add(error, model=header.model, request_id=header.id)
            raise
        pending = _Pending(self, peer, message.envelope, header.id, nbytes)
        pending.ticket = self._service.submit(request, pending.done)
        peer.pending.add(pending)
        self._peers[routing_id] = peer
        self._bytes_in_flight += nbytes

    def _check_room(self, peer: _Peer, nbytes: int) -> None:
        limits = self._config
        if len(peer.pending) >= limits.max_peer_in_flight:
            self._counters.requests_busy += 1
            raise ApplianceError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"{limits.max_peer_in_flight} of your requests are in flight, which is the limit; wait for an answer",
            )
        if self._bytes_in_flight + nbytes > limits.max_bytes_in_flight:
            self._counters.requests_busy += 1
            raise ApplianceError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"requests of {limits.max_bytes_in_flight} bytes together may be in flight; try again later",
            )

    def finish(self, pending: _Pending, outcome: Outcome) -> None:
        """Answer an admitted request. Called once for each, by the service."""
        peer = pending.peer
        peer.pending.discard(pending)
        self._bytes_in_flight -= pending.nbytes
        if not peer.pending and self._peers.get(peer.routing_id) is peer:
            del self._peers[peer.routing_id]
        if peer.gone:
            return
        try:
            if isinstance(outcome, InferenceResponse):
                frames = wire.encode_response(outcome, pending.id, self._boot)
            else:
                frames = wire.encode_error(outcome, pending.id, self._boot)
        except Exception:
            # an answer that cannot be written is our fault; its caller must hear of it, and the service must not
            log.exception("zmq.encode_failed", extra={"fields": {"id": pending.id}})
            self._counters.handler_faults += 1
            frames = wire.encode_error(_our_fault(), pending.id, self._boot)
        self._reply(pending.envelope, frames)

    def _reply(self, envelope: list[Buffer], frames: list[Buffer]) -> None:
        self._send(envelope + frames)

    def peer_gone(self, routing_id: bytes) -> None:
        """Cancel what that peer still has in flight: nobody waits for it."""
        peer = self._peers.pop(routing_id, None)
        if peer is not None:
            self._abandon(peer)

    def abandon_all(self) -> None:
        """Cancel everything in flight, unanswered; for closing."""
        peers = list(self._peers.values())
        self._peers.clear()
        for peer in peers:
            self._abandon(peer)

    def _abandon(self, peer: _Peer) -> None:
        peer.gone = True
        for pending in list(peer.pending):
            self._service.cancel(pending.ticket)

    def _hello(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        wire.check_hello(header)
        limits = {
            "max_message_bytes": self._config.max_message_bytes,
            "max_header_bytes": self._config.max_header_bytes,
            "max_frames": self._config.max_frames,
            "max_in_flight": self._config.max_peer_in_flight,
        }
        return wire.hello_fields(self._service.describe_server(), limits, self._events)

    def _ping(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        fields: dict[str, Any] = {"ready": self._service.ready()}
        if header.model:
            fields["model_ready"] = self._service.model_ready(ModelName(header.model), Version(header.version))
        return fields

    def _models(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        return {"models": wire.model_fields(self._service.index())}

    def _describe(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        if not header.model:
            raise invalid('describe needs "model"; "models" lists them')
        model = self._service.describe_model(ModelName(header.model), Version(header.version))
        return {"description": wire.description_fields(model)}

    def _stats(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        statistics = self._service.statistics(ModelName(header.model), Version(header.version))
        return {"stats": wire.statistics_fields(statistics), "transport": msgspec.structs.asdict(self._counters)}

    def _cancel(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        """Only what came by the same way: a peer cannot name, nor cancel, another's requests."""
        peer = self._peers.get(bytes(message.envelope[0]))
        wanted = set(header.ids)
        pending = list(peer.pending) if peer is not None else []
        ours = [item for item in pending if item.id in wanted and item.envelope == message.envelope]
        return {"cancelled": [item.id for item in ours if self._service.cancel(item.ticket)]}

    def _snapshot(self, header: wire.RequestHeader, message: wire.Message) -> dict[str, Any]:
        return {"snapshot": self._service.snapshot()}


def _our_fault() -> ApplianceError:
    return ApplianceError(ErrorCode.INTERNAL, "the appliance failed on this request; its log says why")
