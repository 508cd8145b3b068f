"""The tables of a report in the terminal: Fig. 3 by layer and estimator, and the area over each curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pattern_bench.reporting.gathering import CURVE, PANEL, Cell
from pattern_bench.reporting.tables import COMPLETE, MISSING
from pattern_bench.results.labels import ordered, plain


def show(rho: pd.DataFrame, areas: pd.Series, missing: Sequence[Cell], console: Console) -> None:
    """Print a table per model, data set, criterion and probe: the median of ρ(S) by layer and estimator, over the
    neurons that are live under all of them; and one of the area over the curve.

    Args:
        rho: as :func:`~pattern_bench.reporting.tables.rho_table` gives it.
        areas: as :func:`~pattern_bench.reporting.tables.areas` gives them.
        missing: curves without an area: model, data, estimator and method.
        console: where to.
    """
    texts = [
        f"{median:.3f}" if status == COMPLETE else MISSING if status == MISSING else "–"
        for median, status in zip(rho["median"], rho.status, strict=True)
    ]
    for (model, data, criterion, probe), panel in rho.assign(text=texts).groupby(PANEL, sort=False):
        console.print(
            f"median ρ(S): {model} on {data}, criterion {criterion}, probe {probe}", style="bold", highlight=False
        )
        estimators = ordered(panel.estimator)
        table = Table(box=SIMPLE, pad_edge=False)
        table.add_column("layer", overflow="fold")
        for name in estimators:
            table.add_column(plain(name), justify="right")
        wide = panel.pivot(index="layer", columns="estimator", values="text").fillna("")
        for layer in panel.layer.drop_duplicates():
            table.add_row(str(layer), *(str(wide.loc[layer, name]) for name in estimators))
        console.print(table)
        if out := ", ".join(left_out(panel)):
            console.print(f"over the neurons live under all estimators; left out: {out}", highlight=False)
    every = pd.concat([areas, pd.Series(float("nan"), pd.MultiIndex.from_tuples(missing, names=CURVE))])
    if len(every):
        _show_areas(every, console)


def left_out(table: pd.DataFrame) -> Iterator[str]:
    """Say, by estimator, how many of its live neurons Fig. 3, a ``table``, leaves out."""
    for name in ordered(table.estimator):
        own = table[table.estimator == name]
        if out := int(own.left_out.sum()):
            yield f"{out} of {int(own.neurons.sum())} of {plain(name)}"


def _show_areas(areas: pd.Series, console: Console) -> None:
    """Print areas over the curves, the largest first, missing ones last."""
    table = Table(title="area over the curve", title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for name in ("model", "data", "explanation"):
        table.add_column(name, overflow="fold")
    table.add_column("area", justify="right")
    rows = areas.rename("area").reset_index()
    for (model, data), curves in rows.groupby(["model", "data"], sort=False):
        ordered_curves = curves.sort_values("area", ascending=False)[["estimator", "method", "area"]]
        for who, method, area in ordered_curves.itertuples(index=False):
            by = "" if who == "none" else f", {plain(who)}"
            shown = MISSING if pd.isna(area) else f"{area:.3f}"
            table.add_row(str(model), str(data), f"{plain(method)}{by}", shown)
    console.print(table)
