"""The chain of actions: any change, removal, insertion or reordering of an entry shows."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.audit import AuditEntry, append, verify


def chain(length: int) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for number in range(length):
        content = AuditEntry(
            0, 1e9 + number, float(number), "boot", "anna", "load", {"model": f"m{number}", "x": (1, 2)}, "", ""
        )
        entries.append(append(entries[-1] if entries else None, content))
    return entries


@given(st.integers(0, 12))
def test_an_untouched_chain_holds_also_from_its_middle(length: int) -> None:
    entries = chain(length)
    assert verify(entries).ok
    for cut in range(1, length):
        assert verify(entries[cut:], after_seq=cut, after_hash=entries[cut - 1].hash).ok


@given(st.data())
def test_any_touched_chain_is_found_out(data: st.DataObject) -> None:
    entries = chain(6)
    place = data.draw(st.integers(0, 4))
    match data.draw(st.sampled_from(["change", "remove", "swap", "repeat"])):
        case "change":
            change = data.draw(
                st.sampled_from(
                    [{"actor": "otto"}, {"time": 1.0}, {"fields": {}}, {"action": "unload"}, {"hash": "0" * 64}]
                )
            )
            entries[place] = msgspec.structs.replace(entries[place], **change)
        case "remove":
            del entries[place]
        case "swap":
            entries[place], entries[place + 1] = entries[place + 1], entries[place]
        case "repeat":
            entries.insert(place, entries[place])
    assert not verify(entries).ok
