"""The tables of a report: Fig. 3, Fig. 4a, the overview of both, what is missing, and where runs disagreed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pattern_bench.reporting.gathering import CELL, CURVE, PANEL, Cell, Conflict, Gathered
from pattern_bench.reporting.runs import Run
from pattern_bench.results.labels import RANDOM_ORDER, ordered, plain
from pattern_bench.results.schema import as_cell, in_cells, of_same_neurons, standard_errors, write_csv
from pattern_bench.storage.atomic import write_file

AREA = "area over the curve"
COMPLETE, MISSING, UNDEFINED = "complete", "missing", "undefined"
"""The status of a cell: without a live neuron, or under S_x, whose residual is zero, rho is undefined."""
CONFLICT_COLUMNS = (*CELL, "method", "kept", "replaced", "kept_mean", "replaced_mean", "settings")
MISSING_COLUMNS = (*CELL, "method", "folder", "overrides", "command")


def rho_table(rho: pd.DataFrame, bootstrap: pd.DataFrame, missing: Sequence[Cell] = ()) -> pd.DataFrame:
    """Return Fig. 3 as a table: mean, median and quartiles of rho by layer and estimator, over the neurons that are
    live under all estimators of the layer; with standard errors where images were drawn again, of mean and median over
    the estimator's own live neurons, which is what runs keep of a resample; the status; and how many live neurons are
    left out, since another estimator has no rho for them. A row of its own for each ``missing`` cell."""
    groups = rho.groupby(CELL, sort=False)
    compared = of_same_neurons(rho).groupby(CELL, sort=False).rho
    quantiles: Any = compared.quantile(np.array([0.25, 0.5, 0.75])).unstack()
    table = pd.DataFrame(
        {
            "mean": compared.mean(),
            "median": quantiles[0.5],
            "q25": quantiles[0.25],
            "q75": quantiles[0.75],
            "neurons": groups.size().astype("Int64"),
            "dead": groups.dead.sum().astype("Int64"),
        }
    )
    if len(bootstrap):
        table = table.join(standard_errors(bootstrap, CELL).add_prefix("standard_error_"))
    table["status"] = table["mean"].isna().map({True: UNDEFINED, False: COMPLETE})
    table["left_out"] = (groups.rho.count() - compared.count()).astype("Int64")
    index = pd.MultiIndex.from_tuples([*table.index, *missing], names=CELL)
    table = table.reindex(index).fillna({"status": MISSING})
    # A layer's place in its own network; the models keep theirs.
    places = rho.groupby(["model", "data", "layer"]).layer_index.min()
    table["place"] = places.reindex(index.droplevel(["criterion", "probe", "estimator"])).to_numpy()
    rank = {name: place for place, name in enumerate(ordered(index.get_level_values("estimator")))}
    table["rank"] = index.get_level_values("estimator").map(rank)
    table = (
        table.reset_index()
        .astype(dict.fromkeys(CELL, str))
        .sort_values([*PANEL, "place", "layer", "rank"], kind="stable", ignore_index=True)
    )
    return table.drop(columns=["place", "rank"])


Intervals = dict[Cell, list[float]]
"""Ends of the interval of each area over the curve, by model, data, estimator and method."""


def area_intervals(curves: dict[Cell, Run]) -> Intervals:
    """Return the 95 % intervals of the areas over the curves, as the runs wrote them."""
    known = {curve: run.summary.get("area_over_curve_interval", {}).get(curve[-1]) for curve, run in curves.items()}
    return {curve: ends for curve, ends in known.items() if ends is not None}


def areas(degradation: pd.DataFrame) -> pd.Series:
    """Return the area over each curve: the mean, over all steps, of how far the probability has fallen. By CURVE."""
    by_step = degradation.sort_values("step").groupby(CURVE, sort=False).probability_mean
    return by_step.first() - by_step.mean()


def degradation_table(degradation: pd.DataFrame, intervals: Intervals, missing: Sequence[Cell] = ()) -> pd.DataFrame:
    """Return Fig. 4a as a table: mean probability by step, a column per estimator (and method, where there are
    several); the area over the curve last, after the ends of its 95 % interval. A ``missing`` curve has its column,
    too."""
    wide = degradation.pivot_table(
        index=["model", "data", "step"], columns=["estimator", "method"], values="probability_mean"
    )
    pairs = {*wide.columns, *((name, method) for _, _, name, method in missing)}
    names = [name for name in ordered(name for name, _ in pairs) if name != "none"]
    curves = [(name, method) for name in [*names, "none"] for method in sorted(m for n, m in pairs if n == name)]
    several = len(curves) > len(names) + 1
    wide = wide.reindex(columns=pd.MultiIndex.from_tuples(curves, names=["estimator", "method"]))
    by_curve = areas(degradation)
    tables = []
    for (model, data), table in wide.groupby(level=["model", "data"], sort=False):
        panel = (str(model), str(data))
        rows: dict[Any, Any] = {
            (*panel, step): values for (*_, step), values in zip(table.index, table.to_numpy(), strict=True)
        }
        for end, bound in enumerate(("from", "to")):
            ends = [intervals.get((*panel, *curve), [float("nan")] * 2)[end] for curve in curves]
            rows[(*panel, f"{AREA}, 95 % {bound}")] = ends
        rows[(*panel, AREA)] = [by_curve.get((*panel, *curve), float("nan")) for curve in curves]
        tables.append(pd.DataFrame.from_dict(rows, orient="index", columns=[_title(*c, several) for c in curves]))
    joined = pd.concat(tables)
    joined.index = pd.MultiIndex.from_tuples(joined.index.tolist(), names=["model", "data", "step"])
    return joined.reset_index()


def _title(estimator: str, method: str, several: bool) -> str:
    if estimator == "none":
        return method.replace(RANDOM_ORDER, plain(RANDOM_ORDER))
    return f"{estimator} {method}" if several else estimator


def shown_degradation(table: pd.DataFrame, missing: Sequence[Cell]) -> pd.DataFrame:
    """Return the table of Fig. 4a with the word ``missing`` in the cells of ``missing`` curves."""
    shown = table.astype(object)
    for model, data, estimator, method in missing:
        rows = (table.model == model) & (table.data == data)
        for several in (True, False):
            if (title := _title(estimator, method, several)) in table.columns:
                shown.loc[rows, title] = MISSING
                break
    return shown


@dataclass(frozen=True)
class Line:
    """A line of the overview.

    Args:
        names: values of PANEL and the estimator; criterion and probe are empty, and the estimator ``none``, for
            methods without patterns.
        mean, error: of rho over the neurons of all layers that are live under all estimators of the panel, and its
            standard error over images; NaN where there is none.
        neurons, left_out: how many that are, and how many other live ones it has.
        layers, lacking: how many layers have a value, and how many are missing.
        areas: of each method, the area over the curve and the ends of its 95 % interval (NaN where not known); None
            where the curve is missing. A method that was not asked for is not in it.
        accuracy: of the network; NaN where it was not measured.
    """

    names: Cell
    mean: float
    error: float
    neurons: int
    left_out: int
    layers: int
    lacking: int
    areas: dict[str, tuple[float, float, float] | None]
    accuracy: float


def overview(gathered: Gathered) -> list[Line]:
    """Return mean ρ, areas and accuracy: a line per model, data, criterion, probe and estimator."""
    by_curve, intervals = areas(gathered.degradation), area_intervals(gathered.curves)
    measured: dict[Cell, dict[str, tuple[float, float, float] | None]] = {}
    for curve in [*gathered.curves, *gathered.missing_curves]:
        low, high = intervals.get(curve, (math.nan, math.nan))
        value = (float(by_curve[curve]), low, high) if curve in gathered.curves else None
        measured.setdefault(curve[:3], {})[curve[3]] = value
    by = [*PANEL, "estimator"]
    compared = of_same_neurons(gathered.rho, PANEL)
    groups = compared.groupby(by, sort=False).rho
    means, neurons, live = groups.mean(), groups.count(), gathered.rho.groupby(by, sort=False).rho.count()
    errors = errors_over_layers(compared, gathered.bootstrap)
    present, lacking = (
        Counter((*cell[:4], cell[5]) for cell in cells) for cells in (gathered.cells, gathered.missing_cells)
    )
    runs = {(*cell[:4], cell[5]): run for cell, run in gathered.cells.items()}
    runs |= {(model, data, "", "", "none"): run for (model, data, _, _), run in gathered.curves.items()}
    keys = dict.fromkeys([*present, *lacking, *((*curve[:2], "", "", "none") for curve in measured if "none" in curve)])
    lines = []
    for key in keys:
        accuracy = runs[key].accuracy.get("top1") if key in runs else None
        lines.append(
            Line(
                key,
                float(means.get(key, math.nan)),
                float(errors.get(key, math.nan)),
                int(neurons.get(key, 0)),
                int(live.get(key, 0) - neurons.get(key, 0)),
                present[key],
                lacking[key],
                measured.get((key[0], key[1], key[4]), {}),
                math.nan if accuracy is None else accuracy,
            )
        )
    rank = {name: place for place, name in enumerate(ordered({line.names[4] for line in lines} - {"none"}))}
    return sorted(lines, key=lambda line: (*line.names[:2], line.names[2] == "", *line.names[2:4],
                                           rank.get(line.names[4], 99)))  # fmt: skip


def errors_over_layers(rho: pd.DataFrame, bootstrap: pd.DataFrame) -> pd.Series:
    """Return standard errors over images of the mean over all neurons that have a rho, by PANEL and estimator: the
    spread over resamples of the layers' means, each weighted with its number of such neurons. Only where all layers
    were drawn again."""
    live = rho.groupby(CELL).rho.count()
    drawn = bootstrap.groupby([*CELL, "resample"])["mean"].first().unstack()
    drawn = drawn.reindex(live.index[live > 0])
    weights = live.reindex(drawn.index)
    by = [*PANEL, "estimator"]
    # skipna=False: a layer that was not drawn again makes the whole unknown.
    sums = drawn.mul(weights, axis=0).groupby(by).sum(min_count=1, skipna=False)
    return sums.div(weights.groupby(by).sum(), axis=0).std(axis=1)


def conflict_table(conflicts: Iterable[Conflict]) -> pd.DataFrame:
    """Return a row per result that a later run replaced by another number, and the settings that differ."""
    rows = [
        {
            **conflict.where, "kept": conflict.kept.name, "replaced": conflict.replaced.name,
            "kept_mean": conflict.kept_mean, "replaced_mean": conflict.replaced_mean,
            "settings": " ".join(conflict.settings()),
        }
        for conflict in conflicts
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(CONFLICT_COLUMNS))


def missing_table(gathered: Gathered) -> pd.DataFrame:
    """Return a row per missing job, cell and curve; a job's has its folder, overrides and command, the others their
    names."""
    rows: list[dict[str, Any]] = [
        {"folder": job.folder, "overrides": " ".join(job.overrides), "command": job.command}
        for job in gathered.missing_jobs
    ]
    rows += [dict(zip(CELL, cell, strict=True)) for cell in gathered.missing_cells]
    rows += [dict(zip(CURVE, curve, strict=True)) for curve in gathered.missing_curves]
    return pd.DataFrame(rows, columns=list(MISSING_COLUMNS))


def in_markdown(text: str) -> str:
    """Return text as a cell of a Markdown table that shows just this."""
    return re.sub(r"([|<])", r"\\\1", _in_one_line(text))


def _in_one_line(text: str) -> str:
    return as_cell(" ".join(text.split()))


def write_table(table: pd.DataFrame, stem: Path, shown: pd.DataFrame | None = None) -> None:
    """Write a table as CSV, Markdown and LaTeX, the files ``stem`` with a suffix; the latter two rounded to four
    places, and of ``shown`` where it is given."""
    write_csv(stem.with_suffix(".csv"), table)
    shown = table if shown is None else shown
    rounded = shown.map(lambda value: f"{value:.4f}" if isinstance(value, float) and value == value else value)
    rounded = rounded.astype(object).where(shown.notna(), "–")
    markdown = in_cells(rounded, in_markdown).to_markdown(index=False, disable_numparse=True)
    write_file(stem.with_suffix(".md"), lambda file: file.write_text(markdown + "\n"))
    latex = (
        in_cells(rounded, _in_one_line)
        .style.hide(axis="index")
        .format(escape="latex")
        .format_index(escape="latex", axis=1)
    )
    write_file(stem.with_suffix(".tex"), lambda file: file.write_text(latex.to_latex(hrules=True)))
