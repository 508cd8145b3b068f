"""What stands behind ``python -m pattern_bench`` and its sisters: arguments, errors, exit codes."""
