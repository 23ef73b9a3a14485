"""Golden scenarios of the batcher: commands, a line of dashes, and what it wanted done, as a play to be read.

t=SECONDS                            the clock
limits KEY=VALUE …                   a new batcher
worker N | retire N | lost N         a worker starts, gets no more, dies
enqueue NAME [rows=] [shape=] [priority=] [ttl=] [stream=] [nbytes=] [once]
done N | failed N                    batch N ends
cancel NAME
poll
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from appliance.core.batcher import Batcher, BatcherLimits, Dispatch, Entry, Expire, Fail, Supersede
from appliance.core.errors import ApplianceError

FOLDER = Path(__file__).parent / "batcher"
SEPARATOR = "----"


class Play:
    """One scenario's batcher, clock and cast."""

    def __init__(self) -> None:
        self.now = 0.0
        self.batcher = Batcher(BatcherLimits(max_batch_size=4))
        self.entries: dict[str, Entry] = {}

    def act(self, line: str) -> list[str]:
        """Carry out one command; what came of it."""
        word, *rest = line.split()
        if word.startswith("t="):
            self.now = float(word[2:])
            return []
        if word == "limits":
            values = {
                key: float(value) if key.endswith("_s") else int(value)
                for key, value in (item.split("=") for item in rest)
            }
            self.batcher = Batcher(BatcherLimits(**values))  # type: ignore[arg-type]  # a test's own text
            return []
        if word == "enqueue":
            return self.enqueue(rest[0], rest[1:])
        if word == "poll":
            return self.poll()
        if word == "cancel":
            return [f"  {rest[0]}: {'cancelled' if self.batcher.cancel(self.entries[rest[0]]) else 'had ended'}"]
        number = int(rest[0])
        if word in ("done", "failed"):
            ended = (self.batcher.batch_done if word == "done" else self.batcher.batch_failed)(number, self.now)
            return [f"  answered [{' '.join(str(entry.payload) if entry else '-' for entry in ended)}]"]
        if word == "worker":
            self.batcher.add_worker(number)
        elif word == "retire":
            self.batcher.remove_worker(number)
        elif word == "lost":
            self.batcher.worker_lost(number, self.now)
        else:
            raise ValueError(f"unknown command {line!r}")
        return []

    def enqueue(self, name: str, options: list[str]) -> list[str]:
        values = dict(option.split("=") for option in options if "=" in option)
        ttl = values.get("ttl")
        entry = self.entries[name] = Entry(
            key=len(self.entries),
            shape_key=values.get("shape", ""),
            rows=int(values.get("rows", "1")),
            nbytes=int(values.get("nbytes", "1")),
            priority=int(values.get("priority", "8")),
            deadline=self.now + float(ttl) if ttl else math.inf,
            stream=values.get("stream", ""),
            idempotent="once" not in options,
            payload=name,
        )
        try:
            self.batcher.enqueue(entry, self.now)
        except ApplianceError as error:
            return [f"  {name}: {error.code}"]
        return []

    def poll(self) -> list[str]:
        lines = []
        for action in self.batcher.poll(self.now):
            match action:
                case Dispatch(worker, batch, entries, rows):
                    names = " ".join(str(entry.payload) for entry in entries)
                    lines.append(f"  dispatch #{batch} to {worker}: [{names}] rows={rows}")
                case Expire(entry, running):
                    lines.append(f"  expire {entry.payload}{' while running' if running else ''}")
                case Supersede(entry, by):
                    lines.append(f"  supersede {entry.payload} by {by.payload}")
                case Fail(entry, reason):
                    lines.append(f"  fail {entry.payload}: {reason}")
        wakeup = self.batcher.next_wakeup()
        state = f"queued={self.batcher.queued} running={self.batcher.in_flight}"
        return [*lines, f"  {state}" + (f" wake at {wakeup:g}" if wakeup is not None else "")]


def transcript(commands: str) -> str:
    """The commands, each followed by what came of it."""
    play = Play()
    lines: list[str] = []
    for line in commands.splitlines():
        lines.append(line)
        if line.strip() and not line.startswith("#"):
            lines += play.act(line)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.txt")), ids=lambda file: file.stem)
def test_the_play_goes_as_written(file: Path, request: pytest.FixtureRequest) -> None:
    commands, _, golden = file.read_text().partition(f"\n{SEPARATOR}\n")
    found = transcript(commands)
    if request.config.getoption("--rewrite-scenarios"):
        file.write_text(f"{commands}\n{SEPARATOR}\n{found}")
        return
    assert found == golden


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 5
