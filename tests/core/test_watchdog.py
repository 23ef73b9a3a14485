"""When the whole appliance begins anew: never while anything moves, always when nothing does for longer than it may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.core.watchdog import Pulse, Watchdog

LIMIT_S = 10.0


def pulse(model: str = "m:1", *, workers: int = 1, waiting: int = 1, ended: int = 0, patience_s: float = 1.0) -> Pulse:
    return Pulse(model, workers, waiting, ended, patience_s)


def test_a_model_that_answers_nobody_for_longer_than_the_limit_is_the_reason() -> None:
    watchdog = Watchdog(LIMIT_S)
    assert watchdog.look(0.0, [pulse(waiting=3)]) == ""
    assert watchdog.look(LIMIT_S, [pulse(waiting=3)]) == ""
    said = watchdog.look(LIMIT_S + 1, [pulse(waiting=3)])
    assert said == "model m:1 is READY and has answered nobody for 11 s (3 requests waiting)"


def test_a_ready_model_without_a_worker_is_one_even_if_nobody_asks() -> None:
    watchdog = Watchdog(LIMIT_S)
    watchdog.look(0.0, [pulse(workers=0, waiting=0)])
    assert "(no worker)" in watchdog.look(LIMIT_S + 1, [pulse(workers=0, waiting=0)])


def test_a_model_whose_own_budgets_are_longer_than_the_limit_has_that_long() -> None:
    watchdog = Watchdog(LIMIT_S)
    slow = pulse(patience_s=100.0)
    assert [watchdog.look(now, [slow]) for now in (0.0, 50.0, 100.0)] == ["", "", ""]
    assert watchdog.look(101.0, [slow])


def test_time_counts_from_the_last_answer_and_not_from_the_first_question() -> None:
    watchdog = Watchdog(LIMIT_S)
    watchdog.look(0.0, [pulse(ended=0)])
    watchdog.look(9.0, [pulse(ended=1)])
    assert watchdog.look(18.0, [pulse(ended=1)]) == ""
    assert watchdog.look(20.0, [pulse(ended=1)])


def test_a_model_that_was_away_begins_anew() -> None:
    watchdog = Watchdog(LIMIT_S)
    watchdog.look(0.0, [pulse()])
    watchdog.look(5.0, [])
    assert watchdog.look(30.0, [pulse()]) == ""


def test_counters_that_begin_again_are_an_answer() -> None:
    """A version is replaced by one of the same name: its count is smaller, and it is not the one that hung."""
    watchdog = Watchdog(LIMIT_S)
    watchdog.look(0.0, [pulse(ended=100)])
    watchdog.look(9.0, [pulse(ended=0)])
    assert watchdog.look(12.0, [pulse(ended=0)]) == ""


STEPS = st.lists(
    st.tuples(
        st.floats(0.1, 20.0),  # seconds since the last look
        st.integers(0, 2),  # workers
        st.integers(0, 2),  # waiting
        st.integers(0, 1),  # answered since
    ),
    max_size=60,
)


@given(STEPS)
def test_it_speaks_exactly_when_nothing_has_moved_for_longer_than_the_limit(
    steps: list[tuple[float, int, int, int]],
) -> None:
    """Against the plainest statement of the rule: look back over all that was seen."""
    watchdog = Watchdog(LIMIT_S)
    now, ended = 0.0, 0
    history: list[tuple[float, bool]] = []  # when, and whether all was well then
    for seconds, workers, waiting, answered in steps:
        now += seconds
        ended += answered
        idle = workers > 0 and waiting == 0
        history.append((now, idle or answered > 0 or not history))
        said = watchdog.look(now, [pulse(workers=workers, waiting=waiting, ended=ended)])
        well = max(when for when, good in history if good)
        assert bool(said) is (now - well > LIMIT_S)


@given(STEPS, STEPS)
def test_models_do_not_excuse_and_do_not_accuse_each_other(
    first: list[tuple[float, int, int, int]], second: list[tuple[float, int, int, int]]
) -> None:
    together, alone = Watchdog(LIMIT_S), [Watchdog(LIMIT_S), Watchdog(LIMIT_S)]
    now, ended = 0.0, [0, 0]
    for one, two in zip(first, second, strict=False):
        now += one[0]
        pulses = []
        for index, (_, workers, waiting, answered) in enumerate((one, two)):
            ended[index] += answered
            pulses.append(pulse(f"m{index}:1", workers=workers, waiting=waiting, ended=ended[index]))
        said = together.look(now, pulses)
        apart = [watchdog.look(now, [single]) for watchdog, single in zip(alone, pulses, strict=True)]
        assert said == next((reason for reason in apart if reason), "")


@given(st.lists(st.floats(0.1, 100.0), max_size=30), st.floats(1.0, 1000.0))
def test_a_model_that_answers_between_any_two_looks_is_never_the_reason(gaps: list[float], limit_s: float) -> None:
    watchdog = Watchdog(limit_s)
    now = 0.0
    for number, gap in enumerate(gaps):
        now += gap
        assert watchdog.look(now, [pulse(ended=number, waiting=50)]) == ""
