"""The results of a job in the terminal, as a table that reads like Fig. 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pattern_bench.results.labels import plain


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print a row per layer, ρ(S) over its live neurons; below, accuracy and the area over the curve.

    Args:
        summary: the content of ``summary.json``.
        console: where to.
    """
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
