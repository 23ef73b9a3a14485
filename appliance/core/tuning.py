"""Choosing the settings that run a model best on one box: what to try, what to measure next, and what may be believed.

Values in, decisions out; no clock and no process. `cli.tune` measures what is asked for here and says how long it took.

A search in three stages, all of them in rounds: each round measures the present settings and a few others, one right after the
other, and only ratios within a round count, since a machine is faster now and slower then.
1. Screening: each change alone, once, the most promising first.
2. Combining: the changes that helped, together.
3. Finals: the best few against the present settings, round after round; after every third the worst leaves. What is chosen
   rests on these rounds alone: the winner of many single measurements owes some of its lead to luck.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from appliance.core.manifest import ModelManifest

Goal: TypeAlias = Literal["throughput", "latency"]
Setting: TypeAlias = str | int | bool
Stage: TypeAlias = Literal["defaults", "screening", "combining", "finals"]

MIN_GAIN = 0.03
"""Less is not worth a change of a file."""
MAX_LOSS = 0.03
"""What a choice may lose at one of the loads while it gains over all of them; it is about what one cannot tell from nothing."""

MIN_FINALS, MAX_FINALS = 5, 12
"""Rounds. Five, with a bound that must lie above no gain at all: one settings in twenty of equal speed would pass."""
FINALISTS = 3
HALVING_EVERY = 3
SCREENED_TOGETHER = 3
FINALS_SHARE = 0.5
"""Of the budget, kept for the finals."""
HELPFUL = 1.01
SCREENING_LOSS = 0.15
"""A single measurement that is worse than this at one load does not go on."""
SCREENING_SLACK = 1.25
"""The latency limit may be missed by so much in a single measurement."""

WINDOW_S = (0.3, 2.5)
"""Shortest and longest measurement at one load."""

T_95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.80)
"""Student's t, one-sided 95 %, for 1, 2, … degrees of freedom."""


class Candidate(msgspec.Struct, frozen=True):
    """What would be different from the present model.toml: (dotted key, value), sorted by key. Nothing: the present settings."""

    changes: tuple[tuple[str, Setting], ...] = ()

    @property
    def name(self) -> str:
        """For people: "2 × 1 thread, int8"."""
        if not self.changes:
            return "as it is"
        left = dict(self.changes)
        words = [str(left.pop(key)) for key in ("engine", "device", "precision") if key in left]
        if THREADS in left and INSTANCES in left:
            instances, threads = left.pop(INSTANCES), left.pop(THREADS)
            words.append(f"{instances} × {threads} thread{'s' if threads != 1 else ''}")
        return ", ".join(words + [f"{key.rpartition('.')[2]} {_word(value)}" for key, value in left.items()])


INSTANCES, THREADS = "worker.instances", "onnxruntime.intra_op_threads"
DEFAULT = Candidate()


def _word(value: Setting) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Facts(msgspec.Struct, frozen=True):
    """What this box and this model allow.

    `threads` and `max_rows` are what the present settings come to (`max_rows` 1: unbatched). `precisions` can be built and passed
    their verification. `places` are (device, engine) beside the present one. `rows` is the most that clients send in a request:
    no smaller batch is tried. `burning`: settings that burn CPU while they wait may be tried.
    """

    cores: int
    threads: int = 1
    max_rows: int = 1
    precisions: tuple[str, ...] = ()
    places: tuple[tuple[str, str], ...] = ()
    rows: int = 1
    largest_load: int = 1
    burning: bool = False


class Point(msgspec.Struct, frozen=True):
    """What was measured at one load: answers per second, and latencies in ms (`tail_ms` at the percentile asked for)."""

    concurrency: int
    items_s: float
    p50_ms: float
    tail_ms: float


Points: TypeAlias = tuple[Point, ...]
"""One for each load, in the same order everywhere."""


class Wanted(msgspec.Struct, frozen=True):
    """What is aimed at. `limit_ms` bounds the tail latency at every load; 0: no limit."""

    goal: Goal = "throughput"
    limit_ms: float = 0.0


class Round(msgspec.Struct, frozen=True):
    """What to measure next, in this order, each load for `seconds`."""

    stage: Stage
    entries: tuple[Candidate, ...]
    seconds: float


class Verify(msgspec.Struct, frozen=True):
    """Verify these before the finals, and tell `Tuner.verified`."""

    candidates: tuple[Candidate, ...]


class Trial(msgspec.Struct):
    """All that is known of one candidate. `rounds` have the number of the round; `failure` says why it is out for good."""

    candidate: Candidate
    rounds: dict[int, Points] = {}
    finals: set[int] = set()
    verified: bool | None = None
    failure: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """A candidate beside the present settings: the ratio by the goal (above 1: better), its lower bound, the worst load's."""

    ratio: float
    low: float
    worst: float
    rounds: int
    tail_ms: float


class Choice(msgspec.Struct, frozen=True):
    """What to use, and why in a sentence. `within` false: nothing keeps the latency limit, `candidate` comes nearest."""

    candidate: Candidate
    reason: str
    within: bool = True


class TooShortError(Exception):
    """The budget does not suffice; `needed_s` would, for the least that can be said with confidence."""

    def __init__(self, needed_s: float) -> None:
        super().__init__(f"{needed_s:.0f} s are needed")
        self.needed_s = needed_s


# --- what to try ----------------------------------------------------------------------------------------------------------------


def screened(manifest: ModelManifest, facts: Facts) -> list[Candidate]:
    """Every change alone, the most promising first; none that would change nothing."""
    factors = [_precisions(manifest, facts), _places(manifest, facts), _placements(manifest, facts)]
    if manifest.device == "cpu" and manifest.engine in ("", "onnxruntime"):
        levels = [level for level in ("extended", "basic") if level != manifest.onnxruntime.graph_optimization]
        factors.append([{"onnxruntime.graph_optimization": level} for level in levels])
        if facts.burning and not manifest.onnxruntime.spinning:
            factors.append([{"onnxruntime.spinning": True}])
    elif manifest.engine in ("", "tensorrt"):
        factors.append(
            [{"build.optimization_level": level} for level in (5,) if level != manifest.build.optimization_level]
        )
    factors.append(_batches(manifest, facts))
    polls = (0, 2000) if facts.burning else (0,)
    factors.append([{"worker.busy_poll_us": us} for us in polls if us != manifest.worker.busy_poll_us])
    return [Candidate(tuple(sorted(changes.items()))) for changes in _by_rank(factors)]


def _by_rank(factors: Iterable[Sequence[Mapping[str, Setting]]]) -> list[Mapping[str, Setting]]:
    """The first of each factor, then the second of each, …: where time runs out, every factor has had its turn."""
    lists = [list(factor) for factor in factors]
    return [found[rank] for rank in range(max(map(len, lists), default=0)) for found in lists if rank < len(found)]


def _precisions(manifest: ModelManifest, facts: Facts) -> list[Mapping[str, Setting]]:
    return [{"precision": precision} for precision in facts.precisions if precision != manifest.precision]


def _places(manifest: ModelManifest, facts: Facts) -> list[Mapping[str, Setting]]:
    now = (manifest.device, manifest.engine)
    return [{"device": device, "engine": engine} for device, engine in facts.places if (device, engine) != now]


def _placements(manifest: ModelManifest, facts: Facts) -> list[Mapping[str, Setting]]:
    """Instances and threads: every power of two of instances that the cores carry, each with one thread or its share of them."""
    now = (manifest.worker.instances, facts.threads)
    pairs = []
    instances = 1
    while instances <= facts.cores:
        pairs += [(instances, max(1, facts.cores // instances)), (instances, 1)]
        instances *= 2
    # the widest first: between one worker with all threads and one thread for each worker lies the rest
    ordered = sorted(set(pairs), key=lambda pair: (-pair[0] * pair[1], -pair[0]))
    return [{INSTANCES: count, THREADS: threads} for count, threads in ordered if (count, threads) != now]


def _batches(manifest: ModelManifest, facts: Facts) -> list[Mapping[str, Setting]]:
    """Batch sizes that can matter at these loads and refuse no request that is answered now, and batches of any size."""
    if facts.max_rows == 1:
        return []
    found: list[Mapping[str, Setting]] = []
    if manifest.batching.only_paying_sizes:
        found.append({"batching.only_paying_sizes": False})
    sizes = [size for size in (64, 8, 4, 16, 32, 1, 128) if facts.rows <= size < 2 * facts.largest_load]
    return found + [{"batching.max_batch_size": size} for size in sizes if size != facts.max_rows]


def combined(scores: Mapping[Candidate, float]) -> list[Candidate]:
    """The changes that helped alone, together: the best two, three, … that do not contradict each other."""
    merged: dict[str, Setting] = {}
    found = []
    for candidate, score in sorted(scores.items(), key=lambda item: -item[1]):
        if score < HELPFUL or any(key in merged for key, _ in candidate.changes):
            continue
        merged |= dict(candidate.changes)
        together = Candidate(tuple(sorted(merged.items())))
        if together not in scores:
            found.append(together)
    return found[:SCREENED_TOGETHER]


# --- what may be believed -------------------------------------------------------------------------------------------------------


def ratios(points: Points, beside: Points, goal: Goal) -> list[float]:
    """How much better than `beside`, load by load (above 1: better)."""
    if goal == "latency":
        return [there.tail_ms / here.tail_ms for here, there in zip(points, beside, strict=True)]
    return [here.items_s / there.items_s for here, there in zip(points, beside, strict=True)]


def judge(trial: Trial, beside: Trial, goal: Goal, *, finals_only: bool) -> Verdict:
    """The trial beside the present settings, over the rounds that measured both. NaN where there is none."""
    numbers = sorted(trial.rounds.keys() & beside.rounds.keys())
    if finals_only:
        numbers = [number for number in numbers if number in trial.finals]
    if not numbers:
        return Verdict(math.nan, 0.0, math.nan, 0, math.nan)
    found = [ratios(trial.rounds[number], beside.rounds[number], goal) for number in numbers]
    logs = [statistics.fmean(math.log(ratio) for ratio in ratios_) for ratios_ in found]
    middle = statistics.fmean(logs)
    spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    low = math.exp(middle - T_95[min(len(logs) - 1, len(T_95)) - 1] * spread) if len(logs) > 1 else 0.0
    worst = min(statistics.median(column) for column in zip(*found, strict=True))
    return Verdict(math.exp(middle), low, worst, len(numbers), tail_ms(trial, numbers))


def tail_ms(trial: Trial, numbers: Iterable[int]) -> float:
    """The tail latency at the load where it is largest; at each load the median over these rounds."""
    rounds = [trial.rounds[number] for number in numbers]
    if not rounds:
        return math.nan
    columns: Iterable[Points] = zip(*rounds, strict=True)
    return max(statistics.median([point.tail_ms for point in column]) for column in columns)


def medians(trial: Trial) -> Points:
    """Its points over all its rounds (only the finals, if it came that far)."""
    rounds = [trial.rounds[number] for number in trial.finals or trial.rounds]
    columns: Iterable[Points] = zip(*rounds, strict=True)
    return tuple(
        Point(
            column[0].concurrency,
            statistics.median([point.items_s for point in column]),
            statistics.median([point.p50_ms for point in column]),
            statistics.median([point.tail_ms for point in column]),
        )
        for column in columns
    )


def is_better(verdict: Verdict) -> bool:
    """Better by more than chance and by enough to matter, and at no load worse."""
    return (
        verdict.rounds >= MIN_FINALS
        and verdict.low > 1.0
        and verdict.ratio >= 1.0 + MIN_GAIN
        and verdict.worst >= 1.0 - MAX_LOSS
    )


def choose(trials: Iterable[Trial], wanted: Wanted) -> Choice:
    """The best that passed its verification, keeps the limit and is surely better than the present settings; else those."""
    known = {trial.candidate: trial for trial in trials}
    beside = known[DEFAULT]
    verdicts = {
        candidate: judge(trial, beside, wanted.goal, finals_only=True)
        for candidate, trial in known.items()
        if candidate != DEFAULT and not trial.failure and trial.verified
    }
    verdicts = {candidate: verdict for candidate, verdict in verdicts.items() if verdict.rounds >= MIN_FINALS}
    now_ms = tail_ms(beside, beside.finals or beside.rounds)
    if wanted.limit_ms:
        within = {candidate: verdict for candidate, verdict in verdicts.items() if verdict.tail_ms <= wanted.limit_ms}
        if now_ms > wanted.limit_ms:
            return _rescue(within, verdicts, now_ms, wanted.limit_ms)
        verdicts = within
    better = {candidate: verdict for candidate, verdict in verdicts.items() if is_better(verdict)}
    if not better:
        return Choice(DEFAULT, "nothing was better than the present settings by more than the noise")
    best = max(better, key=lambda candidate: better[candidate].ratio)
    found = better[best]
    return Choice(
        best, f"{found.ratio:.2f} × the present settings over {found.rounds} rounds, at least {found.low:.2f} ×"
    )


def _rescue(
    within: Mapping[Candidate, Verdict], every: Mapping[Candidate, Verdict], now_ms: float, limit_ms: float
) -> Choice:
    """The present settings miss the limit: the fastest that keeps it, even if it is slower, or the nearest of all."""
    if within:
        best = max(within, key=lambda candidate: within[candidate].ratio)
        return Choice(
            best,
            f"the present settings take {now_ms:.3g} ms, the limit is {limit_ms:g}; this takes {within[best].tail_ms:.3g}",
        )
    tails = {DEFAULT: now_ms} | {candidate: verdict.tail_ms for candidate, verdict in every.items()}
    nearest = min(tails, key=lambda candidate: tails[candidate])
    return Choice(
        nearest,
        f"nothing keeps the limit of {limit_ms:g} ms; the nearest, {nearest.name}, takes {tails[nearest]:.3g} ms",
        within=False,
    )


def _within_window(seconds: float) -> float:
    return min(WINDOW_S[1], max(WINDOW_S[0], seconds))


# --- what to measure next -------------------------------------------------------------------------------------------------------


class Tuner:
    """Asks for rounds until it can choose or the budget is spent. `next_round` and `record` take turns.

    The first round has the present settings alone: its cost tells what the budget can buy, and what runs tells what there is to
    try, which `screen` is given then. Before the finals those that reached them are verified; those that fail leave.
    """

    def __init__(self, wanted: Wanted, loads: int, budget_s: float) -> None:
        self.trials = {DEFAULT: Trial(DEFAULT, verified=True)}
        self.finalists: tuple[Candidate, ...] = ()
        self.unmeasured: list[Candidate] = []
        self.goal = wanted.goal
        self._wanted = wanted
        self._loads = loads
        self._budget_s = budget_s
        self._queue: list[Candidate] = []
        self._number = 0
        self._stage: Stage = "defaults"
        self._window_s = WINDOW_S[0]
        self._start_s = 0.0
        self._overhead_s = 0.0
        self._finals = 0
        self._verifying = False

    def screen(self, candidates: Sequence[Candidate], left_s: float) -> None:
        """What to try, after the first round. What the finals do not need of the time left is spread over it.

        TooShortError if that is less than the finals of a single candidate take.
        """
        least_s = 2 * self._run_s() + self._start_s + 2 * MIN_FINALS * self._run_s()
        if least_s > left_s:
            raise TooShortError(self._budget_s - left_s + least_s)
        self._queue = list(candidates)
        groups = -(-len(candidates) // SCREENED_TOGETHER) + 1
        runs = len(candidates) + groups + SCREENED_TOGETHER
        share_s = (left_s - self._finals_s(left_s) - self._start_s * runs) / runs / self._loads
        self._window_s = _within_window(share_s - self._overhead_s)
        self._stage = "screening"

    def next_round(self, left_s: float) -> Round | Verify | None:
        """What to do with so much of the budget left; None: choose."""
        if self._stage == "defaults":
            return Round("defaults", (DEFAULT,), self._window_s)
        while self._stage in ("screening", "combining"):
            fits = int((left_s - self._finals_s(left_s) - self._run_s()) / (self._run_s() + self._start_s))
            group = self._queue[: max(0, min(SCREENED_TOGETHER, fits))]
            if group:
                self._queue = self._queue[len(group) :]
                return Round(self._stage, (DEFAULT, *group), self._window_s)
            self.unmeasured += self._queue
            self._queue = []
            self._advance()
        if not self.finalists or self._finals >= MAX_FINALS:
            return None
        if not self._verifying:
            self._verifying = True
            return Verify(self.finalists)
        if self._finals < MIN_FINALS:
            # planned anew each time: where others take part of the machine, a round takes longer than the first one did
            runs = (MIN_FINALS - self._finals) * (1 + len(self.finalists))
            self._window_s = _within_window(left_s / runs / self._loads * 0.8 - self._overhead_s)
        if left_s < self._run_s() * (1 + len(self.finalists)):
            return None
        order = (DEFAULT, *self.finalists)
        turn = self._finals % len(order)
        return Round("finals", order[turn:] + order[:turn], self._window_s)

    def _finals_s(self, left_s: float) -> float:
        """What is kept for the finals: half of the budget, and never less than one candidate needs, as far as it is there."""
        return min(left_s, max(self._budget_s * FINALS_SHARE, 2 * MIN_FINALS * self._run_s()))

    def _advance(self) -> None:
        if self._stage == "screening":
            self._stage = "combining"
            self._queue = combined(self._scores())
            return
        self._stage = "finals"
        scores = self._scores()
        self.finalists = tuple(sorted(scores, key=lambda candidate: -scores[candidate])[:FINALISTS])

    def _scores(self) -> dict[Candidate, float]:
        """By the goal, of those that may go on: nearly within the limit, and at no load much worse."""
        beside, found = self.trials[DEFAULT], {}
        rescue = self._wanted.limit_ms and tail_ms(beside, beside.rounds) > self._wanted.limit_ms
        for candidate, trial in self.trials.items():
            verdict = judge(trial, beside, self._wanted.goal, finals_only=False)
            if candidate == DEFAULT or trial.failure or not verdict.rounds:
                continue
            if rescue:
                found[candidate] = tail_ms(beside, beside.rounds) / verdict.tail_ms
            elif verdict.worst >= 1 - SCREENING_LOSS and (
                not self._wanted.limit_ms or verdict.tail_ms <= self._wanted.limit_ms * SCREENING_SLACK
            ):
                found[candidate] = verdict.ratio
        return found

    def _run_s(self) -> float:
        """One candidate, once."""
        return self._loads * (self._window_s + self._overhead_s)

    def record(self, found: Mapping[Candidate, Points | str], seconds: float, *, starting_s: float = 0.0) -> None:
        """What came of the last round, and how long it took, of which `starting_s` to start what was new.

        A text instead of points says why a candidate cannot be measured: it is out for good.
        """
        self._number += 1
        for candidate, points in found.items():
            trial = self.trials.setdefault(candidate, Trial(candidate))
            if isinstance(points, str):
                trial.failure = points
                self.finalists = tuple(other for other in self.finalists if other != candidate)
                continue
            trial.rounds[self._number] = points
            if self._stage == "finals":
                trial.finals.add(self._number)
        if self._stage == "defaults":
            self._start_s = starting_s
            self._overhead_s = max(0.0, (seconds - starting_s) / self._loads - self._window_s)
        elif self._stage == "finals":
            self._finals += 1
            self._overhead_s = max(0.0, seconds / len(found) / self._loads - self._window_s)
            self._halve()

    def verified(self, candidate: Candidate, passed: bool, reason: str = "") -> None:
        """What the verification of a finalist found; one that failed leaves."""
        trial = self.trials.setdefault(candidate, Trial(candidate))
        trial.verified = passed
        if not passed:
            trial.failure = reason or "it failed its verification"
            self.finalists = tuple(other for other in self.finalists if other != candidate)

    def _halve(self) -> None:
        """After every third round the worst leaves, so that the time goes to those that may win."""
        if self._finals % HALVING_EVERY or len(self.finalists) < 2:
            return
        beside = self.trials[DEFAULT]
        scores = {
            candidate: judge(self.trials[candidate], beside, self._wanted.goal, finals_only=True).ratio
            for candidate in self.finalists
        }
        worst = min(self.finalists, key=lambda candidate: scores[candidate])
        self.finalists = tuple(candidate for candidate in self.finalists if candidate != worst)

    def choice(self) -> Choice:
        """What the finals say."""
        return choose(self.trials.values(), self._wanted)
