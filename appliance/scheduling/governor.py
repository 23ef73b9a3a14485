"""The shell of `core.thermal` and `core.hold`: takes samples, publishes the gates, and holds back whoever asks.

It reads no sensor: `daemon` gives it samples. Schedulers ask it for each request and hear of every change of its gates; the
compiler waits at it. It decides nothing that the core does not say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from appliance.config import GovernorConfig
from appliance.core.errors import unavailable
from appliance.core.hold import Hold, held, make_hold
from appliance.core.memory_budget import HOST
from appliance.core.thermal import OPEN, Gates, Judgement, Level, ThermalCore, ThermalPolicy, ThermalSample, title
from appliance.observability.events import EventBus

log = logging.getLogger(__name__)

STALE_S = 5.0
"""Samples come about once a second. When none has come for so long, nobody sees the temperature: the core is told so."""


GONE_RETRY_S = 60.0
"""What a client is told to wait for a device that comes back only when somebody does something."""


def policy_of(config: GovernorConfig) -> ThermalPolicy:
    """The core's policy as configured."""
    return ThermalPolicy(
        warm_margin_c=config.warm_margin_c,
        hot_margin_c=config.hot_margin_c,
        critical_margin_c=config.critical_margin_c,
        hysteresis_c=config.hysteresis_c,
        dwell_s=config.dwell_s,
        max_dwell_s=config.max_dwell_s,
        lookahead_s=config.lookahead_s,
        blind_s=config.blind_s,
        assumed_limit_c=config.assumed_limit_c,
        low_priority=config.low_priority,
        critical_priority=config.critical_priority,
        stop_when_critical=config.critical == "stop",
    )


class Governor:
    """See the module. Everything on the event loop."""

    def __init__(self, policy: ThermalPolicy, events: EventBus, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.gates: Gates = OPEN
        self._clock = clock
        self._hold: Hold | None = None
        self._core = ThermalCore(policy)
        self._events = events
        self._listeners: list[Callable[[], None]] = []
        self._sampled_at: float | None = None
        self._cool = asyncio.Event()
        self._cool.set()
        self._condemned: dict[str, str] = {}

    @property
    def judgement(self) -> Judgement:
        """The last one, device by device, with the gates that are in force: an operator's hold is in them."""
        return msgspec.structs.replace(self._core.judgement, gates=self.gates)

    def observe(self, sample: ThermalSample) -> None:
        """Judge a sample; whoever listens hears of other gates."""
        self._sampled_at = sample.time_s
        self._apply(self._core.observe(sample))

    def tick(self, now: float) -> None:
        """Once a second: samples that stay away are sensors that vanished. A box that never gave one is left alone."""
        if self._sampled_at is not None and now - self._sampled_at >= STALE_S:
            self._apply(self._core.observe(ThermalSample(now)))
        if self._hold is not None and self._clock() >= self._hold.until_s:
            self._let_go("its time is over")

    def hold(self, level: str, seconds: float, reason: str) -> None:
        """At least that level for so long, in place of an earlier hold. INVALID_ARGUMENT with what was expected."""
        self._hold = hold = make_hold(level, seconds, reason, self._clock())
        fields = {"level": hold.level.name, "seconds": seconds, "reason": hold.reason}
        log.warning("governor.held", extra={"fields": fields})
        self._events.publish("governor.held", **fields, severity="warning")
        self._apply(self._core.judgement)

    def release(self) -> bool:
        """End a hold; False if there is none."""
        if self._hold is None:
            return False
        self._let_go("an operator released it")
        return True

    def hold_s(self) -> float:
        """Seconds that an operator's hold still lasts; 0: there is none."""
        return 0.0 if self._hold is None else self._hold.left_s(self._clock())

    def _let_go(self, why: str) -> None:
        assert self._hold is not None
        fields = {"level": self._hold.level.name, "reason": why}
        self._hold = None
        log.info("governor.released", extra={"fields": fields})
        self._events.publish("governor.released", **fields)
        self._apply(self._core.judgement, calm=why)

    def _apply(self, judged: Judgement, calm: str = "it has cooled down") -> None:
        before = self.gates
        self.gates = held(self._core.policy, judged.gates, self._hold, self._clock())
        if self.gates.level is not before.level:
            self._tell(before.level, calm)
        if self.gates.builds:
            self._cool.set()
        else:
            self._cool.clear()
        if (before.concurrency, before.batch_growth) != (self.gates.concurrency, self.gates.batch_growth):
            for listener in tuple(self._listeners):
                listener()

    def _tell(self, before: Level, calm: str) -> None:
        level = self.gates.level
        fields = {"level": level.name, "before": before.name, "reason": self.gates.reason or calm}
        log.log(logging.WARNING if level > before else logging.INFO, "governor.level", extra={"fields": fields})
        severity = "info" if level <= before else "warning" if level is Level.WARM else "error"
        self._events.publish("governor.level", **fields, max_priority=self.gates.max_priority, severity=severity)

    def condemn(self, devices: Mapping[str, str]) -> None:
        """From now on these devices ("gpu:0"; "gpu:*": every GPU), and no others, are of no use, and why."""
        self._condemned = dict(devices)

    def condemned(self, device: str) -> str:
        """Why that device is of no use now; empty if it is."""
        every = self._condemned.get("gpu:*", "") if device.startswith("gpu:") else ""
        return self._condemned.get(device, every)

    def admit(self, priority: int, device: str = HOST) -> None:
        """UNAVAILABLE with the reason, and when to come again: its device is gone, or it is too hot for that priority."""
        if self._condemned and (reason := self.condemned(device)):
            raise unavailable(f"{title(device)} cannot be used: {reason}", retry_after_s=GONE_RETRY_S)
        if priority > self.gates.max_priority:
            raise unavailable(
                f"priority {priority} is not served now: {self.gates.reason}", retry_after_s=self.gates.retry_after_s
            )

    async def builds_allowed(self) -> None:
        """Returns when builds may run."""
        await self._cool.wait()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` when concurrency or batch growth change; the result ends that, and may be called twice."""
        self._listeners.append(listener)

        def end() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return end

    def snapshot(self) -> dict[str, Any]:
        """For the status document."""
        gates = self.gates
        return {
            "level": gates.level.name,
            "reason": gates.reason,
            "max_priority": gates.max_priority,
            "builds": gates.builds,
            "explanations": gates.explanations,
            "concurrency": gates.concurrency,
            "batch_growth": gates.batch_growth,
            "hold": self._hold_document(),
            "devices": [
                {
                    "device": device.device,
                    "level": device.level.name,
                    "temperature_c": device.temperature_c,
                    "headroom_c": device.headroom_c,
                    "slope_c_per_s": device.slope_c_per_s,
                    "limit_in_s": device.limit_in_s,
                    "note": device.note,
                }
                for device in self._core.judgement.devices
            ],
        }

    def _hold_document(self) -> dict[str, Any] | None:
        hold = self._hold
        if hold is None:
            return None
        return {"level": hold.level.name, "reason": hold.reason, "seconds_left": round(self.hold_s(), 1)}
