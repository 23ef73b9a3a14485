"""A control group of its own for a build process, where systemd is and allows it: its memory counted apart, its CPU share small.

Without one (a container, another init, no permission) the process's own limits are all there is. Asked once per process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from pathlib import Path

from appliance.host import systemd

log = logging.getLogger(__name__)

BOOTED = Path("/run/systemd/system")
"""There if systemd is the init: sd_booted(3)."""

CPU_WEIGHT = 20
"""Of 100 for everybody else."""

TRIAL_S = 2.0


class Scopes:
    """Whether scopes can be had, and the command that starts a process in one."""

    def __init__(self, booted: Path = BOOTED) -> None:
        self._booted = booted
        self._possible: bool | None = None
        self._asking = asyncio.Lock()

    async def command(self, memory_limit_mb: int) -> list[str]:
        """What stands before a process's own command; empty where there are no scopes. Memory 0: no limit."""
        async with self._asking:
            if self._possible is None:
                self._possible = await self._try()
                if not self._possible:
                    log.info("build.no_scope", extra={"fields": {"reason": "systemd gives this process no scope"}})
        return _command(memory_limit_mb) if self._possible else []

    async def _try(self) -> bool:
        if not self._booted.is_dir() or shutil.which("systemd-run") is None:
            return False
        process = await asyncio.create_subprocess_exec(
            *_command(0),
            "true",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=systemd.for_children(os.environ),
        )
        try:
            async with asyncio.timeout(TRIAL_S):
                return await process.wait() == 0
        except TimeoutError:
            return False
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await asyncio.shield(process.wait())


def _command(memory_limit_mb: int) -> list[str]:
    limits = [f"--property=CPUWeight={CPU_WEIGHT}"]
    if memory_limit_mb:
        limits += [f"--property=MemoryMax={memory_limit_mb}M", "--property=MemorySwapMax=0"]
    manager = [] if os.geteuid() == 0 else ["--user"]
    return ["systemd-run", "--scope", "--quiet", "--collect", "--no-ask-password", *manager, *limits, "--"]
