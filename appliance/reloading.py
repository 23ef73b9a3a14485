"""A reload: reads the configuration again, puts it into force or keeps the old one, and says how it went to whoever asked.

One at a time, in a task of its own. `daemon` drives it on SIGHUP; it knows the manager and the service, and no transport.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.config import Config, ConfigError, credentials_dir, load
from appliance.host import reload, systemd
from appliance.observability import logs

if TYPE_CHECKING:
    from appliance.lifecycle.manager import Manager
    from appliance.service import Service

log = logging.getLogger(__name__)

RELOADABLE = frozenset({"repository", "log", "drain_timeout_s"})
"""Top-level keys that a reload changes; the others, and the place of the repository, need a restart, and a reload says so."""


class Reloading:
    """Set `wanted`, and it happens. `config` is what is in force.

    `settle` waits until every model has come up or failed; `tell(kind, severity, **fields)` records something of the daemon's.
    """

    def __init__(
        self,
        config: Config,
        path: Path | None,
        runtime_dir: Path,
        *,
        overrides: Sequence[str] = (),
        wanted: asyncio.Event,
        manager: Manager,
        service: Service,
        settle: Callable[[], Awaitable[None]],
        tell: Callable[..., None],
    ) -> None:
        self.config = config
        self._path = path
        self._overrides = overrides
        self._runtime_dir = runtime_dir
        self._manager = manager
        self._service = service
        self._settle = settle
        self._tell = tell
        self._wanted = wanted
        self._number = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on; the start itself counts as the reload number 0, which went well."""
        self._task = asyncio.create_task(self._on_demand(), name="reload")
        self._answer(ok=True)

    async def close(self) -> None:
        """No more of it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _on_demand(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            self._number += 1
            self._answer(running=True)
            try:
                await self._reload()
            except (ConfigError, OSError) as error:
                log.error("config.reload_refused", extra={"fields": {"reason": str(error)}})
                self._tell("config.refused", "error", reason=str(error))
                problems = error.problems if isinstance(error, ConfigError) else [error]
                self._answer(ok=False, problems=[str(problem) for problem in problems])
            except Exception as error:
                # a bug of ours: who asks again must be answered, too
                log.exception("config.reload_failed")
                self._answer(ok=False, problems=[f"a bug in the appliance, {type(error).__name__}: see its log"])
            # also after a no: systemd may have been told that a reload had begun
            systemd.ready(self._service.status_line())

    async def _reload(self) -> None:
        before = self._broken()
        notes = self._reconfigure()
        await self._settle()
        failed = sorted(self._broken() - before)
        self._answer(ok=not failed, problems=failed, notes=notes)

    def _broken(self) -> set[str]:
        """The models that cannot serve, with their reasons."""
        return {
            f"model {entry.name} {entry.version}: {entry.reason}"
            for entry in self._service.index()
            if entry.state == "UNAVAILABLE" and entry.reason not in ("", "unloaded")
        }

    def _answer(
        self, *, ok: bool = True, problems: Sequence[str] = (), notes: Sequence[str] = (), running: bool = False
    ) -> None:
        outcome = reload.Outcome(os.getpid(), self._number, ok, tuple(problems), tuple(notes), running)
        try:
            reload.write(self._runtime_dir, outcome)
        except OSError as error:
            log.error("config.reload_untold", extra={"fields": {"reason": str(error)}})

    def _reconfigure(self) -> list[str]:
        """Put what is on disk into force; the keys that only a restart would. ConfigError or OSError: nothing has changed."""
        config = load(self._path, overrides=self._overrides, credentials=credentials_dir())
        systemd.reloading()
        self._manager.reconfigure(config.repository, config.drain_timeout_s)
        needs_restart = [
            key
            for key in config.__struct_fields__
            if key not in RELOADABLE and getattr(config, key) != getattr(self.config, key)
        ]
        if config.repository.path != self.config.repository.path:
            needs_restart.append("repository.path")
        logs.configure(config.log.format, config.log.level)
        log.info("config.reloaded", extra={"fields": {"needs_restart": needs_restart}})
        self._tell("config.reloaded", needs_restart=needs_restart)
        self.config = config
        return needs_restart
