"""The search for settings, on boxes that are made up: what it tries, what it asks for, what it believes."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.manifest import ModelManifest, WorkerManifest
from appliance.core.tuning import (
    DEFAULT,
    MAX_LOSS,
    Candidate,
    Choice,
    Facts,
    Point,
    Points,
    Round,
    TooShortError,
    Trial,
    Tuner,
    Verify,
    Wanted,
    choose,
    combined,
    screened,
)

A, B, C = (
    Candidate(((key, 1),)) for key in ("worker.busy_poll_us", "worker.instances", "onnxruntime.intra_op_threads")
)
LOADS = (1, 16)


class Box:
    """A machine where every candidate has a true speed, load by load, and every measurement is off by up to `noise`."""

    def __init__(self, speeds: dict[Candidate, tuple[float, float]], noise: float = 0.0, seed: int = 1) -> None:
        self.speeds = speeds
        self.bad: set[Candidate] = set()
        self.broken: set[Candidate] = set()
        self.clock = 0.0
        self.rounds: list[Round] = []
        self._noise = noise
        self._random = random.Random(seed)

    def speed(self, candidate: Candidate) -> tuple[float, float]:
        if candidate in self.speeds:
            return self.speeds[candidate]
        parts = [self.speeds.get(Candidate((change,)), (1.0, 1.0)) for change in candidate.changes]
        return math.prod(part[0] for part in parts), math.prod(part[1] for part in parts)

    def points(self, candidate: Candidate) -> Points:
        found = []
        for load, speed in zip(LOADS, self.speed(candidate), strict=True):
            items_s = 1000 * speed * (1 + self._random.uniform(-self._noise, self._noise))
            found.append(Point(load, items_s, 1000 * load / items_s, 2000 * load / items_s))
        return tuple(found)

    def tune(self, tuner: Tuner, candidates: list[Candidate], budget_s: float) -> Choice:
        while (step := tuner.next_round(budget_s - self.clock)) is not None:
            if isinstance(step, Verify):
                for candidate in step.candidates:
                    tuner.verified(candidate, candidate not in self.bad)
                continue
            self.rounds.append(step)
            begun = self.clock
            found: dict[Candidate, Points | str] = {}
            for candidate in step.entries:
                self.clock += len(LOADS) * (step.seconds + 0.4) + (1.0 if step.stage != "finals" else 0.0)
                found[candidate] = "it crashed" if candidate in self.broken else self.points(candidate)
            tuner.record(found, self.clock - begun, starting_s=1.0 if step.stage == "defaults" else 0.0)
            if step.stage == "defaults":
                tuner.screen(candidates, budget_s - self.clock)
        return tuner.choice()


def tune(
    box: Box, *, wanted: Wanted | None = None, budget_s: float = 300.0, tried: tuple[Candidate, ...] = (A, B, C)
) -> Choice:
    return box.tune(Tuner(wanted or Wanted(), len(LOADS), budget_s), list(tried), budget_s)


def test_what_is_better_at_every_load_is_chosen() -> None:
    assert tune(Box({A: (1.2, 1.2), B: (1.0, 1.0)})).candidate == A


def test_what_helps_alone_is_tried_together() -> None:
    together = Candidate(tuple(sorted(A.changes + B.changes)))
    assert tune(Box({A: (1.2, 1.2), B: (1.1, 1.1)})).candidate == together


def test_a_gain_at_one_load_does_not_pay_for_a_loss_at_another() -> None:
    assert tune(Box({A: (0.9, 2.0)})).candidate == DEFAULT


def test_what_fails_its_verification_or_crashes_is_never_chosen() -> None:
    box = Box({A: (2.0, 2.0), B: (1.5, 1.5), C: (1.2, 1.2)})
    box.bad = {A, Candidate(tuple(sorted(A.changes + B.changes)))}
    box.broken = {C}
    chosen = tune(box).candidate
    assert chosen == B or (chosen not in box.bad | box.broken and len(chosen.changes) > 1)
    box = Box({A: (2.0, 2.0)})
    box.bad = {A}
    assert tune(box, tried=(A,)).candidate == DEFAULT


def test_a_latency_limit_bounds_the_choice() -> None:
    # at 16 in flight the tail takes 32 ms at the speed 1
    assert tune(Box({}), wanted=Wanted(limit_ms=40)).candidate == DEFAULT
    rescued = tune(Box({A: (1.0, 2.0)}), wanted=Wanted(limit_ms=20), tried=(A,))
    assert (rescued.candidate, rescued.within) == (A, True)
    nothing = tune(Box({A: (1.0, 1.2)}), wanted=Wanted(limit_ms=5), tried=(A,))
    assert not nothing.within
    assert "the nearest" in nothing.reason
    assert nothing.candidate == A


def test_too_small_a_budget_says_how_much_would_do() -> None:
    with pytest.raises(TooShortError) as caught:
        tune(Box({}), budget_s=5)
    tune(Box({}), budget_s=caught.value.needed_s + 1)


@settings(max_examples=60, deadline=None)
@given(
    speeds=st.lists(st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)), min_size=3, max_size=3),
    noise=st.floats(0.0, 0.15),
    seed=st.integers(0, 10_000),
    budget_s=st.floats(40, 600),
    limit=st.sampled_from([0.0, 10.0, 40.0]),
)
def test_the_choice_is_never_worse_keeps_the_limit_and_the_budget(
    speeds: list[tuple[float, float]], noise: float, seed: int, budget_s: float, limit: float
) -> None:
    box = Box(dict(zip((A, B, C), speeds, strict=True)), noise, seed)
    box.bad = {B}
    choice = tune(box, wanted=Wanted(limit_ms=limit), budget_s=budget_s)
    assert choice.candidate not in box.bad
    assert box.clock <= budget_s
    again = Box(dict(zip((A, B, C), speeds, strict=True)), noise, seed)
    again.bad = {B}
    assert tune(again, wanted=Wanted(limit_ms=limit), budget_s=budget_s) == choice
    if choice.candidate == DEFAULT or not choice.within:
        return
    speed = box.speed(choice.candidate)
    if limit and choice.reason.startswith("the present settings take"):
        assert max(2 / speed[0], 32 / speed[1]) <= limit * (1 + 2 * noise)
        return
    # measured five times at least with that noise, the median is off by less than twice of it
    assert min(speed) >= (1 - MAX_LOSS) * (1 - 2 * noise)
    assert math.sqrt(speed[0] * speed[1]) >= 1 - noise


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.01, 0.1))
def test_settings_of_the_same_speed_are_hardly_ever_chosen_over_the_present_ones(seed: int, noise: float) -> None:
    choice = tune(Box({}, noise, seed))
    # by luck it may be, but never with much to show for it
    assert choice.candidate == DEFAULT or float(choice.reason.split()[0]) < 1 + noise


def test_every_round_measures_the_present_settings_and_the_finals_take_turns() -> None:
    box = Box({A: (1.2, 1.2)}, 0.02)
    tune(box)
    assert all(DEFAULT in step.entries for step in box.rounds)
    firsts = {step.entries[0] for step in box.rounds if step.stage == "finals"}
    assert len(firsts) > 1


@given(
    cores=st.integers(1, 64),
    instances=st.integers(1, 8),
    max_rows=st.sampled_from([1, 8, 32]),
    rows=st.sampled_from([1, 8, 32]),
    load=st.integers(1, 64),
)
def test_what_is_tried_changes_something_and_fits_the_box(
    cores: int, instances: int, max_rows: int, rows: int, load: int
) -> None:
    manifest = ModelManifest(worker=WorkerManifest(instances=instances))
    facts = Facts(cores, 1, max_rows, ("int8",), (), rows, load)
    tried = screened(manifest, facts)
    assert len(set(tried)) == len(tried)
    for candidate in tried:
        changes = dict(candidate.changes)
        assert changes
        assert changes.get("worker.instances", 1) <= cores
        assert changes.get("batching.max_batch_size", rows) >= min(rows, max_rows)
        assert (changes.get("worker.instances"), changes.get("onnxruntime.intra_op_threads")) != (instances, 1)
        assert "onnxruntime.spinning" not in changes


def test_what_contradicts_itself_is_not_combined() -> None:
    one, other = (Candidate((("worker.busy_poll_us", value),)) for value in (0, 2000))
    assert combined({one: 1.2, other: 1.1}) == []
    assert combined({one: 1.2, B: 0.9}) == []


def _trial(candidate: Candidate, speeds: list[float], *, verified: bool | None = True) -> Trial:
    rounds = {number: (Point(1, 100 * speed, 1.0, 1.0),) for number, speed in enumerate(speeds)}
    return Trial(candidate, rounds, set(rounds), verified)


@pytest.mark.parametrize(
    ("speeds", "verified", "chosen"),
    [
        ([1.2] * 5, True, True),
        ([1.2] * 5, None, False),
        ([1.2] * 5, False, False),
        ([1.2] * 4, True, False),
        ([1.02] * 5, True, False),
        ([3.0, 0.9, 0.9, 1.1, 1.0], True, False),
    ],
)
def test_only_what_is_verified_and_surely_better_is_chosen(
    speeds: list[float], verified: bool | None, chosen: bool
) -> None:
    trials = [_trial(DEFAULT, [1.0] * 5), _trial(A, speeds, verified=verified)]
    assert (choose(trials, Wanted()).candidate == A) is chosen
