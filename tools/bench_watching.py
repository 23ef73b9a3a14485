"""What the box's watch over itself costs: throughput with sensors, governor, recorder and memory ledger, against next to none.

    python tools/bench_watching.py [--rounds 10] [--seconds 2] [--interval 0.1] [--json]

Two appliances serve the same model on private sockets. Each round loads both, one right after the other, in turns which comes
first; the ratio within a round counts, since a machine is faster now and slower then. Prints the median ratio and its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BARE = """[governor]
enabled = false
[recorder]
enabled = false
[memory]
enabled = false
[sensors]
interval_s = 60.0
"""
START_S = 60.0


class Served:
    """An appliance of this checkout with that configuration."""

    def __init__(self, folder: Path, extra: str) -> None:
        models = folder / "models"
        shutil.copytree(ROOT / "models" / "digits", models / "digits")
        config = folder / "appliance.toml"
        self.socket = folder / "http.sock"
        config.write_text(
            f'runtime_dir = "{folder}"\n[http]\nport = 0\n[zmq]\ntcp = "none"\nevents_tcp = "none"\n'
            f'[repository]\npath = "{models}"\n{extra}'
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "appliance", "serve", "--config", str(config)],
            cwd=ROOT,
            stderr=(folder / "log").open("w"),
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )
        end = time.monotonic() + START_S
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the appliance does not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def per_second(self, concurrency: int, seconds: float) -> float:
        """Answered requests a second."""
        command = [sys.executable, "-m", "appliance", "bench", "digits", "--json", "--url", f"unix:{self.socket}"]
        command += ["--concurrency", str(concurrency), "--seconds", str(seconds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
        return float(rows[0]["requests_s"])

    def cpu_s(self) -> float:
        """CPU seconds of the front so far."""
        import psutil

        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(START_S)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two samples of the watched one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = Path(place, "watched"), Path(place, "bare")
        for folder in folders:
            folder.mkdir()
        watched, bare = Served(folders[0], f"[sensors]\ninterval_s = {options.interval}\n"), Served(folders[1], BARE)
        try:
            result = compare(watched, bare, options)
        finally:
            watched.close()
            bare.close()
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"watched / bare, requests a second, {options.rounds} rounds: median {result['ratio_median']:.3f}")
    print(f"quartiles {result['ratio_low']:.3f} to {result['ratio_high']:.3f}")
    print(f"an idle front takes {result['idle_watched']:.2%} of a core watched, {result['idle_bare']:.2%} bare")


def compare(watched: Served, bare: Served, options: argparse.Namespace) -> dict[str, Any]:
    """The ratios of all rounds, and what an idle front takes of a core."""
    ratios = []
    for number in range(options.rounds):
        pair = (watched, bare) if number % 2 else (bare, watched)
        found = {served: served.per_second(options.concurrency, options.seconds) for served in pair}
        ratios.append(found[watched] / found[bare])
        print(f"round {number + 1}: {found[watched]:.0f} / {found[bare]:.0f} = {ratios[-1]:.3f}", file=sys.stderr)
    idle = {}
    for name, served in (("watched", watched), ("bare", bare)):
        before, begun = served.cpu_s(), time.monotonic()
        time.sleep(10)
        idle[f"idle_{name}"] = (served.cpu_s() - before) / (time.monotonic() - begun)
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {"ratios": ratios, "ratio_low": low, "ratio_median": median, "ratio_high": high, **idle}


if __name__ == "__main__":
    main()
