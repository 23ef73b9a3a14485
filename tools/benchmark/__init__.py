"""The pieces of `tools/bench.py`: models, limits, the server under test, cells, and the report."""
