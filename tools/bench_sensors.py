"""What sampling costs, in percent of one core, at 1 and 10 Hz, against the stub of NVML.

    .venv/bin/python tools/bench_sensors.py --gpus 2 --seconds 10

The stub answers at once and in user space; a real driver's time in the kernel comes on top. Its wait for events looks fifty times
a second where a driver sleeps, so that thread is told apart, and is not in `core_percent`. Needs gcc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from appliance.core.readings import Snapshot
from appliance.sensors.monitor import Monitor
from tests.fakes.nvml import StubNvml


def cpu_by_thread() -> dict[str, float]:
    """CPU seconds of our threads so far, by name (proc_pid_schedstat: nanoseconds on a CPU)."""
    return {
        thread.name: int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9
        for thread in threading.enumerate()
    }


async def measure(interval_s: float, seconds: float) -> dict[str, object]:
    """CPU time of this process over that while; the first second, with the searches and imports, is left out."""
    monitor = Monitor(interval_s=interval_s, folders={"state": Path("/tmp")}, processes=lambda: {"front": os.getpid()})
    snapshots: list[Snapshot] = []
    monitor.subscribe(snapshots.append)
    monitor.start()
    await asyncio.sleep(1.5)
    snapshots.clear()
    before, wall_s = cpu_by_thread(), time.monotonic()
    await asyncio.sleep(seconds)
    wall_s = time.monotonic() - wall_s
    threads = {name: 100 * (cpu_s - before[name]) / wall_s for name, cpu_s in cpu_by_thread().items() if name in before}
    await monitor.close()
    stub_percent = threads.pop("sensors-nvml-events", 0.0)
    percent = sum(threads.values())
    values = [reading.value for reading in snapshots[-1].readings.values()]
    bare_s = time.process_time()
    for _ in range(10):
        await asyncio.sleep(interval_s)
    bare_s = time.process_time() - bare_s
    return {
        "hz": 1 / interval_s,
        "snapshots": len(snapshots),
        "readings": len(values),
        "with_value": sum(value is not None for value in values),
        "cpu_ms_per_snapshot": round(10 * percent * wall_s / len(snapshots), 3),
        "core_percent": round(percent, 3),
        "threads_percent": {name: round(share, 3) for name, share in threads.items()},
        "stub_events_percent": round(stub_percent, 3),
        "bare_timer_percent": round(10 * bare_s / interval_s, 3),  # what waking up alone costs on this machine
    }


def main() -> None:
    """Measure both rates in a child that loads the stub, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for interval_s in (1.0, 0.1):
            print(json.dumps(asyncio.run(measure(interval_s, arguments.seconds))), flush=True)
        return
    if reason := StubNvml.missing():
        parser.exit(2, f"cannot measure: {reason}\n")
    with tempfile.TemporaryDirectory() as folder:
        stub = StubNvml(Path(folder)).start(gpus=arguments.gpus)
        command = [sys.executable, __file__, "--child", "--seconds", str(arguments.seconds)]
        subprocess.run(command, env={**os.environ, **stub.environment()}, check=True)


if __name__ == "__main__":
    main()
