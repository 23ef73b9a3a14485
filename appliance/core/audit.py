"""The chain of administrative actions: each entry's hash covers the one before, so that a changed or removed one shows.

Pure. What it proves: nobody changed, removed or inserted an entry between the first and the last. What it cannot prove: that the
newest entries were not cut off; for that the last hash must be noted elsewhere (each one is also written to the log).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

GENESIS = "0" * 64
"""What the first entry follows."""


RECORDER = "recorder"
BEGUN_ANEW = "record.begun_anew"
"""What the recorder itself enters where a chain could not go on, since its file was damaged."""


class AuditEntry(msgspec.Struct, frozen=True):
    """One action: `seq` from 1 without gaps, `time` seconds since 1970, `hash` over `previous` and everything else."""

    seq: int
    time: float
    monotonic: float
    boot_id: str
    actor: str
    action: str
    fields: dict[str, Any]
    previous: str
    hash: str


def begun_anew(entries: Iterable[AuditEntry]) -> list[AuditEntry]:
    """The entries that say that a file was put aside with the chain of before, and where that ended as far as it can be read."""
    return [entry for entry in entries if entry.actor == RECORDER and entry.action == BEGUN_ANEW]


class Verdict(msgspec.Struct, frozen=True):
    """Whether a chain holds; otherwise the first entry that does not, and why. `head` is the last good hash."""

    ok: bool
    entries: int
    first_seq: int
    head: str
    broken_seq: int = 0
    reason: str = ""


def canonical(content: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys and no spaces, so that equal content has equal bytes (the idea of RFC 8785)."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str).encode()


def digest(entry: AuditEntry) -> str:
    """SHA-256 over the previous hash and the entry's canonical content, in hex."""
    content = {
        "seq": entry.seq,
        "time": entry.time,
        "monotonic": entry.monotonic,
        "boot_id": entry.boot_id,
        "actor": entry.actor,
        "action": entry.action,
        "fields": entry.fields,
    }
    return hashlib.sha256(entry.previous.encode() + b"\n" + canonical(content)).hexdigest()


def append(previous: AuditEntry | None, content: AuditEntry) -> AuditEntry:
    """`content` with its place in the chain: number, previous hash and hash are set here.

    Fields pass through JSON first: what is hashed is what will be read back.
    """
    placed = msgspec.structs.replace(
        content,
        seq=previous.seq + 1 if previous else 1,
        previous=previous.hash if previous else GENESIS,
        fields=json.loads(canonical(content.fields)),
    )
    return msgspec.structs.replace(placed, hash=digest(placed))


def verify(entries: Iterable[AuditEntry], *, after_seq: int = 0, after_hash: str = GENESIS) -> Verdict:
    """Follow the chain. `after_seq` and `after_hash`: the last entry that was pruned, for a chain that no longer begins at 1."""
    first = after_seq + 1
    seq, head, count = after_seq, after_hash, 0
    for entry in entries:
        count += 1
        if entry.seq != seq + 1:
            return Verdict(
                False, count, first, head, entry.seq, f"entry {seq + 1} is missing: {entry.seq} follows {seq}"
            )
        if entry.previous != head:
            return Verdict(False, count, first, head, entry.seq, f"entry {entry.seq} does not follow entry {seq}")
        if digest(entry) != entry.hash:
            return Verdict(False, count, first, head, entry.seq, f"entry {entry.seq} was changed after it was written")
        seq, head = entry.seq, entry.hash
    return Verdict(True, count, first, head)
