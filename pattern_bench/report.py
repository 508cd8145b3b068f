"""``python -m pattern_bench.report DIR…``: gathers runs into the tables and figures of Fig. 3 and Fig. 4a."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pattern_bench.errors import UserError
from pattern_bench.files import write_file
from pattern_bench.results import (
    BOOTSTRAP_COLUMNS,
    DEGRADATION_COLUMNS,
    RHO_COLUMNS,
    ordered,
    standard_errors,
    write_csv,
)

CELL = ["model", "data", "criterion", "probe", "layer", "estimator"]
CURVE = ["model", "data", "estimator", "method"]
AREA = "area over the curve"
TYPES: dict[str, Any] = {
    "layer_index": int, "neuron": int, "rho": float, "dead": bool, "step": int, "probability_mean": float,
    "probability_std": float, "n": int, "resample": int, "mean": float, "median": float,
}  # fmt: skip
"""Of the columns that are no names."""


@dataclass(frozen=True)
class Run:
    """A complete run: its folder, when it ended, its summary and its tables."""

    folder: Path
    ended: float
    summary: dict[str, Any]
    rho: pd.DataFrame
    degradation: pd.DataFrame
    bootstrap: pd.DataFrame


def find_runs(folders: Sequence[str]) -> list[Run]:
    """Every complete run at or below ``folders`` (a run is complete when it has a ``summary.json``), oldest first.

    Raises:
        UserError: where a folder is missing, holds no complete run, or a run's files are damaged.
    """
    runs: dict[Path, Run] = {}
    for name in folders:
        root = Path(name).expanduser()
        if not root.is_dir():
            raise UserError(f"DIR={name} is not a folder: give run folders, or folders of runs")
        found = [Path(folder) for folder, _, files in os.walk(root) if "summary.json" in files]
        if not found:
            raise UserError(f"DIR={name} holds no complete run (none has a summary.json): run the job first")
        runs.update({folder.resolve(): _read(folder) for folder in found})
    return sorted(runs.values(), key=lambda run: run.ended)


def _read(folder: Path) -> Run:
    try:
        summary = json.loads((folder / "summary.json").read_text())
        tables = [_table(folder / "rho.csv", RHO_COLUMNS), _table(folder / "degradation.csv", DEGRADATION_COLUMNS)]
        file = folder / "bootstrap.csv"
        tables.append(_table(file, BOOTSTRAP_COLUMNS) if file.is_file() else pd.DataFrame(columns=BOOTSTRAP_COLUMNS))
        if not isinstance(summary, dict) or not isinstance(summary.get("area_over_curve_interval", {}), dict):
            raise ValueError("summary.json is not a summary")
        for ends in summary.get("area_over_curve_interval", {}).values():
            if not (isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)):
                raise ValueError(f"summary.json gives {ends} as an interval")
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"the run in {folder} is damaged ({error}): remove it or run it again") from error
    return Run(folder, (folder / "summary.json").stat().st_mtime, summary, *tables)


def _table(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    """
    Raises:
        ValueError: where a column is missing or holds what it cannot.
    """
    table = pd.read_csv(file, dtype={column: TYPES.get(column, str) for column in columns})
    if lacking := [column for column in columns if column not in table.columns]:
        raise ValueError(f"{file.name} lacks columns {lacking}: was it written by another version?")
    for column, kind in TYPES.items():
        if kind is float and column in columns and not (table[column].isna() | table[column].between(-1e9, 1e9)).all():
            raise ValueError(f"{file.name} holds what is no number in column {column}")
    if named := [column for column in columns if TYPES.get(column) is None and table[column].isna().any()]:
        raise ValueError(f"{file.name} has empty cells in columns {named}")
    if "probability_mean" in columns and table[["probability_mean", "step"]].isna().any(axis=None):
        raise ValueError(f"{file.name} has a step without a probability")
    return table


def merged(tables: Sequence[pd.DataFrame], key: list[str]) -> tuple[pd.DataFrame, int]:
    """The tables below one another; of the cells with the same ``key``, the last table's win. Also counts the cells
    that a later run replaced."""
    numbered = [table.assign(_run=number) for number, table in enumerate(tables) if len(table)]
    if not numbered:
        return tables[0], 0
    every = pd.concat(numbered, ignore_index=True)
    # What two runs agree on to the last digit, such as the random order's curve, is one result, not a conflict.
    every = every.drop_duplicates(subset=[column for column in every.columns if column != "_run"], keep="last")
    newest = every.groupby(key)["_run"].transform("max")
    kept = every[every["_run"] == newest].drop(columns="_run")
    return kept, len(every.groupby([*key, "_run"])) - len(kept.groupby(key))


def current_bootstrap(runs: Sequence[Run]) -> pd.DataFrame:
    """Resamples of each cell from the run whose rho is the latest; none where that run drew none."""
    tables: list[pd.DataFrame] = []
    done: set[Any] = set()
    for run in reversed(runs):
        cells = pd.MultiIndex.from_frame(run.bootstrap[CELL].astype(str))
        tables.append(run.bootstrap[~cells.isin(done)])
        done |= set(pd.MultiIndex.from_frame(run.rho[CELL].drop_duplicates().astype(str)))
    return pd.concat(tables, ignore_index=True)


def rho_table(rho: pd.DataFrame, bootstrap: pd.DataFrame) -> pd.DataFrame:
    """Fig. 3 as a table: mean, median and quartiles of rho over the live neurons of each layer and estimator; with
    standard errors of mean and median where images were drawn again."""
    keys = ["model", "data", "criterion", "probe", "layer_index", "layer", "estimator"]
    rank = {name: place for place, name in enumerate(ordered(rho.estimator))}
    groups = rho.groupby(keys, sort=True)
    table = pd.DataFrame(
        {
            "mean": groups.rho.mean(),
            "median": groups.rho.median(),
            "q25": groups.rho.quantile(0.25),
            "q75": groups.rho.quantile(0.75),
            "neurons": groups.size(),
            "dead": groups.dead.sum(),
        }
    )
    if len(bootstrap):
        table = table.join(standard_errors(bootstrap, keys).add_prefix("standard_error_"))
    table = table.sort_index(key=lambda level: level.map(rank) if level.name == "estimator" else level)
    return table.reset_index().drop(columns="layer_index")


Intervals = dict[Any, list[float]]
"""Of the area over the curve, by model, data, estimator and method."""


def area_intervals(runs: Sequence[Run]) -> Intervals:
    """The newest run's interval of each curve."""
    found: Intervals = {}
    for run in runs:
        known = run.summary.get("area_over_curve_interval", {})
        for model, data, estimator, method in run.degradation[CURVE].drop_duplicates().itertuples(index=False):
            if method in known:
                found[model, data, estimator, method] = known[method]
    return found


def degradation_table(degradation: pd.DataFrame, intervals: Intervals) -> pd.DataFrame:
    """Fig. 4a as a table: mean probability by step, a column per estimator (and method, where there are several);
    the area over the curve last, after the ends of its 95 % interval."""
    wide = degradation.pivot_table(
        index=["model", "data", "step"], columns=["estimator", "method"], values="probability_mean"
    )
    names = [name for name in ordered(degradation.estimator) if name != "none"]
    curves = [(name, method) for name in [*names, "none"] for method in wide.get(name, [])]
    several = len(curves) > len(names) + 1
    wide = wide[curves]

    def title(name: str, method: str) -> str:
        if name == "none":
            return method.replace("random_order", "random order")
        return f"{name} {method}" if several else name

    wide.columns = pd.Index([title(name, method) for name, method in curves])
    tables = []
    for (model, data), table in wide.groupby(level=["model", "data"], sort=False):
        steps = table.sort_index().astype(object)
        areas = (table.iloc[0] - table).mean()
        areas.name = (model, data, AREA)
        rows = []
        for end, bound in enumerate(("from", "to")):
            unknown = [float("nan")] * 2
            ends = [intervals.get((model, data, name, method), unknown)[end] for name, method in curves]
            rows.append(pd.Series(ends, index=wide.columns, name=(model, data, f"{AREA}, 95 % {bound}")))
        rows.append(areas)
        tables.append(pd.concat([steps, *(row.to_frame().T.astype(object) for row in rows)]))
    joined = pd.concat(tables)
    joined.index = pd.MultiIndex.from_tuples(joined.index.tolist(), names=["model", "data", "step"])
    return joined.reset_index()


def write_table(table: pd.DataFrame, stem: Path) -> None:
    """CSV, Markdown and LaTeX; the latter two rounded to four places."""
    write_csv(stem.with_suffix(".csv"), table)
    shown = table.map(lambda value: f"{value:.4f}" if isinstance(value, float) and value == value else value)
    shown = shown.astype(object).where(table.notna(), "–")
    markdown = shown.to_markdown(index=False, disable_numparse=True)
    write_file(stem.with_suffix(".md"), lambda file: file.write_text(markdown + "\n"))
    latex = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    write_file(stem.with_suffix(".tex"), lambda file: file.write_text(latex.to_latex(hrules=True)))


def report(folders: Sequence[str], output: Path) -> list[str]:
    """Writes tables and figures of all runs below ``folders`` into ``output``; returns lines that say what it did."""
    runs = find_runs(folders)
    rho, replaced = merged([run.rho for run in runs], CELL)
    degradation, replaced_curves = merged([run.degradation for run in runs], CURVE)
    bootstrap = current_bootstrap(runs)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be made ({error.strerror}): choose another folder") from error
    said = [f"{len(runs)} runs"]
    if replaced + replaced_curves:
        said.append(f"{replaced} cells and {replaced_curves} curves of earlier runs replaced by later ones")
    from pattern_bench.figures import draw_degradation, draw_rho

    write_table(rho_table(rho, bootstrap), output / "fig3")
    drawn = ["fig3.csv", "fig3.md", "fig3.tex"]
    if draw_rho(rho, output / "fig3.png", bootstrap):
        drawn.append("fig3.png")
    if len(degradation):
        write_table(degradation_table(degradation, area_intervals(runs)), output / "fig4a")
        draw_degradation(degradation, output / "fig4a.png")
        drawn += ["fig4a.csv", "fig4a.md", "fig4a.tex", "fig4a.png"]
    else:
        said.append("no run has a degradation curve, so there is no Fig. 4a")
    return [*said, f"{output}: {' '.join(drawn)}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pattern_bench.report", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="run folders, or folders of runs (multirun too)")
    parser.add_argument("--output", type=Path, default=Path("report"), help="where to write (default: report)")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(report(options.folders, options.output)))
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {error.filename or options.output} ({error.strerror}): free space")


if __name__ == "__main__":
    main()
