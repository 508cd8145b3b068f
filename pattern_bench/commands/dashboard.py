"""``python -m pattern_bench.dashboard DIR… --project P --entity E``: W&B views and a W&B report of what runs measured.
``reporting/dashboard.py`` says what is in them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from pattern_bench.commands.entry import run_command, say
from pattern_bench.errors import UserError
from pattern_bench.results.schema import write_json
from pattern_bench.tracking.wandb_server import reachable


def dashboard(folders: Sequence[str], project: str, entity: str, output: Path) -> list[str]:
    """Write the specification of views and report into a file, and make them on W&B's server where that can be.

    Args:
        folders: run folders, or folders of runs.
        project: the W&B project that holds the runs.
        entity: the W&B user or team.
        output: the file.

    Returns:
        Lines that say what was done.

    Raises:
        UserError: where the package wandb-workspaces is missing, there is no complete run, the file cannot be written,
            or the server refuses.
    """
    try:
        from pattern_bench.reporting import dashboard
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "wandb_workspaces":
            raise
        raise UserError("dashboards need wandb-workspaces: pip install 'pattern_bench[dashboard]'") from error
    views, page = dashboard.build(entity, project, folders)
    try:
        write_json(output, dashboard.specification(views, page))
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror}): choose another file") from error
    said = [f"{len(views)} views and a report: {output}"]
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or not reachable():
        return [*said, "not sent, for want of a W&B key or an answer: with both, the same command makes them on W&B"]
    return said + dashboard.save(views, page)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pattern_bench.dashboard", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="run folders, or folders of runs (multirun too)")
    parser.add_argument("--project", required=True, help="the W&B project that holds the runs")
    parser.add_argument("--entity", required=True, help="the W&B user or team that the project belongs to")
    parser.add_argument(
        "--output", type=Path, default=Path("dashboard.json"), help="the specification (default: dashboard.json)"
    )
    options = parser.parse_args(arguments)
    run_command(lambda: say("\n".join(dashboard(options.folders, options.project, options.entity, options.output))))
