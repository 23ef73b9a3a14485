"""The ledger of memory: what is booked is what is held, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.core.memory_budget import HOST, WORKER_BYTES, Evict, MemoryBudget, Need, Refused, Reserved, estimate

GPU = "gpu:0"
OWNERS = st.sampled_from(["a/1", "b/1", "c/1", "d/2"])
SIZES = st.integers(0, 60)


def test_what_does_not_fit_is_refused_with_numbers_and_a_suggestion() -> None:
    budget = MemoryBudget({HOST: 2_000_000_000})
    assert budget.reserve("digits/1", Need({HOST: 1_200_000_000})) == Reserved("digits/1")
    refused = budget.reserve("faces/1", Need({HOST: 1_200_000_000}))
    assert refused == Refused("needs 1.2 GB on host, 0.8 GB free: unload digits/1 (1.2 GB)?")
    assert budget.booked(HOST) == 1_200_000_000
    huge = budget.reserve("huge/1", Need({HOST: 3_000_000_000}))
    assert huge == Refused(
        "needs 3.0 GB on host, 0.8 GB free: more than the 2.0 GB that may be used there at all", hopeless=True
    )
    assert budget.fits(Need({HOST: 800_000_000}))
    assert not budget.fits(Need({HOST: 800_000_001}))


def test_it_books_by_what_there_is_now_where_that_is_more_and_never_by_less_than_at_first() -> None:
    budget = MemoryBudget({HOST: 100, GPU: 50}, {HOST: 300})
    assert budget.reserve("a", Need({HOST: 200})) == Refused(
        "needs 0 MB on host, 0 MB free: other programs hold more than they leave: end some, and it is loaded"
    )
    budget.look({HOST: 250}, {})
    assert isinstance(budget.reserve("a", Need({HOST: 200})), Reserved)
    # what is loading may not have taken its memory yet, so it comes out of the room
    budget.look({HOST: 250}, {})
    assert (budget.capacity[HOST], budget.free(HOST)) == (250, 50)
    budget.correct("a", {HOST: 200})
    budget.look({HOST: 60}, {})
    assert (budget.capacity[HOST], budget.free(HOST)) == (260, 60)
    # less was taken than is booked: the difference is nobody's gift
    budget.look({HOST: 60}, {HOST: 150})
    assert (budget.capacity[HOST], budget.free(HOST)) == (210, 10)
    budget.look({HOST: 1000, GPU: 1000, "gpu:7": 1000}, {})
    assert budget.capacity == {HOST: 300, GPU: 50}, "nothing beyond what there is at all"
    budget.release("a")
    budget.look({HOST: 10}, {HOST: 0})
    assert budget.capacity[HOST] == 100, "what was unloaded a moment ago may not have arrived"
    refused = budget.reserve("b", Need({HOST: 301}))
    assert isinstance(refused, Refused)
    assert refused.hopeless


def test_the_least_recently_used_that_may_go_goes_and_nobody_in_vain() -> None:
    budget = MemoryBudget({HOST: 100, GPU: 100})
    for owner, need, evictable, required in (
        ("host-only", {HOST: 50}, True, False),
        ("kept", {GPU: 10}, False, False),
        ("required", {GPU: 10}, True, True),
        ("busy", {GPU: 10}, True, False),
        ("old-small", {GPU: 10}, True, False),
        ("new-large", {GPU: 50}, True, False),
    ):
        assert isinstance(budget.reserve(owner, Need(need), evictable=evictable, required=required), Reserved)
    for second, owner in enumerate(("host-only", "kept", "required", "busy", "old-small", "new-large")):
        budget.used(owner, float(second), in_use=owner == "busy")
    assert budget.reserve("wanted", Need({GPU: 20})) == Evict(("old-small",))
    assert budget.reserve("wanted", Need({GPU: 40})) == Evict(("new-large",))
    assert budget.reserve("wanted", Need({GPU: 70})) == Evict(("old-small", "new-large"))
    assert isinstance(budget.reserve("wanted", Need({GPU: 80})), Refused)


def test_a_measured_peak_counts_before_the_rule() -> None:
    assert estimate(device=GPU, file_bytes=100, measured={HOST: 1000, GPU: 500}).bytes_by_device == {
        HOST: 1100,
        GPU: 550,
    }
    ruled = estimate(device=GPU, file_bytes=100, instances=2).bytes_by_device
    assert ruled == {HOST: 2 * WORKER_BYTES, GPU: 400}
    assert estimate(device=HOST, file_bytes=100).bytes_by_device[HOST] > 200


def test_a_device_that_is_not_counted_refuses_nothing_and_a_second_reservation_is_a_bug() -> None:
    budget = MemoryBudget({HOST: 10})
    assert budget.reserve("a", Need({GPU: 1 << 40})) == Reserved("a")
    with pytest.raises(ValueError, match="has a reservation"):
        budget.reserve("a", Need({}))


class Ledger(RuleBasedStateMachine):
    """A plain dictionary beside it says the same."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = MemoryBudget({HOST: 100, GPU: 100})
        self.model: dict[str, dict[str, int]] = {}
        self.protected: set[str] = set()
        self.busy: set[str] = set()

    @rule(owner=OWNERS, host=SIZES, gpu=SIZES, evictable=st.booleans(), required=st.booleans())
    def reserve(self, owner: str, host: int, gpu: int, evictable: bool, required: bool) -> None:
        if owner in self.model:
            return
        need = {HOST: host, GPU: gpu}
        room = all(self.budget.free(device) >= nbytes or not nbytes for device, nbytes in need.items())
        fits = all(sum(held[device] for held in self.model.values()) + nbytes <= 100 for device, nbytes in need.items())
        match self.budget.reserve(owner, Need(need), evictable=evictable, required=required):
            case Reserved():
                assert fits
                assert room
                self.model[owner] = need
                if required or not evictable:
                    self.protected.add(owner)
            case Evict(owners):
                assert not fits
                assert owners
                assert not set(owners) & (self.protected | self.busy)
                for gone in owners:
                    self.release(gone)
                again = self.budget.reserve(owner, Need(need))
                assert again == Reserved(owner)
                self.model[owner] = need
                self.protected.add(owner)
            case Refused(message):
                assert not fits
                assert "free" in message

    @rule(owner=OWNERS, host=st.integers(-5, 120))
    def correct(self, owner: str, host: int) -> None:
        self.budget.correct(owner, {HOST: host})
        if owner in self.model:
            self.model[owner] = {**self.model[owner], HOST: max(0, host)}

    @rule(owner=OWNERS, now=st.floats(0, 100), in_use=st.booleans())
    def used(self, owner: str, now: float, in_use: bool) -> None:
        self.budget.used(owner, now, in_use=in_use)
        if owner in self.model:
            (self.busy.add if in_use else self.busy.discard)(owner)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        self.budget.release(owner)
        self.budget.release(owner)
        self.model.pop(owner, None)
        self.protected.discard(owner)
        self.busy.discard(owner)

    @invariant()
    def the_books_agree(self) -> None:
        for device in (HOST, GPU):
            assert self.budget.booked(device) == sum(held[device] for held in self.model.values())
            assert self.budget.free(device) >= 0
        assert {held.owner for held in self.budget.held} == set(self.model)


TestLedger = Ledger.TestCase
