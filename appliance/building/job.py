"""The build process: one order on standard input, progress and one result as JSON lines on standard output.

Niced, first to go when memory is short, within a memory limit if one is set, and gone with whoever started it. Before the first
library is loaded it gives up all but the store and the folder of temporary files. Started by `jobs`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import msgspec

from appliance.building.orders import BuildError, BuildOrder, Job, Order, ProbeOrder, Progress, Result
from appliance.building.stopping import Stop
from appliance.host import sandbox
from appliance.host.sandbox import Sandbox

PR_SET_PDEATHSIG = 1
NICENESS = 10
MIB = 1 << 20


def main() -> None:
    """Run one job."""
    stop = Stop()
    stop.listen()
    _become_background()
    lines = os.fdopen(os.dup(1), "wb", 0)
    # libraries print; on our standard output that would be a broken line
    os.dup2(2, 1)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    if job.memory_limit_mb:
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory_limit_mb * MIB, resource.RLIM_INFINITY))
    if job.sandbox:
        _enter_sandbox(job.order)
    last = -1.0

    def say(phase: str, percent: float) -> None:
        nonlocal last
        stop.check()
        last = max(last, round(percent, 1))
        lines.write(msgspec.json.encode(Progress(phase, last)) + b"\n")

    try:
        result = _do(job.order, say, stop)
    except BuildError as error:
        result = Result(str(error))
    except MemoryError:
        result = Result("it ran out of memory: see [engines] memory_limit_mb")
    lines.write(msgspec.json.encode(result) + b"\n")


def _enter_sandbox(order: Order) -> None:
    """Write to the store and to temporary files only, from now on."""
    sandbox.make_nodes()
    writable = [Path(tempfile.gettempdir())]
    if not isinstance(order, ProbeOrder):
        store = Path(order.target.store)
        with contextlib.suppress(OSError):  # the store says so in its own words
            store.mkdir(parents=True, exist_ok=True)
        writable.append(store)
    try:
        Sandbox.of_this_kernel().enter(*writable)
    except OSError as error:
        sys.stderr.write(f"the build goes without a sandbox: {error.strerror}\n")


def _do(order: Order, say: Callable[[str, float], None], stop: Stop) -> Result:
    # only now: what it imports starts threads, which would not be in the sandbox
    from appliance.building import compilation

    if isinstance(order, BuildOrder):
        return Result(outcome=compilation.build(order.target, say, force=order.force, stop=stop))
    if isinstance(order, ProbeOrder):
        return Result(device=compilation.probe(order.device))
    if not order.digest:
        report, kept = compilation.check_as_is(order.target, say)
        return Result(report=_raw(report), kept=kept)
    outcome, report = compilation.check(order.target, order.digest, say)
    return Result(outcome=outcome, report=_raw(report))


def _raw(report: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(report))


def _become_background() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900")


if __name__ == "__main__":
    main()
