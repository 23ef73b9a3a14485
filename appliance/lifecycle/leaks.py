"""Watches the front's and the workers' resident memory for a leak, and recycles a leaking worker at a quiet moment where allowed.

Whether it leaks is `core.slope`'s decision, how a worker is replaced is the model version's. Driven once a second by `daemon`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable

import psutil

from appliance.core.errors import ApplianceError
from appliance.core.slope import SlopeAlarm, SlopePolicy
from appliance.lifecycle.model_version import ModelVersion
from appliance.observability.events import EventBus
from appliance.workers.link import Instance

log = logging.getLogger(__name__)

QUIET_WAIT_S = 600.0
"""A version that is never idle gets its worker recycled under load after this: no request is lost either way."""
RETRY_S = 300.0
"""After a recycling that failed: it opens a worker, and what kept it from that takes a while to change."""


def resident(pid: int) -> int | None:
    """Resident bytes of a process; None if it has ended."""
    try:
        found: int = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return None
    return found


class LeakWatch:
    """`tick` as often as you like; it looks every `every_s`. `close` waits for a recycling that is under way."""

    def __init__(
        self,
        generations: Callable[[], Iterable[ModelVersion]],
        events: EventBus,
        policy: SlopePolicy,
        *,
        every_s: float = 30.0,
        read: Callable[[int], int | None] = resident,
    ) -> None:
        self._generations = generations
        self._events = events
        self._policy = policy
        self._every_s = every_s
        self._read = read
        self._alarms: dict[int, SlopeAlarm] = {}
        self._leaking: dict[int, float] = {}
        """By pid, since when, or, after a failure, from when on."""
        self._next_s = 0.0
        self._recycling: asyncio.Task[None] | None = None

    def tick(self, now: float) -> None:
        """Look at everybody when it is time, and recycle one at a time."""
        if now < self._next_s:
            return
        self._next_s = now + self._every_s
        workers = {
            instance.link.pid: (version, instance)
            for version in self._generations()
            if version.scheduler is not None
            for instance in version.scheduler.instances.values()
        }
        for gone in self._alarms.keys() - workers.keys() - {os.getpid()}:
            del self._alarms[gone]
            self._leaking.pop(gone, None)
        for pid in (os.getpid(), *workers):
            version = workers[pid][0] if pid in workers else None
            if self._leaks(now, pid, version) and version is not None and version.manifest.worker.recycle:
                self._leaking.setdefault(pid, now)
        self._recycle_one(now, workers)

    def _leaks(self, now: float, pid: int, version: ModelVersion | None) -> bool:
        nbytes = self._read(pid)
        if nbytes is None:
            return False
        alarm = self._alarms.get(pid)
        if alarm is None:
            alarm = self._alarms[pid] = SlopeAlarm(self._policy)
        if not alarm.observe(now, nbytes):
            return False
        fields = {
            "process": "front" if version is None else f"{version.name}/{version.version}",
            "pid": pid,
            "mib_per_h": round(alarm.bytes_per_h / 2**20, 1),
            "resident_mib": nbytes >> 20,
        }
        log.warning("memory.leak", extra={"fields": fields})
        self._events.publish("memory.leak", **fields)
        return True

    def _recycle_one(self, now: float, workers: dict[int, tuple[ModelVersion, Instance]]) -> None:
        if self._recycling is not None and not self._recycling.done():
            return
        for pid, since in self._leaking.items():
            version, instance = workers[pid]
            if now < since:
                continue
            quiet = version.scheduler is not None and version.scheduler.idle
            if quiet or now - since >= QUIET_WAIT_S:
                del self._leaking[pid]
                work = self._recycle(version, instance, now + RETRY_S)
                self._recycling = asyncio.create_task(work, name=f"recycle-{version.name}")
                return

    async def _recycle(self, version: ModelVersion, instance: Instance, again_s: float) -> None:
        """Its failure ends nothing: the worker goes on, and is tried again from `again_s` on as long as it is there."""
        try:
            await version.recycle(instance, "its memory grew steadily")
        except ApplianceError as error:
            log.error("worker.recycle_failed", extra={"fields": {"model": version.name, "reason": error.message}})
        except Exception:
            log.exception("worker.recycle_failed", extra={"fields": {"model": version.name}})
        else:
            return
        if instance.link.pid in self._alarms:
            self._leaking[instance.link.pid] = again_s

    async def close(self) -> None:
        """End a recycling that is under way."""
        if self._recycling is not None:
            self._recycling.cancel()
            await asyncio.gather(self._recycling, return_exceptions=True)
