"""Answers that go on: events as JSON lines for programs, snapshots and events as server-sent events for the page.

Each ends when the client goes or falls behind; a browser comes again by itself. Knows the service, and no route.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.transports.http.exchange import Exchange

if TYPE_CHECKING:
    from appliance.service import Event, InferenceService

LINES_TYPE = "application/x-ndjson"
PAGE_TYPE = "text/event-stream"
SNAPSHOT_INTERVAL_S = 1.0
LIMIT_QUERY = re.compile(r"[?&]limit=([0-9]{1,9})(?:&|$)")


def _head_only(exchange: Exchange, content_type: str) -> bool:
    """Answer a HEAD, which opens no stream."""
    if exchange.method == "HEAD":
        exchange.reply(200, [], f"Content-Type: {content_type}\r\n".encode())
        return True
    return False


def lines(exchange: Exchange, service: InferenceService) -> None:
    """Events as JSON lines, from now on, until the client goes, falls behind or has the number that it asked for."""
    if _head_only(exchange, LINES_TYPE):
        return
    match = LIMIT_QUERY.search(exchange.path)
    left = int(match[1]) if match else 0
    write = exchange.begin_stream(LINES_TYPE)

    def tell(event: Event) -> None:
        nonlocal left
        keeps_up = write(msgspec.json.encode(event) + b"\n")
        left -= 1
        if left == 0 or not keeps_up:
            end()
            exchange.close_stream()

    end = service.subscribe(tell)
    exchange.on_gone = end


def page(exchange: Exchange, service: InferenceService) -> None:
    """A snapshot at once and every second, and every event, until the client goes or falls behind."""
    if _head_only(exchange, PAGE_TYPE):
        return
    write = exchange.begin_stream(PAGE_TYPE)
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def end() -> None:
        leave()
        if timer is not None:
            timer.cancel()

    def send(kind: bytes, document: Any) -> None:
        if not write(b"event: %b\ndata: %b\n\n" % (kind, msgspec.json.encode(document))):
            end()
            exchange.close_stream()

    def tick() -> None:
        nonlocal timer
        timer = loop.call_later(SNAPSHOT_INTERVAL_S, tick)
        send(b"snapshot", service.snapshot())

    leave = service.subscribe(lambda event: send(b"event", event))
    exchange.on_gone = end
    tick()
