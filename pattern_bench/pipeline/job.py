"""The main job: from images to Fig. 3 and Fig. 4a. Every process of the job runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pattern_bench.data.splits import SPLITS
from pattern_bench.engine.micro_batches import enough_memory
from pattern_bench.engine.progress import StageProgress
from pattern_bench.engine.trainer import joined, rounding
from pattern_bench.pipeline.accuracy import Accuracy, MeasureAccuracy
from pattern_bench.pipeline.bootstrap import DrawImagesAgain
from pattern_bench.pipeline.degrade import Degradation, Degrade, patch_and_steps
from pattern_bench.pipeline.descent import FitReaders, MeasureReaders
from pattern_bench.pipeline.explain import Explain, why_no_explanation
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import check_method
from pattern_bench.pipeline.moments import CollectProbe, CollectValidation
from pattern_bench.pipeline.patterns import FitPatterns, FittedPatterns, signal_angles
from pattern_bench.pipeline.rho import MeasureClosedForm, probes
from pattern_bench.pipeline.rho_table import Rho, SummariseRho
from pattern_bench.pipeline.run_folder import RunFolder, begin, is_complete, tracked
from pattern_bench.pipeline.setup import Setup, layer_setting, prepare
from pattern_bench.pipeline.stage import Done, Stage, run_stages
from pattern_bench.processes import collectives
from pattern_bench.results import schema, terminal

SUMMARY = "summary.json"


@enough_memory()
@rounding
def run(cfg: DictConfig, folder: Path) -> None:
    """Run every stage, and write each stage's files as soon as they are known. A run that was interrupted goes on
    where it was; one that is complete is left alone.

    Raises:
        UserError: for what the user can mend.
    """
    with joined(cfg.trainer):
        progress = StageProgress(cfg.quiet)
        folder = Path(collectives.broadcast_text(str(folder) if collectives.is_rank_zero() else ""))
        if is_complete(cfg, folder, SUMMARY):
            progress.say(f"this run is complete: remove {folder / SUMMARY} to do it again")
            return
        begun = begin(cfg, folder, SUMMARY)
        with progress.run("prepare", "prepare data and model") as bar:
            machine = Machine.from_settings(cfg, folder)
            setup = prepare(cfg, machine, bar, check)
        with tracked(cfg, folder, begun, "job", found_by(setup)) as run_folder:
            run_prepared(setup, machine, progress, run_folder)


def run_prepared(setup: Setup, machine: Machine, progress: StageProgress, run_folder: RunFolder) -> None:
    """Run every stage of a job that is set up, and end it with its summary."""
    run_folder.csv("splits.csv", schema.split_table(setup.splits, set()))
    fingerprints = {name: setup.splits[name].fingerprint for name in SPLITS}
    run_folder.uses("data", setup.source.name, {"splits": fingerprints})
    run_folder.uses("weights", setup.model_name, {"fingerprint": setup.model_key})
    done = run_stages(stages(setup, machine, run_folder), progress, run_folder)
    run_folder.csv("splits.csv", schema.split_table(setup.splits, set(done.unreadable)))
    title = "-".join([*setup.names.values(), setup.estimator.name])
    took = progress.figures()
    run_folder.metrics({f"{what}/{stage}": value for what, of in took.items() for stage, value in of.items()})
    terminal.show(run_folder.end(SUMMARY, summary(setup, done, progress), title), progress.console)


def stages(setup: Setup, machine: Machine, run_folder: RunFolder) -> list[Stage[Any]]:
    """The job's stages, in the order they run. Each says itself where it has to be skipped."""
    listed: list[Stage[Any]] = [MeasureAccuracy(setup, machine), FitPatterns(setup, machine)]
    if not setup.estimator.has_pattern:
        listed += [MeasureClosedForm(setup, machine)]  # which says why there is none
    else:
        if "closed_form" in probes(setup):
            listed += [CollectProbe(setup, machine), CollectValidation(setup, machine)]
            listed += [MeasureClosedForm(setup, machine)]
        if "sgd" in probes(setup):
            listed += [FitReaders(setup, machine, run_folder), MeasureReaders(setup, machine)]
        if setup.cfg.bootstrap.resamples:
            listed += [DrawImagesAgain(setup, machine)]
    return [*listed, SummariseRho(setup), Explain(setup, machine), Degrade(setup, machine)]


def check(setup: Setup) -> None:
    """
    Raises:
        UserError: where the method, or the degradation protocol, cannot serve the network and data.
    """
    if why_no_explanation(setup) is None:
        patch_and_steps(setup)
        check_method(setup, setup.method)


def found_by(setup: Setup) -> dict[str, str]:
    """What a run is found by in the tracker."""
    layer = "all" if setup.layers == setup.all_layers else ",".join(setup.layers)
    # A job may be there for its method alone.
    by_estimator = setup.method_uses_estimator or setup.estimator.has_pattern
    who = setup.estimator.name if by_estimator else setup.method_name
    return {
        "title": f"{setup.model_name}/{layer}/{who}",
        **setup.names,
        "layer": layer,
        "estimator": setup.estimator.name,
        "method": setup.method_name,
        "criterion": str(setup.cfg.criterion),
        "probe": str(setup.cfg.probe.name),
    }


def summary(setup: Setup, done: Done, progress: StageProgress) -> Mapping[str, Any]:
    """The content of ``summary.json``."""
    rho, degradation = done[Rho], done[Degradation]
    return {
        **setup.names,
        "estimator": setup.estimator.name,
        "method": setup.method_name,
        "criterion": setup.cfg.criterion,
        "probe": setup.cfg.probe.name,
        "layer": layer_setting(setup.cfg),
        "positions": setup.cfg.moments.positions,
        "seed": setup.cfg.seed,
        "processes": collectives.world_size(),
        "splits": {name: len(setup.splits[name]) for name in SPLITS},
        "unreadable": sorted(done.unreadable),
        **rho.how,
        "rho": rho.summary,
        "patch": degradation.patch,
        "steps": degradation.steps,
        "area_over_curve": dict(degradation.means),
        "area_over_curve_interval": dict(degradation.intervals),
        "accuracy": done[Accuracy].top1,
        "signal_angle_degrees": signal_angles(setup, done[FittedPatterns].patterns),
        "skipped": progress.skipped,
        **progress.figures(),
        "versions": schema.versions(),
    }
