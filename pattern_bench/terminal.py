"""What a job or a sweep found, as a table in the terminal that reads like Fig. 3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pattern_bench.names import plain
from pattern_bench.results import ordered


def show(summary: Mapping[str, Any], console: Console) -> None:
    """A row per layer: ρ(S) over its live neurons; below, accuracy and the area over the curve."""
    rho = summary["rho"]
    if rho["all"]["median"] is not None:
        console.print(_rho_table(summary))
    lines = []
    if summary["accuracy"] is not None:
        lines.append(f"accuracy {summary['accuracy']:.1%}")
    for method, area in summary["area_over_curve"].items():
        low, high = summary["area_over_curve_interval"][method]
        lines.append(f"area over the curve of {plain(method)}: {area:.3f} (95 %: {low:.3f} to {high:.3f})")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _rho_table(summary: Mapping[str, Any]) -> Table:
    title = f"ρ(S) of {plain(summary['estimator'])}: {summary['model']} on {summary['data']}"
    if (summary["criterion"], summary["probe"]) != ("all", "closed_form"):
        title += f", criterion {summary['criterion']}, probe {summary['probe']}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("neurons", "dead", "mean", "median", "quartiles"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("median, of 1", no_wrap=True)
    layers = summary["rho"]["layers"]
    for row in [*layers, *([{"layer": "all", **summary["rho"]["all"]}] if len(layers) > 1 else [])]:
        if row is not layers[-1] and row["layer"] == "all":
            table.add_section()
        if row["median"] is None:
            table.add_row(row["layer"], str(row["neurons"]), str(row["dead"]), "–", "–", "–", "")
            continue
        figures = (f"{row['mean']:.3f}", f"{row['median']:.3f}", f"{row['q25']:.2f} to {row['q75']:.2f}")
        bar = Bar(1, 0, min(1.0, max(0.0, row["median"])), width=12)
        table.add_row(row["layer"], str(row["neurons"]), str(row["dead"]), *figures, bar)
    return table


PANEL = ["model", "data", "criterion", "probe"]


def show_sweep(
    rho: pd.DataFrame, missing: Iterable[tuple[str, ...]], degradation: pd.DataFrame, console: Console
) -> None:
    """A table per model, data set, criterion and probe: the median of ρ(S) by layer and estimator; and one of the area
    over the curve.

    Args:
        rho: of all jobs, a row per neuron.
        missing: cells of the tables that no job has filled: model, data, criterion, probe, layer and estimator.
        degradation: curves of all jobs.
        console: where to.
    """
    medians = rho.groupby([*PANEL, "layer_index", "layer", "estimator"], observed=True).rho.median().reset_index()
    cells = [dict(zip([*PANEL, "layer", "estimator"], cell, strict=True)) for cell in missing]
    lacking = pd.DataFrame(cells, columns=[*PANEL, "layer", "estimator"])
    # Estimators with a row but no ρ have none by design.
    shown = medians.assign(text=medians.rho.map(lambda value: "–" if pd.isna(value) else f"{value:.3f}"))
    shown = pd.concat([shown, lacking.assign(text="missing")], ignore_index=True)
    for (model, data, criterion, probe), panel in shown.groupby(PANEL, sort=False, observed=True):
        title = f"median ρ(S): {model} on {data}, criterion {criterion}, probe {probe}"
        estimators = ordered(panel.estimator)
        console.print(title, style="bold", highlight=False)
        table = Table(box=SIMPLE, pad_edge=False)
        table.add_column("layer", overflow="fold")
        for name in estimators:
            table.add_column(plain(name), justify="right")
        order = panel.sort_values("layer_index").layer.drop_duplicates()
        wide = panel.drop_duplicates(["layer", "estimator"]).pivot(index="layer", columns="estimator", values="text")
        for layer in order:
            table.add_row(str(layer), *(str(wide.fillna("").loc[layer, name]) for name in estimators))
        console.print(table)
    if len(degradation):
        _show_areas(degradation, console)


def _show_areas(degradation: pd.DataFrame, console: Console) -> None:
    table = Table(title="area over the curve", title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for name in ("model", "data", "explanation"):
        table.add_column(name, overflow="fold")
    table.add_column("area", justify="right")
    for (model, data), curves in degradation.groupby(["model", "data"], sort=False, observed=True):
        areas = [
            (
                float((curve.sort_values("step").probability_mean.iloc[0] - curve.probability_mean).mean()),
                str(who),
                str(method),
            )
            for (who, method), curve in curves.groupby(["estimator", "method"], observed=True)
        ]
        for area, who, method in sorted(areas, reverse=True):
            by = "" if who == "none" else f", {plain(who)}"
            table.add_row(str(model), str(data), f"{plain(method)}{by}", f"{area:.3f}")
    console.print(table)
