"""Running a build process: its order in, its progress and result out, an end to it when it is cancelled or takes too long.

A process of its own, since a converter or a compiler may take all memory, crash, or never end; the daemon must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable

import msgspec

from appliance.building.orders import BuildError, Job, Line, Order, Progress, Result
from appliance.building.scope import Scopes
from appliance.host import systemd

SCOPES = Scopes()
"""One answer for this process: what systemd allows does not change while it runs."""

STDERR_BYTES = 16_384
STOP_GRACE_S = 3.0
LINE_BYTES = 64 << 20
"""A report with a large confusion matrix is one line."""


async def run(
    order: Order,
    on_percent: Callable[[str, float], None],
    *,
    time_budget_s: float,
    memory_limit_mb: int = 0,
    sandbox: bool = True,
) -> Result:
    """Do one job; its result. BuildError if it failed, was killed, or ran over its budget; cancelled with the task."""
    # made and removed out here: a process that gives up writing elsewhere could not remove it
    scratch = tempfile.TemporaryDirectory(prefix="appliance-build-", ignore_cleanup_errors=True)
    with scratch:
        return await _run(Job(order, memory_limit_mb, sandbox), on_percent, time_budget_s, scratch.name)


async def _run(job: Job, on_percent: Callable[[str, float], None], time_budget_s: float, scratch: str) -> Result:
    process = await _spawn(job.memory_limit_mb, scratch)
    assert process.stderr is not None
    errors = asyncio.create_task(_tail(process.stderr), name="build-stderr")
    try:
        async with asyncio.timeout(time_budget_s):
            result = await _converse(process, job, on_percent)
            await process.wait()
    except TimeoutError:
        raise BuildError(f"it took longer than its budget of {time_budget_s:g} s: see [build] time_budget_s") from None
    finally:
        if process.returncode is None:
            await asyncio.shield(_end(process))
        words = await errors
    if result is None:
        raise BuildError(f"the build process {_ended(process.returncode)}{': ' + words if words else ''}")
    if result.error:
        raise BuildError(result.error)
    return result


async def _spawn(memory_limit_mb: int, scratch: str) -> asyncio.subprocess.Process:
    """Start the process. Who is cancelled meanwhile waits for it and ends it: it may have been started already."""
    spawning = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *await SCOPES.command(memory_limit_mb),
            sys.executable,
            "-m",
            "appliance.building.job",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=LINE_BYTES,
            env=systemd.for_children(os.environ) | {"ORT_DISABLE_TELEMETRY": "1", "TMPDIR": scratch},
        ),
        name="build-spawn",
    )
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        await _end(await spawning)
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask it to stop, so that it leaves nothing half made; end it and all it started after a grace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_GRACE_S):
            await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _converse(
    process: asyncio.subprocess.Process, job: Job, on_percent: Callable[[str, float], None]
) -> Result | None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(msgspec.json.encode(job))
        await process.stdin.drain()
        process.stdin.close()
    while line := await process.stdout.readline():
        # only the job's own lines arrive here: what libraries print goes to its standard error
        message: Line = msgspec.json.decode(line, type=Line)
        if isinstance(message, Progress):
            on_percent(message.phase, message.percent)
        else:
            return message
    return None


async def _tail(stream: asyncio.StreamReader) -> str:
    """The last line of what it complained of, as far as that was words."""
    kept = b""
    while data := await stream.read(STDERR_BYTES):
        kept = (kept + data)[-STDERR_BYTES:]
    lines = [line for line in kept.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else ""


def _ended(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended with status {status}"
