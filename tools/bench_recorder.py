"""What recording costs: CPU time, wall time and bytes of a second at N series, and how long questions take.

    .venv/bin/python tools/bench_recorder.py [--series 60] [--seconds 300] [--folder DIR]

Commits one second at a time, as the appliance does, without waiting between them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from appliance.recording.reader import RecordReader
from appliance.recording.writer import Sample, Writer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", type=int, default=60)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; else a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "recorder.sqlite3"
        writer = Writer(path, 256 << 20, run_id="bench", boot_id="bench")
        writer.begin(1.8e9, 0.0)
        took, cpu = [], time.process_time()
        for second in range(options.seconds):
            values = {f"series{number}": second + number / 7 for number in range(options.series)}
            begun = time.perf_counter()
            writer.apply([Sample(1.8e9 + second, float(second), values)])
            writer.keep_within_budget()
            took.append((time.perf_counter() - begun) * 1e3)
        cpu_ms = (time.process_time() - cpu) * 1e3 / options.seconds
        used = writer.used_bytes / options.seconds
        begun = time.perf_counter()
        RecordReader(path).history(["series0", "series1"], since=1.8e9, until=2e9, points=300)
        asked = (time.perf_counter() - begun) * 1e3
        writer.close()
    took.sort()
    print(f"{options.series} series, {options.seconds} seconds recorded")
    print(f"  CPU {cpu_ms:.2f} ms a second; commit {statistics.median(took):.2f} ms median, {took[-1]:.2f} ms longest")
    print(f"  {used:.0f} bytes a second in the file; a question about two series {asked:.1f} ms")


if __name__ == "__main__":
    main()
