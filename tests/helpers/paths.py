"""Places that tests need by name."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
AT_STAGE = TESTS / "helpers" / "at_stage"
SLURM = TESTS / "helpers" / "slurm"
