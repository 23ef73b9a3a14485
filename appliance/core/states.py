"""The states of a model version and of a request, as tables. One function each changes a state; the rest of the house asks.

`public_state` gives the outside name (Triton's repository states). READY is published after `acquire` works, UNLOADING before
it stops: the lifecycle's shell keeps that order, this file only says which steps exist.
"""

from __future__ import annotations

from enum import StrEnum


class ModelState(StrEnum):
    """Where a model version stands in its life."""

    NEW = "NEW"
    APPROVED = "APPROVED"
    BUILDING = "BUILDING"
    LOADING = "LOADING"
    WARMING = "WARMING"
    VERIFYING = "VERIFYING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADING = "UNLOADING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


class RequestState(StrEnum):
    """Where a request stands. Every admitted one ends in exactly one of the last five."""

    RECEIVED = "RECEIVED"
    REJECTED = "REJECTED"
    QUEUED = "QUEUED"
    DISPATCHED = "DISPATCHED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"
    SUPERSEDED = "SUPERSEDED"
    CANCELLED = "CANCELLED"


_M = ModelState
_R = RequestState

MODEL_TRANSITIONS: dict[ModelState, frozenset[ModelState]] = {
    _M.NEW: frozenset({_M.APPROVED, _M.FAILED, _M.UNLOADED}),
    _M.APPROVED: frozenset({_M.BUILDING, _M.LOADING, _M.FAILED, _M.UNLOADED}),
    _M.BUILDING: frozenset({_M.LOADING, _M.FAILED, _M.UNLOADING}),
    _M.LOADING: frozenset({_M.WARMING, _M.FAILED, _M.UNLOADING}),
    _M.WARMING: frozenset({_M.VERIFYING, _M.READY, _M.FAILED, _M.UNLOADING}),
    _M.VERIFYING: frozenset({_M.READY, _M.FAILED, _M.UNLOADING}),
    _M.READY: frozenset({_M.DRAINING, _M.FAILED}),
    _M.DRAINING: frozenset({_M.UNLOADING, _M.FAILED}),
    _M.UNLOADING: frozenset({_M.UNLOADED}),
    _M.UNLOADED: frozenset(),
    _M.FAILED: frozenset({_M.NEW, _M.UNLOADED}),
}

REQUEST_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    _R.RECEIVED: frozenset({_R.REJECTED, _R.QUEUED}),
    _R.QUEUED: frozenset({_R.DISPATCHED, _R.EXPIRED, _R.SUPERSEDED, _R.CANCELLED, _R.FAILED}),
    _R.DISPATCHED: frozenset({_R.COMPLETED, _R.FAILED, _R.EXPIRED, _R.CANCELLED, _R.QUEUED}),
    _R.REJECTED: frozenset(),
    _R.COMPLETED: frozenset(),
    _R.FAILED: frozenset(),
    _R.EXPIRED: frozenset(),
    _R.SUPERSEDED: frozenset(),
    _R.CANCELLED: frozenset(),
}

PUBLIC_STATES: dict[ModelState, str] = {
    _M.NEW: "LOADING",
    _M.APPROVED: "LOADING",
    _M.BUILDING: "LOADING",
    _M.LOADING: "LOADING",
    _M.WARMING: "LOADING",
    _M.VERIFYING: "LOADING",
    _M.READY: "READY",
    _M.DRAINING: "UNLOADING",
    _M.UNLOADING: "UNLOADING",
    _M.UNLOADED: "UNAVAILABLE",
    _M.FAILED: "UNAVAILABLE",
}


def model_transition(current: ModelState, target: ModelState) -> ModelState:
    """`target`, if that step exists. ValueError otherwise: a bug of ours, never an operating error."""
    if target not in MODEL_TRANSITIONS[current]:
        raise ValueError(f"no step from {current} to {target}")
    return target


def request_transition(current: RequestState, target: RequestState) -> RequestState:
    """`target`, if that step exists. ValueError otherwise: a bug of ours, never an operating error."""
    if target not in REQUEST_TRANSITIONS[current]:
        raise ValueError(f"no step from {current} to {target}")
    return target


def public_state(state: ModelState) -> str:
    """LOADING, READY, UNLOADING or UNAVAILABLE, as the repository index says it."""
    return PUBLIC_STATES[state]
