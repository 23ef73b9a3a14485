"""A process that records and says what is on the disk: a number a line, each after its commit, until it is killed."""

from __future__ import annotations

import sys
from pathlib import Path

from appliance.recording.writer import Item, RecordedEvent, Sample, Writer


def main() -> None:
    writer = Writer(Path(sys.argv[1]), 64 << 20, run_id="run", boot_id="boot")
    begin = int(sys.argv[2])
    writer.begin(1.8e9 + begin, float(begin))
    number = begin
    while True:
        number += 1
        wall, monotonic = 1.8e9 + number, float(number)
        batch: list[Item] = [
            Sample(wall, monotonic, {f"s{index}": float(number) for index in range(60)}),
            RecordedEvent(wall, monotonic, "e", "info", {"n": number}),
        ]
        writer.apply(batch)
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
