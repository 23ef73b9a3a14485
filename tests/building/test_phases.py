"""The percentage of nested phases: it never falls, whatever is announced, and ends at 100."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.building.phases import Phases

NAMES = st.sampled_from("abcd")
EVENTS = st.one_of(
    st.tuples(st.just("start"), NAMES, st.none() | NAMES, st.integers(0, 9)),
    st.tuples(st.just("step"), NAMES, st.none(), st.integers(0, 20)),
    st.tuples(st.just("finish"), NAMES, st.none(), st.just(0)),
)


def test_a_phase_within_a_step_counts_for_that_step() -> None:
    phases = Phases()
    phases.start("all", None, 4)
    assert phases.step("all", 0) == 25
    phases.start("inner", "all", 5)
    assert phases.step("inner", 0) == 30
    assert phases.step("inner", 4) == 50
    phases.finish("inner")
    assert phases.step("all", 1) == 50
    assert phases.finish("all") == 100


@given(st.lists(EVENTS))
def test_it_never_falls_and_stays_within_bounds(events: list[tuple[str, str, str | None, int]]) -> None:
    phases, last = Phases(), 0.0
    for kind, name, parent, number in events:
        if kind == "start":
            now = phases.start(name, parent, number)
        else:
            now = phases.step(name, number) if kind == "step" else phases.finish(name)
        assert last <= now <= 100
        last = now
