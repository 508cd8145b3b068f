"""How sure ρ(S) is: the whole procedure again, on images drawn again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from pattern_bench.core.moments import Moments
from pattern_bench.engine.progress import Bar
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.moments import M, ProbeStatistics, SplitMoments, ValidationStatistics
from pattern_bench.pipeline.patterns import FittedPatterns, fit_pattern
from pattern_bench.pipeline.rho import layer_rho
from pattern_bench.pipeline.run_folder import RunFolder
from pattern_bench.pipeline.setup import Setup
from pattern_bench.pipeline.stage import Done, Result, Stage
from pattern_bench.processes import collectives
from pattern_bench.results.schema import BOOTSTRAP_COLUMNS


def bootstrap(
    setup: Setup,
    device: torch.device,
    fit: SplitMoments[Moments],
    probe: SplitMoments[Any],
    test: SplitMoments[Any],
    bar: Bar,
) -> pd.DataFrame:
    """Mean and median of ρ over live neurons, by layer, with the images of every split drawn again in chunks; in the
    first process, which has the moments.

    Patterns, v and ρ are all computed anew for each draw, so the spread is that of the whole procedure.
    """
    settings = setup.cfg.bootstrap
    rows: list[dict[str, Any]] = []
    bar.start(settings.resamples * len(setup.layers))
    for layer in setup.layers if collectives.is_rank_zero() else ():
        chunks = {"fit": fit.pieces(layer), "probe": probe.pieces(layer), "validation": test.pieces(layer)}
        for resample in range(settings.resamples):
            # The same draws for every layer.
            generator = torch.Generator().manual_seed(setup.seed(f"bootstrap {resample}"))
            drawn = {split: _drawn(sums, generator) for split, sums in chunks.items()}
            pattern = fit_pattern(setup, layer, drawn["fit"])
            values, _ = layer_rho(setup, device, layer, pattern, drawn["probe"], drawn["validation"])
            live = values[~pattern.dead.to(values.device)]
            live = live[~live.isnan()]
            rows.append(
                {
                    **setup.names,
                    "layer": layer,
                    "layer_index": setup.all_layers.index(layer),
                    "estimator": setup.estimator.name,
                    "criterion": setup.cfg.criterion,
                    "probe": "closed_form",
                    "resample": resample,
                    "mean": float(live.mean()),
                    "median": float(live.quantile(0.5)) if len(live) else float("nan"),
                }
            )
            bar.advance(detail=layer)
    return pd.DataFrame(rows, columns=list(BOOTSTRAP_COLUMNS))


def _drawn(chunks: list[M], generator: torch.Generator) -> M:
    """The sum of as many chunks, drawn with replacement."""
    counts = torch.randint(len(chunks), (len(chunks),), generator=generator).bincount(minlength=len(chunks))
    kept = [sums.times(count) for sums, count in zip(chunks, counts.tolist(), strict=True) if count]
    for sums in kept[1:]:
        kept[0].add_(sums)
    return kept[0]


# --- the stage ---


@dataclass(frozen=True, kw_only=True)
class Bootstrap(Result):
    """Rows of ``bootstrap.csv``, in the first process."""

    table: pd.DataFrame


@dataclass(frozen=True)
class DrawImagesAgain(Stage[Bootstrap]):
    """Measure ρ(S) of images drawn again."""

    setup: Setup
    machine: Machine
    name = "bootstrap"
    title = "ρ(S) of images drawn again"

    def run(self, done: Done, bar: Bar) -> Bootstrap:
        fit: Any = done[FittedPatterns].moments
        probe, test = done[ProbeStatistics].moments, done[ValidationStatistics].moments
        return Bootstrap(table=bootstrap(self.setup, self.machine.device, fit, probe, test, bar))

    def write(self, result: Bootstrap, run_folder: RunFolder) -> None:
        run_folder.csv("bootstrap.csv", result.table)
