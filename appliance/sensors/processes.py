"""Our own processes: memory, CPU time, threads and open files of each, from one small file of /proc a process. Part of `host.py`.

`/proc/<pid>/stat` tells all but the open files in one read (proc_pid_stat(5)); psutil opens six files for it. A pid that was
given to another process is known by its start time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from appliance.core import quantities as q
from appliance.core.quantities import Quantity, label
from appliance.core.readings import Reading, measured, missing
from appliance.sensors.base import UnreadableError, names_in, read_text

MAX_PROCESSES = 256
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

UTIME, STIME, THREADS, START, RSS_PAGES = 11, 12, 17, 19, 21
"""Places in `stat` after the name, which is in brackets and may hold blanks; proc_pid_stat(5) counts them from 1, at the pid."""


class Processes:
    """`sample` is told the names and pids each time."""

    def __init__(self, folder: Path = Path("/proc")) -> None:
        self._folder = folder
        self._before: dict[str, tuple[int, int, int, float]] = {}

    def sample(self, wanted: Mapping[str, int], now_s: float) -> dict[str, Reading]:
        """Four readings a process; CPU load is that since the last sample, so the first one has none."""
        found: dict[str, Reading] = {}
        seen = {}
        for name, pid in list(wanted.items())[:MAX_PROCESSES]:
            values: dict[Quantity, float | None] = dict.fromkeys(
                (q.PROCESS_RSS, q.PROCESS_CPU, q.PROCESS_FDS, q.PROCESS_THREADS)
            )
            reason = "known from the second sample on"
            try:
                fields = read_text(self._folder / str(pid) / "stat").rpartition(")")[2].split()
                start, ticks = int(fields[START]), int(fields[UTIME]) + int(fields[STIME])
                values[q.PROCESS_RSS] = int(fields[RSS_PAGES]) * PAGE_BYTES
                values[q.PROCESS_THREADS] = int(fields[THREADS])
            except UnreadableError as error:
                reason = "not permitted" if str(error) == "not permitted" else "the process has ended"
            except (ValueError, IndexError):
                reason = "its stat file is not as expected"
            else:
                values[q.PROCESS_FDS] = self._open_files(pid)
                before = self._before.get(name)
                if before is not None and before[:2] == (pid, start) and now_s > before[3]:
                    values[q.PROCESS_CPU] = 100.0 * (ticks - before[2]) / TICKS_PER_S / (now_s - before[3])
                seen[name] = (pid, start, ticks, now_s)
            for quantity, value in values.items():
                why = "not permitted" if quantity is q.PROCESS_FDS and name in seen else reason
                reading = missing(quantity, why, now_s) if value is None else measured(quantity, value, now_s)
                found[quantity.name(label(name))] = reading
        self._before = seen
        return found

    def _open_files(self, pid: int) -> int | None:
        folder = self._folder / str(pid) / "fd"
        try:
            # its size is their number since Linux 6.2; before that it is 0
            return folder.stat().st_size or len(names_in(folder))
        except OSError:
            return None
