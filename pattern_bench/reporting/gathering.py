"""Lays the results of runs together: the latest complete run has each cell; what disagrees, and what is not there, is
named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pattern_bench.errors import UserError
from pattern_bench.reporting.runs import JOB, Pictures, Run, RunFolders, differing, read_pictures, read_runs
from pattern_bench.reporting.sweeps import (
    Names,
    Sweep,
    command_of,
    command_to_resume,
    expected_names,
    kind_of_run,
    read_overrides,
    read_sweep,
)
from pattern_bench.results.schema import BOOTSTRAP_COLUMNS

PANEL = ["model", "data", "criterion", "probe"]
CELL = [*PANEL, "layer", "estimator"]
CURVE = ["model", "data", "estimator", "method"]
Cell = tuple[str, ...]
"""Values of CELL, or of CURVE, in their order."""
ROUNDING = 1e-3
"""By what share of itself a result may differ with the order of sums in single precision: threads, chunks of images."""


@dataclass(frozen=True)
class Conflict:
    """A cell or curve for which a later run has other numbers than an earlier one."""

    where: dict[str, str]
    kept: Run
    replaced: Run
    kept_mean: float
    replaced_mean: float

    def settings(self) -> list[str]:
        """Return the settings, as dotted keys, in which the two runs differ."""
        return differing([self.kept.settings, self.replaced.settings])


@dataclass(frozen=True)
class MissingJob:
    """A job without a complete run: the folder of its sweep, or its own, its overrides, and what runs it."""

    kind: str
    folder: str
    overrides: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Gathered:
    """Results of many runs, laid together for a report.

    Args:
        runs: the complete ones, oldest first.
        pictures: of galleries and sanity checks.
        sweeps: by the name of their folder.
        rho, degradation, bootstrap: of each cell or curve, those of the run that has it.
        cells, curves: which run has it.
        conflicts: what was replaced by other numbers.
        missing_jobs: of sweeps, and others that were begun.
        missing_cells, missing_curves: what they would have filled, and layers that an estimator lacks.
    """

    runs: list[Run]
    pictures: list[Pictures]
    sweeps: dict[str, Sweep]
    rho: pd.DataFrame
    degradation: pd.DataFrame
    bootstrap: pd.DataFrame
    cells: dict[Cell, Run]
    curves: dict[Cell, Run]
    conflicts: list[Conflict]
    missing_jobs: list[MissingJob]
    missing_cells: list[Cell]
    missing_curves: list[Cell]


def gather(folders: Sequence[tuple[Path, str]]) -> Gathered:
    """Read and lay together everything at or below ``folders``, each with the name that it is called by.

    Raises:
        UserError: where a folder is missing or holds nothing of ours, none holds a complete run, or files are damaged.
    """
    below = RunFolders()
    for folder, name in folders:
        below.look(folder, name)
    if not below.complete[JOB]:
        names = " ".join(name for _, name in folders)
        raise UserError(f"DIR={names} holds no complete run (none has a summary.json): run the job first")
    runs = read_runs(below)
    rho, cells, conflicts, sources = latest(runs, "rho", CELL)
    degradation, curves, more, _ = latest(runs, "degradation", CURVE)
    sweeps = {name: sweep for folder, name in below.sweeps.items() if (sweep := read_sweep(folder)) is not None}
    missing = _missing_jobs(below, sweeps)
    expected = [known for job in missing if job.kind == JOB and (known := expected_names(job.overrides)) is not None]
    return Gathered(
        runs, read_pictures(below), sweeps, rho, degradation, _bootstrap(sources), cells, curves, conflicts + more,
        missing, _missing_cells(list(cells), expected), _missing_curves(curves, expected),
    )  # fmt: skip


def latest(
    runs: Sequence[Run], table: str, key: list[str]
) -> tuple[pd.DataFrame, dict[Cell, Run], list[Conflict], dict[Cell, list[Run]]]:
    """Lay one of the runs' tables together, cell by cell: the last run that has a cell, has it.

    Returns:
        The rows of all cells; which run has which; where an earlier run has other numbers; and which runs have the
        same numbers, latest first. What two runs agree on to ROUNDING is one result, not a conflict.
    """
    everything: dict[Cell, list[tuple[Run, pd.DataFrame]]] = {}
    for run in runs:
        for cell, rows in getattr(run, table).groupby(key, sort=False):
            everything.setdefault(cell, []).append((run, rows))
    column = "rho" if table == "rho" else "probability_mean"
    kept: dict[Cell, pd.DataFrame] = {}
    holders: dict[Cell, Run] = {}
    sources: dict[Cell, list[Run]] = {}
    conflicts: list[Conflict] = []
    for cell, versions in everything.items():
        newest, rows = versions[-1]
        kept[cell] = rows
        holders[cell] = newest
        sources[cell] = [newest]
        for run, others in reversed(versions[:-1]):
            if _same(rows, others):
                sources[cell].append(run)
                continue
            where = dict(zip(key, cell, strict=True))
            conflicts.append(Conflict(where, newest, run, rows[column].mean(), others[column].mean()))
    whole = _joined(kept, key) if kept else getattr(runs[-1], table)
    return whole, holders, conflicts, sources


def _joined(tables: dict[Cell, pd.DataFrame], key: list[str]) -> pd.DataFrame:
    """Return the rows of all cells below one another, the names in ``key`` as categories."""
    whole = pd.concat([rows.drop(columns=key) for rows in tables.values()], ignore_index=True)
    lengths = [len(rows) for rows in tables.values()]
    for place, column in enumerate(key):
        codes, names = pd.factorize(np.array([cell[place] for cell in tables], dtype=object))
        whole[column] = pd.Categorical.from_codes(np.repeat(codes, lengths), categories=pd.Index(names))
    return whole[list(next(iter(tables.values())).columns)]


def _same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    numbers = [name for name in one.columns if pd.api.types.is_numeric_dtype(one[name])]
    mine, its = (table[numbers].to_numpy(dtype=float) for table in (one, other))
    return mine.shape == its.shape and np.allclose(mine, its, rtol=ROUNDING, atol=1e-6, equal_nan=True)


def _bootstrap(sources: dict[Cell, list[Run]]) -> pd.DataFrame:
    """Resamples of each cell, of the latest of those runs that have its numbers and drew any."""
    drawn: dict[int, dict[Any, pd.DataFrame]] = {}
    parts = []
    for cell, runs in sources.items():
        for run in runs:
            if id(run) not in drawn:
                drawn[id(run)] = dict(iter(run.bootstrap.groupby(CELL, sort=False)))
            if cell in drawn[id(run)]:
                parts.append(drawn[id(run)][cell])
                break
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(BOOTSTRAP_COLUMNS))


def _missing_jobs(below: RunFolders, sweeps: dict[str, Sweep]) -> list[MissingJob]:
    complete = {kind: [(folder, read_overrides(folder)) for folder in below.complete[kind]] for kind in below.complete}
    missing = []
    for name, sweep in sweeps.items():
        done = {overrides for folder, overrides in complete[sweep.kind] if folder.is_relative_to(sweep.folder)}
        command = command_of(sweep.kind, sweep.arguments, Path(name))
        for job in sweep.jobs or ():
            if job not in done:
                missing.append(MissingJob(sweep.kind, name, job, command))
    for folder, name in below.begun.items():
        overrides, kind = read_overrides(folder) or (), kind_of_run(folder)
        inside = [sweep for sweep in sweeps.values() if folder.is_relative_to(sweep.folder)]
        if kind is not None and not any(overrides in (sweep.jobs or ()) for sweep in inside):
            missing.append(MissingJob(kind, name, overrides, command_to_resume(kind, Path(name))))
    return missing


def _missing_cells(known: list[Cell], expected: list[Names]) -> list[Cell]:
    """Cells that missing jobs would have filled, and within a panel, the layers that an estimator lacks and another
    has. Where a model's layers are not known, the setting stands in their place."""
    layers: dict[Cell, list[str]] = {}
    for model, data, *_, layer, _ in known:
        layers.setdefault((model, data), [])
        if layer not in layers[model, data]:
            layers[model, data].append(layer)
    panels: dict[Cell, tuple[list[str], list[str]]] = {}
    for *panel, layer, estimator in known:
        has = panels.setdefault(tuple(panel), ([], []))
        has[0].append(layer)
        has[1].append(estimator)
    wanted = [(*panel, *pair) for panel, has in panels.items() for pair in product(*map(dict.fromkeys, has))]
    for names in expected:
        of_model = layers.get((names.model, names.data), [])
        chosen = [name for name in of_model if any(one == "all" or fnmatchcase(name, one) for one in names.layer)]
        for probe, layer in product(names.probes, chosen or [", ".join(names.layer)]):
            wanted.append((names.model, names.data, names.criterion, probe, layer, names.estimator))
    present = set(known)
    return [cell for cell in dict.fromkeys(wanted) if cell not in present]


def _missing_curves(known: dict[Cell, Run], expected: list[Names]) -> list[Cell]:
    wanted = [(names.model, names.data, *names.curve) for names in expected if names.curve is not None]
    return [curve for curve in dict.fromkeys(wanted) if curve not in known]
