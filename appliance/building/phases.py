"""How far a build is, from TensorRT's nested phases: one percentage that never falls. Pure; the builder's monitor drives it.

Each phase takes the place of one step of its parent, so a phase that begins late in its parent moves the whole by little.
"""

from __future__ import annotations


class _Phase:
    def __init__(self, begin: float, width: float, steps: int) -> None:
        self.begin = begin
        self.step_width = width / max(1, steps)
        self.end = begin + width
        self.done = begin


class Phases:
    """The phases that are open, and the percentage: 0 at first, 100 once the outermost phase has finished."""

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self.percent = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """A phase begins within another (or as the outermost) and will take so many steps; the percentage."""
        above = self._open.get(parent) if parent is not None else None
        if above is not None:
            begin = min(above.done, above.end)
            self._open[name] = _Phase(begin, max(0.0, min(above.step_width, above.end - begin)), steps)
        elif not self._open:
            self._open[name] = _Phase(0.0, 100.0, steps)
        else:
            # a parent that was never announced: counted as open, worth nothing
            self._open[name] = _Phase(self.percent, 0.0, steps)
        return self.percent

    def step(self, name: str, number: int) -> float:
        """A phase has done its step of that number, from 0; the percentage."""
        phase = self._open.get(name)
        if phase is not None:
            phase.done = min(phase.end, max(phase.done, phase.begin + phase.step_width * (number + 1)))
            self._rise(phase.done)
        return self.percent

    def finish(self, name: str) -> float:
        """A phase ends; the percentage."""
        phase = self._open.pop(name, None)
        if phase is not None:
            self._rise(phase.end)
        return self.percent

    def _rise(self, to: float) -> None:
        self.percent = min(100.0, max(self.percent, to))
