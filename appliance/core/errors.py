"""Error codes and the one exception that carries them.

Every operating error in the house is an `ApplianceError`. Its code is what ZeroMQ sends and what `protocols.status` turns into
an HTTP status; this file must know neither transport. The message is read by clients: it says what was expected, what came and
what to do, and never holds a path, an address or a stack trace.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, in words shared by all transports."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    SUPERSEDED = "SUPERSEDED"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"
    ENGINE_FAULT = "ENGINE_FAULT"
    UNSUPPORTED = "UNSUPPORTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"


class ApplianceError(Exception):
    """An operating error with a code, a message for the client and, where waiting helps, how long to wait (seconds)."""

    __slots__ = ("code", "message", "retry_after_s")

    def __init__(self, code: ErrorCode, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def __repr__(self) -> str:
        return f"ApplianceError({self.code}, {self.message!r})"


def invalid(message: str) -> ApplianceError:
    """The client sent something that can never work as it is."""
    return ApplianceError(ErrorCode.INVALID_ARGUMENT, message)


def not_found(message: str) -> ApplianceError:
    """The client named something that is not here."""
    return ApplianceError(ErrorCode.NOT_FOUND, message)


def unavailable(message: str, *, retry_after_s: float = 1.0) -> ApplianceError:
    """Not now: loading, draining, too hot. Waiting helps."""
    return ApplianceError(ErrorCode.UNAVAILABLE, message, retry_after_s=retry_after_s)


def unsupported(message: str) -> ApplianceError:
    """A well-formed wish for something that we do not do."""
    return ApplianceError(ErrorCode.UNSUPPORTED, message)
