"""What the ZeroMQ face counts. Plain integers, written on the loop, read by `stats` and by the metrics."""

from __future__ import annotations

import msgspec


class Counters(msgspec.Struct):
    """Since start. `unreadable`: dropped without an answer; `malformed`: refused by the codec; `busy`: refused by our own limits.

    `replies_dropped`: a peer did not read and its outbox was full. `peers_gone`: a reply found its peer disconnected.
    """

    messages_received: int = 0
    messages_unreadable: int = 0
    messages_malformed: int = 0
    requests_busy: int = 0
    replies_sent: int = 0
    replies_delayed: int = 0
    replies_dropped: int = 0
    peers_gone: int = 0
    events_published: int = 0
    events_failed: int = 0
    handler_faults: int = 0
