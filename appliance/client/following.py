"""Following the appliance's events without losing any unnoticed: snapshot first, then events, a new snapshot after a gap.

Values only; both clients drive it. Sequence numbers count all events of one boot, and heartbeats repeat the last one, so a
follower must take all topics and pick afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from appliance.core.errors import unsupported
from appliance.protocols.zmq_wire import HEARTBEAT_TOPIC, WireEvent

SNAPSHOT_TOPIC = "snapshot"


class Follower:
    """What has been seen so far, and what an event means after that."""

    def __init__(self, topics: Sequence[str] = ()) -> None:
        self._topics = tuple(topics)
        self._boot = ""
        self._seq = -1
        self.behind = True

    def caught_up(self, snapshot: Mapping[str, Any]) -> WireEvent:
        """Start again from a snapshot; it is given to the caller as an event of the topic "snapshot"."""
        self._boot = str(snapshot.get("boot", ""))
        self._seq = int(snapshot.get("seq", 0))
        self.behind = False
        return WireEvent(SNAPSHOT_TOPIC, self._seq, "", self._boot, dict(snapshot))

    def take(self, event: WireEvent) -> bool:
        """True if the caller should see it. Sets `behind` when events were lost: a snapshot is needed, then offer it again."""
        heartbeat = event.topic == HEARTBEAT_TOPIC
        expected = self._seq if heartbeat else self._seq + 1
        if event.boot != self._boot or event.seq > expected:
            self.behind = True
            return False
        if heartbeat or event.seq < expected:
            return False
        self._seq = event.seq
        return not self._topics or event.topic.startswith(self._topics)


def events_endpoint(link: str, published: Sequence[Any]) -> str:
    """Which of the event addresses in a `hello` answer to use from where we reached `link`. UNSUPPORTED if none fits."""
    scheme = link.split("://", 1)[0]
    for address in published:
        if isinstance(address, str) and address.startswith(f"{scheme}://"):
            if scheme == "tcp":
                # the daemon knows the interface it bound, we know the name by which it is reached
                return f"tcp://{urlsplit(link).netloc.rsplit(':', 1)[0]}:{address.rsplit(':', 1)[1]}"
            return address
    raise unsupported(f"the appliance publishes no events over {scheme}")
