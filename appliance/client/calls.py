"""The messages of the client's calls, and what their answers mean: the part that both clients share. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from appliance.client.arrays import Description
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import Parameter
from appliance.protocols.zmq_wire import OutputHeader, Reply, RequestHeader


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may say of one inference beside model and inputs."""

    version: str = ""
    outputs: Sequence[str] = ()
    ttl_ms: float | None = None
    priority: int = 0
    stream: str = ""
    classification: int = 0
    idempotent: bool = True
    parameters: Mapping[str, Parameter] = {}


def infer_header(model: str, options: Options) -> RequestHeader:
    """The header of an inference, all but id, inputs and remaining time."""
    parameters = dict(options.parameters)
    if options.classification:
        parameters["classification"] = options.classification
    return RequestHeader(
        op="infer",
        model=model,
        version=options.version,
        priority=options.priority,
        stream=options.stream,
        idem=options.idempotent,
        outputs=tuple([OutputHeader(name) for name in options.outputs]),
        parameters=parameters or msgspec.UNSET,
    )


class Descriptions:
    """Model descriptions by (model, version asked for), as long as one boot of the appliance lasts and the version answers."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Description] = {}
        self._boot = ""

    def get(self, model: str, version: str) -> Description | None:
        """The description, if we have it."""
        return self._known.get((model, version))

    def put(self, model: str, version: str, description: Description, boot: str) -> None:
        """Keep what the appliance of that boot said."""
        if boot != self._boot:
            self._boot = boot
            self._known.clear()
        self._known[model, version] = description

    def learn(self, model: str, version: str, reply: Reply) -> None:
        """Forget what an answer shows to be out of date: another boot, another version, or a refusal of what we checked."""
        if reply.boot != self._boot:
            self._boot = reply.boot
            kept = self._known.get((model, version)) if reply.error is None else None
            self._known.clear()
            if kept is not None:
                self._known[model, version] = kept
        known = self._known.get((model, version))
        if known is None:
            return
        answered = reply.response.version if reply.response is not None else known.version
        refused = reply.error is not None and reply.error.code in (ErrorCode.INVALID_ARGUMENT, ErrorCode.NOT_FOUND)
        if refused or answered != known.version:
            del self._known[model, version]


def remaining_ttl_ms(ttl_ms: float | None, started: float, deadline: float, now: float) -> float:
    """What to send as `ttl_ms`: what is left of the caller's, or of the whole call if the caller set none. At least 1 ms."""
    left = (deadline - now) * 1000 if ttl_ms is None else ttl_ms - (now - started) * 1000
    return max(1.0, round(left, 3))


def fields_of(reply: Reply, key: str) -> Any:
    """That field of a good answer; INTERNAL if the appliance left it out."""
    if key not in reply.fields:
        raise ApplianceError(ErrorCode.INTERNAL, f"the appliance's answer lacks {key!r}")
    return reply.fields[key]
