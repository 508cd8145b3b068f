"""``python -m pattern_bench.report DIR…``: lays runs together into the tables and figures of Fig. 3 and Fig. 4a, and
into a page, ``index.html``. With ``--compare A B`` it says what changed between two sets of runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pattern_bench.commands.entry import run_command, say
from pattern_bench.reporting.report import comparison, report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pattern_bench.report", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", metavar="DIR",
        help="run folders, folders of runs (multirun too), W&B's offline runs, or wandb://ENTITY/PROJECT",
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="say what changed from the runs in A to those in B"
    )
    parser.add_argument("--output", type=Path, default=Path("report"), help="where to write (default: report)")
    options = parser.parse_args(arguments)
    if bool(options.folders) == bool(options.compare):
        parser.error("give folders of runs, or --compare A B")
    command, names = (comparison, options.compare) if options.compare else (report, options.folders)

    def explain(error: Exception) -> str | None:
        if isinstance(error, OSError):
            return f"cannot write {error.filename or options.output} ({error.strerror}): free space"
        return None

    run_command(lambda: say("\n".join(command(names, options.output)), f"the report is in {options.output}"), explain)
