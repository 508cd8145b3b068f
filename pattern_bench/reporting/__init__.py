"""What ``python -m pattern_bench.report`` is made of: runs are found, laid together, and shown."""
