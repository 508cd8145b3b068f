"""Two checks that an explanation depends on the network it explains: ``python -m pattern_bench.sanity``.

:mod:`~pattern_bench.pipeline.randomisation` and :mod:`~pattern_bench.pipeline.convergence` say what they check. A run
leaves ``sanity.csv``, ``randomisation.png``, ``convergence.png`` and ``sanity.json``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from torch import Tensor

from pattern_bench.configuration.checks import check_one_process, check_sanity
from pattern_bench.data.splits import Split
from pattern_bench.engine.micro_batches import enough_memory
from pattern_bench.engine.progress import Bar, StageProgress
from pattern_bench.engine.trainer import rounding
from pattern_bench.errors import UserError
from pattern_bench.methods.base import kind_of
from pattern_bench.pipeline.convergence import STARTS, CompareDirections, Convergence
from pattern_bench.pipeline.job import check as check_job
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import any_needs_patterns, check_methods, methods_shown
from pattern_bench.pipeline.patterns import FitPatternsOfEstimators
from pattern_bench.pipeline.randomisation import Randomisation, RandomiseLayers
from pattern_bench.pipeline.run_folder import RunFolder, begin, tracked
from pattern_bench.pipeline.sanity_rows import COLUMNS, MEASURES
from pattern_bench.pipeline.setup import Setup, prepare
from pattern_bench.pipeline.stage import Done, Result, Stage, run_stages
from pattern_bench.plotting import figures
from pattern_bench.results import schema
from pattern_bench.results.labels import formula

SUMMARY = "sanity.json"


@dataclass(frozen=True)
class Checked:
    """What is checked: methods still to be given their network, by name; images (n, C, H, W) that they explain; images
    that patterns are fitted on again after each randomisation, None where the trained network's stay."""

    methods: Mapping[str, Any]
    images: Tensor
    refit: Tensor | None

    @property
    def needs_patterns(self) -> bool:
        """Whether any of the methods shows patterns."""
        return any_needs_patterns(self.methods)


@enough_memory()
@rounding
def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run both checks, write their files into ``folder``, and return the summary.

    Raises:
        UserError: for what the user can mend.
    """
    check_one_process(cfg.trainer)
    begun = begin(cfg, folder, SUMMARY)
    check_sanity(cfg, STARTS)
    # All that need one pass back, unless others are named.
    methods = methods_shown(cfg, ("one",))
    progress = StageProgress(cfg.quiet)
    with progress.run("prepare", "prepare data and model") as bar:
        machine = Machine.from_settings(cfg, folder)
        setup = prepare(cfg, machine, bar, check_job)
        check_methods(setup, methods)
        if cfg.start == "classes" and cfg.directions > setup.outputs:
            raise UserError(f"directions={cfg.directions} is more than the {setup.outputs} classes: ask for fewer")
        images = _images(setup.splits["validation"], cfg.images, "images")
        refits = cfg.refit and any_needs_patterns(methods)
        checked = Checked(methods, images, _images(setup.splits["fit"], cfg.refit, "refit") if refits else None)
    names = {**setup.names, "estimator": setup.estimator.name}
    found_by = {"title": f"{setup.model_name}/{setup.estimator.name}/sanity", **names}
    with tracked(cfg, folder, begun, "sanity", found_by) as run_folder:
        done = run_stages(stages(setup, machine, checked), progress, run_folder)
        return run_folder.end(SUMMARY, summary(setup, checked, done, progress), "-".join([*names.values(), "sanity"]))


def _images(split: Split, count: int, setting: str) -> Tensor:
    """The first ``count`` images of a split, (count, C, H, W); fewer where some cannot be read."""
    if count > len(split):
        raise UserError(f"{setting}={count} is more than the {len(split)} images of the split: ask for fewer")
    images = split.batch(range(count)).images
    if images is None:
        raise UserError(f"none of the first {count} images of the split can be read: ask for more ({setting})")
    return images


def stages(setup: Setup, machine: Machine, checked: Checked) -> list[Stage[Any]]:
    """The stages of the sanity checks, in the order they run."""
    listed: list[Stage[Any]] = []
    if checked.needs_patterns:
        listed += [FitPatternsOfEstimators(setup, machine, {setup.estimator.name: setup.estimator})]
    return [
        *listed,
        RandomiseLayers(setup, machine, checked.methods, checked.images, checked.refit),
        CompareDirections(setup, machine, checked.methods, checked.images),
        LayTogether(setup, checked),
    ]


@dataclass(frozen=True, kw_only=True)
class SanityTable(Result):
    """The table of ``sanity.csv``."""

    table: pd.DataFrame


@dataclass(frozen=True)
class LayTogether(Stage[SanityTable]):
    """Lay the rows of both checks together, and draw them."""

    setup: Setup
    checked: Checked
    name = "sanity_table"
    title = "both checks"
    timed = False

    def run(self, done: Done, bar: Bar) -> SanityTable:
        checks = (done[Randomisation], done[Convergence])
        table = pd.DataFrame([row for check in checks for row in check.rows])
        if table.empty:
            raise UserError(
                f"nothing can be checked: {'; '.join(part.reason for check in checks for part in check.left_out)}"
            )
        methods, name = self.checked.methods, self.setup.estimator.name
        by = [name if kind_of(methods[method]).needs_patterns else "none" for method in table.method]
        return SanityTable(table=table.assign(**self.setup.names, estimator=by)[list(COLUMNS)])

    def write(self, result: SanityTable, run_folder: RunFolder) -> None:
        table, setup = result.table, self.setup
        run_folder.csv("sanity.csv", table)
        title = f"{setup.model_name} on {setup.source.name} (n = {len(self.checked.images)})"
        if self.checked.needs_patterns:
            title += f", patterns {formula(setup.estimator.name)}"
        refitted = " of the trained network" if self.checked.refit is None else " fitted again after each layer"
        for check, more, xlabel, ylabels in (
            ("randomisation", refitted if self.checked.needs_patterns else "",
             "layers randomised from the output down to", MEASURES),
            ("convergence", "", "at the input of layer", {"cosine_absolute": "mean |cosine| of directions"}),
        ):  # fmt: skip
            if len(part := table[table.check == check]):
                draw = functools.partial(
                    figures.draw_similarity, part, title=title + more, xlabel=xlabel, ylabels=ylabels
                )
                run_folder.picture(f"figures/{check}", f"{check}.png", f"{check} of {title}{more}", draw)
        run_folder.table("sanity", table)


def summary(setup: Setup, checked: Checked, done: Done, progress: StageProgress) -> dict[str, Any]:
    """The content of ``sanity.json``."""
    table = done[SanityTable].table
    kept = "kept" if checked.needs_patterns else None
    left_out = [*done[Randomisation].left_out, *done[Convergence].left_out]
    return {
        **setup.names,
        "estimator": setup.estimator.name,
        "seed": setup.cfg.seed,
        "images": len(checked.images),
        "patterns": kept if checked.refit is None else "refitted",
        "refit_images": None if checked.refit is None else len(checked.refit),
        "start": setup.cfg.start,
        "directions": setup.cfg.directions,
        # The end of each curve: every layer randomised, and directions at the image.
        "all_layers_randomised": _ends(table[table.check == "randomisation"]),
        "at_the_image": _ends(table[table.check == "convergence"]),
        "left_out": {part.name: part.reason for part in left_out},
        **progress.figures(),
        "versions": schema.versions(),
    }


def _ends(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    first = table[table.layer_index == 0]
    return {
        str(method): {str(m): None if pd.isna(v) else float(v) for m, v in zip(rows.measure, rows["mean"], strict=True)}
        for method, rows in first.groupby("method", sort=False)
    }
