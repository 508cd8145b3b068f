"""ρ(S) of every neuron, however it was measured: ``rho.csv``, its summary and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pattern_bench.engine.progress import Bar
from pattern_bench.pipeline.bootstrap import Bootstrap
from pattern_bench.pipeline.descent import DescentRho, FittedReaders
from pattern_bench.pipeline.rho import ClosedFormRho, difference, probes
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.plotting.figures import draw_rho
from pattern_bench.processes import collectives
from pattern_bench.results.schema import summarise_rho


@dataclass(frozen=True, kw_only=True)
class Rho(Result):
    """ρ of every neuron.

    Attributes:
        table: rows of ``rho.csv``.
        first: those of the first probe, which the summary is of.
        bootstrap: rows of ``bootstrap.csv``; empty where no images were drawn again.
        summary: mean, median and quartiles of each layer, and of all.
        how: what the summary says of how ρ was measured.
    """

    table: pd.DataFrame
    first: pd.DataFrame
    bootstrap: pd.DataFrame
    summary: Mapping[str, Any]
    how: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SummariseRho(Stage[Rho]):
    """Lay together what every probe measured."""

    setup: Setup
    name = "rho_table"
    title = "ρ(S) of every layer"
    timed = False

    def run(self, done: Done, bar: Bar) -> Rho:
        how: dict[str, Any] = {}
        tables = []
        if ClosedFormRho in done:
            tables.append(done[ClosedFormRho].table)
            if done[ClosedFormRho].skipped is None:
                how["regularisation"] = dict(done[ClosedFormRho].regularisation)
        if DescentRho in done:
            tables.append(done[DescentRho].table)
            how["descent"] = dict(done[FittedReaders].descent)
        table = pd.concat(tables, ignore_index=True)
        if len(tables) == 2 and collectives.is_rank_zero():
            how["probe_difference"] = difference(table)
        bootstrap = done[Bootstrap].table if Bootstrap in done else pd.DataFrame()
        first = table[table.probe == probes(self.setup)[0]]
        return Rho(table=table, first=first, bootstrap=bootstrap, summary=summarise_rho(first, bootstrap), how=how)

    def write(self, result: Rho, run_folder: RunFolder) -> None:
        run_folder.csv("rho.csv", result.table)
        means = [("", result.summary["all"]), *((f"{of['layer']}/", of) for of in result.summary["layers"])]
        run_folder.metrics(
            {
                f"rho/{place}{figure}": layer[figure]
                for place, layer in means
                for figure in ("mean", "median")
                if layer[figure] is not None
            }
        )
        for layer, rows in result.first.groupby("layer", sort=False):
            run_folder.distribution(f"rho/{layer}/distribution", rows.rho)
        run_folder.table("rho", result.table)
        if len(result.bootstrap):
            run_folder.table("bootstrap", result.bootstrap)
        about = f"{self.setup.model_name} on {self.setup.source.name}, {self.setup.estimator.name}"
        run_folder.picture(
            "figures/rho", "rho.png", f"ρ(S) of {about}", lambda file: draw_rho(result.table, file, result.bootstrap)
        )
