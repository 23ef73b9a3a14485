"""How hot this box is, and what it should leave undone: samples in, a level with its gates and its reason out.

Pure: time is in the samples. It knows no sensor and no scheduler; `scheduling.governor` feeds it and carries out its gates.

Each level is a trigger of its own. It goes on when the *headroom* (degrees below the device's slowdown temperature: the median of
the last readings, less what the trend will take within `lookahead_s`) falls to the level's margin, or when enough of the last
readings name a throttle reason of that weight. It goes off when the headroom has stayed above the margin by `hysteresis_c` for
the level's dwell. The level is the highest trigger that is on: monotone (hotter never means a lower level), and its changes
are bounded. A trigger that comes back soon after it went off dwells twice as long each time, so a load that is too much for the
cooling ends in rare, short attempts and not in an oscillation.

A sensor that vanished is not cool: its triggers keep what they had, and after `blind_s` the level is at least WARM.
"""

from __future__ import annotations

import math
from collections import deque
from enum import IntEnum, StrEnum
from statistics import median

import msgspec

from appliance.core.robust import theil_sen

LOWEST_PRIORITY = 16
"""Priorities go from 1, the highest, to this (the batching manifest's range)."""

READINGS = 5
"""The last readings that count; of an odd number the median is a reading."""

VOTES = 3
"""Of those, how many must agree: a throttle reason that one or two readings name decides nothing."""

TREND_READINGS = 15
PLAUSIBLE_C = (-40.0, 150.0)
"""Sensors that fail give 0xFF, 65535 m°C or absolute zero; what lies outside is no reading."""

SLOWEST_TREND_C_PER_S = 0.05
"""A slope below this is the grain of whole degrees."""


class Level(IntEnum):
    """From cool to dangerous."""

    NOMINAL = 0
    WARM = 1
    HOT = 2
    CRITICAL = 3


class Throttle(StrEnum):
    """Why a device runs slower than asked, as far as it matters here (NVML's clocks event reasons; `HARDWARE` is its HwSlowdown,
    which stands for heat or a power brake).
    """

    THERMAL_HARDWARE = "hardware thermal slowdown"
    THERMAL_SOFTWARE = "software thermal slowdown"
    HARDWARE = "hardware slowdown"
    POWER_BRAKE = "power brake"
    POWER_CAP = "power cap"


class Step(IntEnum):
    """The triggers: the levels, with a second step within HOT that also narrows concurrency and batches."""

    WARM = 1
    HOT = 2
    SQUEEZED = 3
    CRITICAL = 4


WEIGHTS = {
    Throttle.THERMAL_HARDWARE: Step.CRITICAL,
    Throttle.THERMAL_SOFTWARE: Step.HOT,
    Throttle.HARDWARE: Step.HOT,
    Throttle.POWER_BRAKE: Step.HOT,
    Throttle.POWER_CAP: Step.WARM,
}
"""How much a throttle reason says. A power cap is how a GPU works at full load: it counts only if it costs much clock."""


class DeviceSample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one device ("gpu:0", "host"). None: this box does not tell. `missing` says why there is no temperature.

    The headroom is `margin_c` where the device gives one, else `slowdown_c` less the temperature, else less `limit_c` (a critical
    temperature), else less what the policy assumes.
    """

    device: str
    temperature_c: float | None = None
    margin_c: float | None = None
    slowdown_c: float | None = None
    limit_c: float | None = None
    throttle: frozenset[Throttle] = frozenset()
    power_w: float | None = None
    power_limit_w: float | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    missing: str = ""


class ThermalSample(msgspec.Struct, frozen=True):
    """All devices at one time (monotonic seconds). A device that was in an earlier sample and is not in this one has vanished."""

    time_s: float
    devices: tuple[DeviceSample, ...] = ()


class ThermalPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Margins in °C below slowdown, falling from warm to critical; times in seconds.

    `dwell_s` is that of CRITICAL: HOT dwells twice and WARM three times as long, so that work comes back step by step.
    """

    warm_margin_c: float = 12.0
    hot_margin_c: float = 7.0
    critical_margin_c: float = 2.0
    hysteresis_c: float = 3.0
    dwell_s: float = 20.0
    max_dwell_s: float = 900.0
    relapse: float = 2.0
    lookahead_s: float = 20.0
    blind_s: float = 30.0
    assumed_limit_c: float = 90.0
    power_cap_clock_share: float = 0.6
    low_priority: int = 9
    critical_priority: int = 1
    squeezed_share: float = 0.5
    stop_when_critical: bool = False

    def margin_c(self, step: Step) -> float:
        """The headroom at which that trigger goes on."""
        return {
            Step.WARM: self.warm_margin_c,
            Step.HOT: self.hot_margin_c,
            Step.SQUEEZED: (self.hot_margin_c + self.critical_margin_c) / 2,
            Step.CRITICAL: self.critical_margin_c,
        }[step]

    def first_dwell_s(self, step: Step) -> float:
        """How long it must have been cool enough before that trigger goes off, the first time."""
        return self.dwell_s * {Step.WARM: 3.0, Step.HOT: 2.0, Step.SQUEEZED: 1.5, Step.CRITICAL: 1.0}[step]


class Gates(msgspec.Struct, frozen=True, kw_only=True):
    """What may be done. Requests of a priority number up to `max_priority` are admitted (16: all, 0: none).

    `concurrency` is the share of a version's instances that may run at once, at least one; below 1 nothing is staged behind a
    running batch. `batch_growth` is the share of the usual rows that a batch may gather, at least one.
    """

    level: Level = Level.NOMINAL
    max_priority: int = LOWEST_PRIORITY
    builds: bool = True
    explanations: bool = True
    concurrency: float = 1.0
    batch_growth: float = 1.0
    retry_after_s: float = 0.0
    reason: str = ""

    def admits(self, priority: int) -> bool:
        """Whether a request of that priority number (1 to 16) may be admitted."""
        return priority <= self.max_priority


OPEN = Gates()
"""Nothing is held back."""


class DeviceState(msgspec.Struct, frozen=True):
    """One device as last judged. `headroom_c` and `slope_c_per_s` None: not known. `limit_in_s` None: not getting warmer."""

    device: str
    level: Level
    temperature_c: float | None
    headroom_c: float | None
    slope_c_per_s: float | None
    limit_in_s: float | None
    note: str


class Judgement(msgspec.Struct, frozen=True):
    """What one sample led to. `changed` if the overall level is another than before."""

    gates: Gates
    devices: tuple[DeviceState, ...]
    changed: bool


class Trigger:
    """One step of one device: on at once, off after calm; what comes back soon must stay calm longer."""

    def __init__(self, first_dwell_s: float, policy: ThermalPolicy) -> None:
        self.on = False
        self._first_s = first_dwell_s
        self._policy = policy
        self._dwell_s = first_dwell_s
        self._calm_since: float | None = None
        self._released_at = -math.inf

    @property
    def dwell_s(self) -> float:
        """How long it has to be calm now."""
        return self._dwell_s

    def update(self, now: float, *, tripped: bool, calm: bool) -> None:
        """`tripped`: the condition to go on holds; `calm`: the one to go off. Never both; neither between the thresholds."""
        if tripped:
            if not self.on:
                self._trip(now)
            self._calm_since = None
        elif not calm:
            self._calm_since = None
        elif self.on:
            if self._calm_since is None:
                self._calm_since = now
            if now - self._calm_since >= self._dwell_s:
                self.on = False
                self._released_at = now

    def _trip(self, now: float) -> None:
        self.on = True
        longest = max(self._first_s, self._policy.max_dwell_s)
        if now - self._released_at <= longest:
            self._dwell_s = min(longest, self._dwell_s * self._policy.relapse)
        else:
            self._dwell_s = self._first_s


class _Device:
    """The memory of one device."""

    def __init__(self, name: str, policy: ThermalPolicy) -> None:
        self.name = name
        self.triggers = {step: Trigger(policy.first_dwell_s(step), policy) for step in Step}
        self.seen_at: float | None = None
        self.temperature_c: float | None = None
        self.headroom_c: float | None = None
        self.slope: float | None = None
        self.blind = False
        self.why_missing = ""
        self.reasons: tuple[Throttle, ...] = ()
        self._policy = policy
        self._readings: deque[tuple[float, float, float]] = deque(maxlen=TREND_READINGS)
        self._throttles: deque[frozenset[Throttle]] = deque(maxlen=READINGS)
        self._told: tuple[tuple[object, ...], DeviceState] | None = None

    @property
    def level(self) -> Level:
        """The highest trigger that is on; at least WARM when it vanished."""
        on = {step for step, trigger in self.triggers.items() if trigger.on}
        if Step.CRITICAL in on:
            return Level.CRITICAL
        if on & {Step.HOT, Step.SQUEEZED}:
            return Level.HOT
        return Level.WARM if on or self.blind else Level.NOMINAL

    @property
    def squeezed(self) -> bool:
        """Concurrency and batches are narrowed, too."""
        return self.triggers[Step.SQUEEZED].on or self.triggers[Step.CRITICAL].on

    def look(self, now: float, sample: DeviceSample | None) -> None:
        reading = None if sample is None else self._reading(sample)
        if reading is None:
            self._unseen(now, sample)
            return
        if self.seen_at is not None and now - self.seen_at > self._policy.blind_s:
            # what was before the gap says nothing about now
            self._readings.clear()
            self._throttles.clear()
        self.seen_at = now
        self.why_missing = ""
        self._readings.append((now, *reading))
        assert sample is not None
        self._throttles.append(self._weighty(sample))
        if len(self._readings) >= VOTES:
            self.blind = False
            self._judge(now)

    def _reading(self, sample: DeviceSample) -> tuple[float, float] | None:
        """Temperature (NaN where only a margin is told) and headroom; None if it tells neither, or nonsense."""
        low, high = PLAUSIBLE_C
        temperature = sample.temperature_c
        if temperature is not None and not low <= temperature <= high:
            temperature = None
        if sample.margin_c is not None and abs(sample.margin_c) <= high:
            return (math.nan if temperature is None else temperature), sample.margin_c
        if temperature is None:
            return None
        limit = sample.slowdown_c or sample.limit_c or self._policy.assumed_limit_c
        return temperature, limit - temperature

    def _weighty(self, sample: DeviceSample) -> frozenset[Throttle]:
        """The throttle reasons that count: a power cap only where it costs much clock."""
        if Throttle.POWER_CAP in sample.throttle:
            clock, most = sample.clock_mhz, sample.max_clock_mhz
            if clock is None or not most or clock > self._policy.power_cap_clock_share * most:
                return sample.throttle - {Throttle.POWER_CAP}
        return sample.throttle

    def _unseen(self, now: float, sample: DeviceSample | None) -> None:
        """Nothing is calm that is not seen: triggers keep what they have."""
        self.why_missing = (sample.missing if sample is not None else "") or "it gives no reading"
        for trigger in self.triggers.values():
            trigger.update(now, tripped=False, calm=False)
        if self.seen_at is not None and now - self.seen_at >= self._policy.blind_s:
            self.blind = True

    def _judge(self, now: float) -> None:
        latest = list(self._readings)[-READINGS:]
        self.headroom_c = median(headroom for _, _, headroom in latest)
        told = [temperature for _, temperature, _ in latest if not math.isnan(temperature)]
        self.temperature_c = median(told) if told else None
        slope = 0.0
        if len(self._readings) >= READINGS:
            slope = -theil_sen([(time_s, headroom) for time_s, _, headroom in self._readings])
        self.slope = slope if abs(slope) >= SLOWEST_TREND_C_PER_S else 0.0
        ahead_c = self.headroom_c - max(0.0, self.slope) * self._policy.lookahead_s
        self.reasons = self._voted()
        forced = max((WEIGHTS[reason] for reason in self.reasons), default=0)
        for step, trigger in self.triggers.items():
            # a forecast may hold work back; it stops nothing
            headroom = self.headroom_c if step is Step.CRITICAL else ahead_c
            margin = self._policy.margin_c(step)
            tripped = headroom <= margin or forced >= step
            trigger.update(now, tripped=tripped, calm=not tripped and headroom > margin + self._policy.hysteresis_c)

    def _voted(self) -> tuple[Throttle, ...]:
        """The reasons that enough of the last readings gave."""
        if not any(self._throttles):
            return ()
        return tuple(reason for reason in Throttle if sum(reason in readings for readings in self._throttles) >= VOTES)

    def state(self) -> DeviceState:
        facts = (
            *(self.level, self.temperature_c, self.headroom_c, self.slope),
            *(self.why_missing, self.reasons, self.seen_at is None),
        )
        if self._told is None or self._told[0] != facts:
            # the words are made anew only when there is something new to say
            self._told = facts, self._state(*facts[:4])
        return self._told[1]

    def _state(
        self, level: Level, temperature_c: float | None, headroom_c: float | None, slope: float | None
    ) -> DeviceState:
        limit_in_s = None
        if slope and slope > 0 and headroom_c is not None:
            limit_in_s = max(0.0, headroom_c / slope)
        return DeviceState(self.name, level, temperature_c, headroom_c, slope, limit_in_s, self._note(limit_in_s))

    def _note(self, limit_in_s: float | None) -> str:
        """What is known of it, in words for people."""
        if self.seen_at is None:
            return f"{title(self.name)} has no temperature sensor that can be read ({self.why_missing})"
        words = [f"{title(self.name)} is {self._how_hot()}"]
        if self.why_missing:
            words = [
                f"{title(self.name)} cannot be read ({self.why_missing}); it was {self._how_hot()} when it was last seen"
            ]
        if self.reasons:
            words.append(f"it reports {' and '.join(self.reasons)}")
        if limit_in_s is not None and limit_in_s < 10 * self._policy.lookahead_s and not self.why_missing:
            words.append(f"at this rate it slows down in {limit_in_s:.0f} s")
        return ", ".join(words)

    def _how_hot(self) -> str:
        if self.headroom_c is None:
            return "not judged yet"
        where = "below" if self.headroom_c >= 0 else "above"
        margin = f"{abs(self.headroom_c):.0f} °C {where} its slowdown"
        return margin if self.temperature_c is None else f"at {self.temperature_c:.0f} °C, {margin}"


class ThermalCore:
    """See the module. `observe` every sample; call it with an empty one when there is none in time."""

    def __init__(self, policy: ThermalPolicy) -> None:
        self.policy = policy
        self.judgement = Judgement(OPEN, (), False)
        self._devices: dict[str, _Device] = {}
        self._last_s = -math.inf

    def observe(self, sample: ThermalSample) -> Judgement:
        """The judgement with this sample. One that is not newer than the last changes nothing."""
        if sample.time_s <= self._last_s:
            return msgspec.structs.replace(self.judgement, changed=False)
        self._last_s = sample.time_s
        given = {device.device: device for device in sample.devices}
        for name in given:
            if name not in self._devices:
                self._devices[name] = _Device(name, self.policy)
        for name, device in self._devices.items():
            device.look(sample.time_s, given.get(name))
        before = self.judgement.gates.level
        gates = self._gates()
        states = tuple(device.state() for device in self._devices.values())
        self.judgement = Judgement(gates, states, gates.level is not before)
        return self.judgement

    def _gates(self) -> Gates:
        worst = max(self._devices.values(), key=lambda device: (device.level, device.squeezed), default=None)
        if worst is None or worst.level is Level.NOMINAL:
            return OPEN
        return gates_for(
            self.policy, worst.level, squeezed=worst.squeezed, note=worst.state().note, dwell_s=_dwell(worst)
        )


def _dwell(device: _Device) -> float:
    """The soonest that anything may be released: what a refused client is told to wait."""
    return min(
        (trigger.dwell_s for trigger in device.triggers.values() if trigger.on),
        default=device.triggers[Step.WARM].dwell_s,
    )


def title(device: str) -> str:
    """A device in words for people: "gpu:0" is "GPU 0"."""
    kind, _, number = device.partition(":")
    name = kind.upper() if kind == "gpu" else f"the {kind}"
    return f"{name} {number}".strip()


def gates_for(policy: ThermalPolicy, level: Level, *, squeezed: bool, note: str, dwell_s: float) -> Gates:
    """What a level leaves undone, and the words for it. Monotone: a higher level never allows more."""
    if level is Level.NOMINAL:
        return OPEN
    share = policy.squeezed_share if squeezed or level is Level.CRITICAL else 1.0
    match level:
        case Level.WARM:
            max_priority = LOWEST_PRIORITY
            done = "background builds wait"
        case Level.HOT:
            max_priority = min(LOWEST_PRIORITY, policy.low_priority - 1)
            done = f"priorities {policy.low_priority} and lower are refused"
            if squeezed:
                done += ", fewer and smaller batches run"
        case Level.CRITICAL:
            max_priority = 0 if policy.stop_when_critical else min(policy.critical_priority, policy.low_priority - 1)
            done = "every request is refused"
            if max_priority:
                done = f"only priority {max_priority} {'and higher ' if max_priority > 1 else ''}is served"
    return Gates(
        level=level,
        max_priority=max_priority,
        builds=False,
        explanations=False,
        concurrency=share,
        batch_growth=share,
        retry_after_s=min(60.0, max(1.0, dwell_s)),
        reason=f"{note}: {done}",
    )
