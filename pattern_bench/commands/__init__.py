"""The commands, ``python -m pattern_bench`` and its sisters: arguments, errors, exit codes. See README.md."""
