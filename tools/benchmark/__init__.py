"""The parts of `tools/bench.py`: cells, networks, limits, processes, rounds, targets, report."""
