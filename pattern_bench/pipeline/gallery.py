"""Galleries after Fig. 1, Fig. 4b and Fig. 5 of Kindermans et al. 2018: ``python -m pattern_bench.gallery``.

A run leaves ``FIGURE.png``, the explanations in ``gallery.safetensors`` (each divided by its largest absolute value,
which ``gallery.json`` holds as its scale, so that they fit float32), and in ``gallery.json`` what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pattern_bench.configuration.build import build
from pattern_bench.configuration.checks import check_gallery, check_one_process, names_shown
from pattern_bench.core.estimators import Estimator
from pattern_bench.engine.micro_batches import enough_memory
from pattern_bench.engine.progress import StageProgress
from pattern_bench.engine.trainer import rounding
from pattern_bench.pipeline.gallery_stages import FIGURES, DrawGallery, ExplainImages, Gallery, draw_positions
from pattern_bench.pipeline.job import check as check_job
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import any_needs_patterns, check_methods, methods_shown
from pattern_bench.pipeline.patterns import FitPatternsOfEstimators
from pattern_bench.pipeline.run_folder import RunFolder, begin, tracked
from pattern_bench.pipeline.setup import Setup, prepare
from pattern_bench.pipeline.stage import Done, Stage, run_stages
from pattern_bench.results import schema

SUMMARY = "gallery.json"


@enough_memory()
@rounding
def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Draw one figure into ``folder``, and return what is shown.

    Raises:
        UserError: for what the user can mend.
    """
    check_one_process(cfg.trainer)
    begun = begin(cfg, folder, SUMMARY)
    check_gallery(cfg, FIGURES)
    progress = StageProgress(cfg.quiet)
    estimators, methods = _compared(cfg)
    with progress.run("prepare", "prepare data and model") as bar:
        machine = Machine.from_settings(cfg, folder)
        setup = prepare(cfg, machine, bar, check_job)
        if estimators:
            # Whatever the job's estimator: the figure has its own.
            setup = replace(setup, estimator=next((e for e in estimators.values() if e.has_pattern), setup.estimator))
        check_methods(setup, methods)
        positions = draw_positions(setup)
    found_by = {"title": f"{setup.model_name}/{cfg.figure}", **setup.names, "figure": str(cfg.figure)}
    with tracked(cfg, folder, begun, "gallery", found_by) as run_folder:
        done = run_stages(stages(setup, machine, methods, estimators, positions, run_folder), progress, run_folder)
        title = "-".join([*setup.names.values(), str(cfg.figure)])
        return run_folder.end(SUMMARY, summary(setup, methods, estimators, done, progress), title)


def _compared(cfg: DictConfig) -> tuple[dict[str, Estimator], dict[str, Any]]:
    """What the columns of the figure are: estimators (Fig. 4b), or methods still to be given their network."""
    if cfg.figure != "fig4b":
        return {}, methods_shown(cfg, ("one", "tens"))
    names = names_shown(cfg.show, cfg.estimators, list(cfg.estimators))
    return {name: build(cfg.estimators[name]) for name in names}, {}


def stages(
    setup: Setup,
    machine: Machine,
    methods: Mapping[str, Any],
    estimators: Mapping[str, Estimator],
    positions: list[int],
    run_folder: RunFolder,
) -> list[Stage[Any]]:
    """The gallery's stages, in the order they run."""
    compared = estimators or {setup.estimator.name: setup.estimator}
    fitted = {name: estimator for name, estimator in compared.items() if estimator.has_pattern}
    listed: list[Stage[Any]] = []
    if fitted and needs_patterns(methods, estimators):
        listed += [FitPatternsOfEstimators(setup, machine, fitted)]
    return [*listed, ExplainImages(setup, machine, methods, estimators, positions), DrawGallery(setup, run_folder)]


def needs_patterns(methods: Mapping[str, Any], estimators: Mapping[str, Estimator]) -> bool:
    """Whether any column shows patterns."""
    return bool(estimators) or any_needs_patterns(methods)


def summary(
    setup: Setup,
    methods: Mapping[str, Any],
    estimators: Mapping[str, Estimator],
    done: Done,
    progress: StageProgress,
) -> dict[str, Any]:
    """The content of ``gallery.json``."""
    gallery = done[Gallery]
    return {
        **setup.names,
        "figure": str(setup.cfg.figure),
        "estimators": list(estimators) or ([setup.estimator.name] if needs_patterns(methods, estimators) else []),
        "seed": setup.cfg.seed,
        "percentile": setup.cfg.percentile,
        "images": list(gallery.about),
        "columns": [
            {
                "key": column.key,
                "kind": column.kind,
                "scale": [float(scale) for scale in column.explanations.abs().flatten(1).amax(1)],
            }
            for column in gallery.columns
        ],
        "left_out": {part.name: part.reason for part in gallery.left_out},
        **progress.figures(),
        "versions": schema.versions(),
    }
