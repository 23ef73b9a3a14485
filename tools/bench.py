"""Measures the appliance against what cannot be beaten, in one run.

The limits are the engine alone in a process and a bare echo over the same transport with the same client. They are measured
beside each cell, since these machines are noisy, and every ratio is a median over rounds. Loopback only.

    python tools/bench.py --quick
    python tools/bench.py --cells digits:zmq-ipc:1,16,64 digits:http-binary:500/s --rounds 5 --json

The exit status is 1 if a floor was missed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from tools.benchmark import report as reports
from tools.benchmark.cells import SUBJECTS, parse, standard
from tools.benchmark.rounds import Settings, measure_all


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of the cells that the targets need")
    parser.add_argument(
        "--cells", nargs="+", default=[], help="model:transport:LOAD[,LOAD…]; LOAD is in flight or RATE/s"
    )
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="all cells of these models only")
    parser.add_argument("--seconds", type=float, help="per cell and round (2, quick: 1)")
    parser.add_argument("--rounds", type=int, help="3, quick: 1")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    return parser


def main() -> int:
    """Measure, print, and say by the exit status whether every floor was reached."""
    parser = arguments()
    options = parser.parse_args()
    try:
        cells = [cell for text in options.cells for cell in parse(text)]
    except ValueError as error:
        parser.error(str(error))
    cells = cells or standard(options.model or list(SUBJECTS), quick=options.quick)
    settings = Settings(
        rounds=options.rounds or (1 if options.quick else 3),
        tries=1 if options.quick else 3,
        cell_s=options.seconds or (1.0 if options.quick else 2.0),
        sweep_s=0.1 if options.quick else 0.2,
        beside_s=0.15 if options.quick else 0.3,
    )
    found = measure_all(cells, settings, lambda text: print(text, file=sys.stderr, flush=True))
    if options.json:
        print(json.dumps(reports.document(cells, found, shlex.join(sys.argv)), indent=1))
    elif options.markdown:
        print(reports.markdown(reports.pages(cells, found)))
    else:
        reports.print_tables(reports.pages(cells, found), Console(width=None if sys.stdout.isatty() else 200))
    return 1 if any(verdict.word == "missed" for verdict in reports.judge(cells, found)) else 0


if __name__ == "__main__":
    sys.exit(main())
