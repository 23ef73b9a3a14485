"""What a reload leaves behind: the new configuration in force, or the old one with the reason; and always an answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from appliance.config import load
from appliance.host import reload
from appliance.host.reload import Outcome
from appliance.reloading import Reloading


class Manager:
    """Takes a configuration, or does what it was told to do instead."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.fails: Exception | None = None

    def reconfigure(self, config: Any, drain_timeout_s: float) -> None:
        if self.fails is not None:
            raise self.fails
        self.taken.append(f"{config.load} {drain_timeout_s:g}")


class Entry:
    def __init__(self, name: str, state: str, reason: str) -> None:
        self.name, self.version, self.state, self.reason = name, "1", state, reason


class Service:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def index(self) -> list[Entry]:
        return self.entries

    def status_line(self) -> str:
        return "all is well"


class Desk:
    """A reloading over a configuration file, with what it told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "appliance.toml"
        self.path.write_text("drain_timeout_s = 1\n")
        self.manager, self.service = Manager(), Service()
        self.told: list[str] = []
        self.wanted = asyncio.Event()
        self.coming: list[Entry] = []
        manager: Any = self.manager
        service: Any = self.service
        self.reloading = Reloading(
            load(self.path, overrides=["http.port=7"]),
            self.path,
            folder,
            overrides=["http.port=7"],
            wanted=self.wanted,
            manager=manager,
            service=service,
            settle=self.settle,
            tell=lambda kind, severity="info", **fields: self.told.append(kind),
        )
        self.reloading.start()

    async def settle(self) -> None:
        found = reload.read(self.folder)
        assert found is not None
        assert found.running, "who asks meanwhile must see that this one goes on"
        self.service.entries += self.coming

    async def ask(self) -> Outcome:
        before = reload.read(self.folder)
        assert before is not None
        self.wanted.set()
        for _ in range(1_000):
            found = reload.read(self.folder)
            if found is not None and not found.running and found.number > before.number:
                return found
            await asyncio.sleep(0)
        raise AssertionError("it was never answered")


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk(tmp_path)
    yield made
    await made.reloading.close()


async def test_the_start_counts_as_a_reload_that_went_well(desk: Desk) -> None:
    assert reload.read(desk.folder) == Outcome(os.getpid(), 0)


async def test_what_can_be_changed_is_and_the_rest_is_named(desk: Desk) -> None:
    desk.path.write_text('drain_timeout_s = 7\n[http]\nenabled = false\n[repository]\npath = "elsewhere"\n')
    outcome = await desk.ask()
    assert (outcome.ok, set(outcome.notes)) == (True, {"http", "repository.path"})
    assert (desk.manager.taken, desk.told) == (["all 7"], ["config.reloaded"])
    assert desk.reloading.config.drain_timeout_s == 7


async def test_what_the_command_line_says_holds_over_the_file_after_a_reload_as_before(desk: Desk) -> None:
    desk.path.write_text("[http]\nport = 9\n")
    outcome = await desk.ask()
    assert (outcome.ok, outcome.notes, desk.reloading.config.http.port) == (True, (), 7)


async def test_a_wrong_file_changes_nothing_and_is_answered_with_its_line(desk: Desk) -> None:
    desk.path.write_text("drain_timeout_s = 7\nprot = 1\n")
    outcome = await desk.ask()
    assert not outcome.ok
    assert "unknown key 'prot'" in outcome.problems[0]
    assert (desk.manager.taken, desk.told) == ([], ["config.refused"])
    assert desk.reloading.config.drain_timeout_s == 1


async def test_a_folder_that_cannot_be_read_keeps_the_old_configuration(desk: Desk) -> None:
    desk.manager.fails = FileNotFoundError(2, "No such file or directory", "models")
    desk.path.write_text("drain_timeout_s = 7\n")
    outcome = await desk.ask()
    assert not outcome.ok
    assert "models" in outcome.problems[0]
    assert desk.reloading.config.drain_timeout_s == 1


async def test_a_bug_is_answered_and_the_next_reload_works(desk: Desk) -> None:
    desk.manager.fails = RuntimeError("nobody thought of that")
    outcome = await desk.ask()
    assert (outcome.ok, outcome.problems) == (False, ("a bug in the appliance, RuntimeError: see its log",))
    desk.manager.fails = None
    assert (await desk.ask()).ok


async def test_a_model_that_fails_now_makes_it_fail_and_one_that_failed_before_does_not(desk: Desk) -> None:
    desk.service.entries = [Entry("old", "UNAVAILABLE", "since long"), Entry("away", "UNAVAILABLE", "unloaded")]
    assert (await desk.ask()).ok
    desk.coming = [Entry("new", "UNAVAILABLE", "it is no model")]
    outcome = await desk.ask()
    assert (outcome.ok, outcome.problems) == (False, ("model new 1: it is no model",))
