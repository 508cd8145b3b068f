"""The report on many runs, and the comparison of two sets of runs: tables, figures and a page in a folder."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from pattern_bench.errors import UserError
from pattern_bench.plotting.figures import draw_degradation, draw_rho
from pattern_bench.reporting import tables
from pattern_bench.reporting.comparison import compare, comparison_sections, said
from pattern_bench.reporting.gathering import Conflict, Gathered, gather
from pattern_bench.reporting.page import write_page
from pattern_bench.reporting.sections import SWEPT, report_sections
from pattern_bench.results.schema import write_csv

WANDB = "wandb://"
MOST_LINES = 8
"""Runs or jobs that are named on the terminal, of each kind."""


@contextmanager
def folders_of(names: Sequence[str]) -> Iterator[list[tuple[Path, str]]]:
    """Yield the folders that ``names`` stand for, each with its name; W&B projects are downloaded, and removed after.

    Args:
        names: folders, or W&B projects as ``wandb://ENTITY/PROJECT``.

    Raises:
        UserError: where a project cannot be downloaded.
    """
    with tempfile.TemporaryDirectory(prefix="pattern_bench-") as temporary:
        folders = []
        for place, name in enumerate(names):
            if name.strip("/") == WANDB.strip("/"):
                raise UserError(f"DIR={name} names no W&B project: give {WANDB}ENTITY/PROJECT")
            if name.startswith(WANDB):
                from pattern_bench.tracking.wandb_server import download

                folder = Path(temporary) / str(place)
                folder.mkdir()
                download(name.removeprefix(WANDB), folder)
            else:
                folder = Path(name).expanduser()
            folders.append((folder, name))
        yield folders


def report(names: Sequence[str], output: Path) -> list[str]:
    """Write tables, figures and page of all runs below some folders; return lines that say what was done.

    Args:
        names: see :func:`folders_of`.
        output: the folder to write into; made where it is missing.

    Raises:
        UserError: where there is no complete run, files are damaged, or ``output`` cannot be made.
        OSError: where a file cannot be written.
    """
    with folders_of(names) as folders:
        gathered = gather(folders)
        _make(output)
        rho = tables.rho_table(gathered.rho, gathered.bootstrap, gathered.missing_cells)
        tables.write_table(rho, output / "fig3")
        drawn = ["index.html", "fig3.csv", "fig3.md", "fig3.tex"]
        if draw_rho(gathered.rho, output / "fig3.png", gathered.bootstrap, gathered.missing_cells):
            drawn.append("fig3.png")
        lines = [counted(len(gathered.runs), "run")]
        if len(gathered.degradation):
            missing = gathered.missing_curves
            curves = tables.degradation_table(gathered.degradation, tables.area_intervals(gathered.curves), missing)
            tables.write_table(curves, output / "fig4a", tables.shown_degradation(curves, missing))
            draw_degradation(gathered.degradation, output / "fig4a.png", missing)
            drawn += ["fig4a.csv", "fig4a.md", "fig4a.tex", "fig4a.png"]
        else:
            lines.append("no run has a degradation curve, so there is no Fig. 4a")
        write_csv(output / "missing.csv", tables.missing_table(gathered))
        write_csv(output / "conflicts.csv", tables.conflict_table(gathered.conflicts))
        lines += [*left_out_lines(rho), *conflict_lines(gathered.conflicts), *missing_lines(gathered)]
        command = shlex.join(["python", "-m", "pattern_bench.report", *names, "--output", str(output)])
        models = ", ".join(sorted({cell[0] for cell in gathered.cells}))
        lead = f"{counted(len(gathered.runs), 'run')} of {models}. Which explanation of the network should you believe?"
        write_page(
            output / "index.html", "Signal estimators and explanations",
            {"lead": lead, "sections": report_sections(gathered, rho, command), "version": version("pattern_bench")},
        )  # fmt: skip
    return [*lines, f"{output}: {' '.join([*drawn, 'missing.csv', 'conflicts.csv'])}"]


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be made ({error.strerror}): choose another folder") from error


def counted(number: int, what: str) -> str:
    """Return the number with its noun.

    >>> counted(1, "run"), counted(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def left_out_lines(rho: pd.DataFrame) -> list[str]:
    """Say how many live neurons Fig. 3, the table ``rho``, leaves out, if any."""
    cells = rho[rho.left_out > 0]
    if cells.empty:
        return []
    said = f"{cells.left_out.sum()} values of other live ones are left out, in {counted(len(cells), 'cell')}"
    return [f"Fig. 3 is over the neurons that are live under all estimators: {said} (left_out)"]


def conflict_lines(conflicts: Sequence[Conflict]) -> list[str]:
    """Say which runs replaced others, a line for each pair, at most MOST_LINES of them."""
    if not conflicts:
        return []
    cells = sum("layer" in conflict.where for conflict in conflicts)
    curves = len(conflicts) - cells
    pairs: dict[tuple[str, str], list[Conflict]] = {}
    for conflict in conflicts:
        pairs.setdefault((conflict.kept.name, conflict.replaced.name), []).append(conflict)
    lines = [f"{counted(cells, 'cell')} and {counted(curves, 'curve')} of earlier runs replaced by later ones:"]
    for (kept, replaced), several in sorted(pairs.items(), key=lambda pair: -len(pair[1]))[:MOST_LINES]:
        widest = max(several, key=lambda c: abs(c.kept_mean - c.replaced_mean) if c.kept_mean == c.kept_mean else 0.0)
        # What a sweep does not set is more likely to be unnoticed.
        differing = sorted(widest.settings(), key=lambda name: name.split(".")[0] in SWEPT)
        settings = ", ".join(differing[:4]) or "no setting"
        what = " ".join(value for key, value in widest.where.items() if key in ("layer", "estimator", "method"))
        lines.append(
            f"  {kept} instead of {replaced}: {len(several)}, such as {what}, mean {widest.kept_mean:.4f} instead of "
            f"{widest.replaced_mean:.4f} (other: {settings})"
        )
    return lines + ([f"  and {len(pairs) - MOST_LINES} more pairs of runs"] if len(pairs) > MOST_LINES else [])


def missing_lines(gathered: Gathered) -> list[str]:
    """Say which jobs are missing, a line each, at most MOST_LINES of them; and the commands that run them."""
    jobs = gathered.missing_jobs
    lines = []
    if jobs:
        lines.append(f"missing: {counted(len(jobs), 'job')}")
        lines += [f"  {job.folder}: {' '.join(job.overrides)}" for job in jobs[:MOST_LINES]]
        lines += [f"  and {len(jobs) - MOST_LINES} more"] if len(jobs) > MOST_LINES else []
        commands = dict.fromkeys(job.command for job in jobs)
        lines += ["what runs them:", *(f"  {command}" for command in list(commands)[:MOST_LINES])]
    if gathered.missing_cells or gathered.missing_curves:
        cells, curves = counted(len(gathered.missing_cells), "cell"), counted(len(gathered.missing_curves), "curve")
        lines.append(f"missing: {cells} of Fig. 3 and {curves} of Fig. 4a")
    return lines


def comparison(names: Sequence[str], output: Path) -> list[str]:
    """Write what changed from the runs in the first of ``names`` to those in the second; return lines that say it.

    Args:
        names: two of them, see :func:`folders_of`.
        output: the folder to write into; made where it is missing.

    Raises:
        UserError: as for :func:`report`.
        OSError: where a file cannot be written.
    """
    with folders_of(names) as folders:
        a, b = (gather([folder]) for folder in folders)
        _make(output)
        every, settings = compare(a, b, output)
        command = shlex.join(["python", "-m", "pattern_bench.report", "--compare", *names, "--output", str(output)])
        write_page(
            output / "index.html", "What changed",
            {"lead": f"From {counted(len(a.runs), 'run')} in {names[0]} (A) to {len(b.runs)} in {names[1]} (B).",
             "sections": comparison_sections(a, b, every, settings, command), "version": version("pattern_bench")},
        )  # fmt: skip
    missing = [line for side in (a, b) for line in missing_lines(side)]
    return [*said(every, settings), *missing, f"{output}: index.html compare.md compare.csv"]
