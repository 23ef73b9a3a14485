"""A thread for one sampler: asked by the loop, answering when it can, so that a sensor that hangs stalls nothing.

A lane has one thread for good. A call that never returns from the driver keeps it; starting another would only hang it too, and
threads in the kernel cannot be ended. `silent_s` says how long it has not answered. The thread is a daemon: it does not keep the
process from ending. Driven by `monitor.py`, which owns it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from appliance.core.readings import Part
from appliance.sensors.base import Every, Sampler

log = logging.getLogger(__name__)

COMPLAIN_EVERY_S = 60.0


class Lane:
    """`ask` from the loop, then `answered` is set and `on_answer` called there; `part` is the last answer."""

    def __init__(self, sampler: Sampler, on_answer: Callable[[], None] = lambda: None) -> None:
        self.name = sampler.name
        self.part: Part | None = None
        self.answered = asyncio.Event()
        self.failures = 0
        self._sampler = sampler
        self._on_answer = on_answer
        self._period = Every(sampler.period_s)
        self._failed = 0
        self._complain_next_s = float("-inf")
        self._asked_s: float | None = None
        self._questions: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread; on the loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"sensors-{self.name}", daemon=True)
        self._thread.start()

    def ready(self, now_s: float) -> bool:
        """Whether `ask` would ask."""
        return self._asked_s is None and not self._period.waiting(now_s)

    def ask(self, now_s: float) -> bool:
        """Ask for a sample; False while the last question is still open, or there can be nothing new."""
        if self._asked_s is not None or not self._period.due(now_s):
            return False
        self._asked_s = now_s
        self.answered.clear()
        self._questions.put(now_s)
        return True

    def silent_s(self, now_s: float) -> float:
        """How long the open question has been waiting; 0 if none is open."""
        return 0.0 if self._asked_s is None else now_s - self._asked_s

    async def close(self, timeout_s: float) -> bool:
        """End the thread. False: it hangs, and was left behind."""
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self._questions.put(None)
        ended = True
        if thread.is_alive():
            await asyncio.to_thread(thread.join, timeout_s)
            ended = not thread.is_alive()
        self._loop = None
        if not ended:
            log.warning("sensors.thread_left_behind", extra={"fields": {"lane": self.name}})
        return ended

    def _run(self) -> None:
        while (now_s := self._questions.get()) is not None:
            part: Part | None = None
            try:
                part = self._sampler.sample(now_s)
            except Exception:
                # a bug in a sampler costs its readings, not the daemon
                self._complain(now_s)
            loop = self._loop
            if loop is None:
                break
            try:
                loop.call_soon_threadsafe(self._answer, part)
            except RuntimeError:
                break  # the loop is closed: nobody waits
        self._sampler.close()

    def _complain(self, now_s: float) -> None:
        """The traceback of the first failure, then one a minute: ten a second would push everything else out of the journal."""
        self._failed += 1
        if now_s >= self._complain_next_s:
            log.exception("sensors.sampler_failed", extra={"fields": {"lane": self.name, "times": self._failed}})
            self._failed, self._complain_next_s = 0, now_s + COMPLAIN_EVERY_S

    def _answer(self, part: Part | None) -> None:
        self._asked_s = None
        if part is None:
            self.failures += 1
        self.part = part
        self.answered.set()
        self._on_answer()
