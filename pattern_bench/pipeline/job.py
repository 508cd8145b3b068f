"""The main job, stage by stage: from images to Fig. 3 and Fig. 4a. Every process of the job runs it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from pattern_bench.core import weight_digests
from pattern_bench.core.estimators import Pattern
from pattern_bench.data.splits import SPLITS
from pattern_bench.engine.micro_batches import enough_memory
from pattern_bench.engine.progress import Stages
from pattern_bench.engine.trainer import joined, rounding
from pattern_bench.methods.base import kind_of
from pattern_bench.pipeline import explain as explanations
from pattern_bench.pipeline import patterns as fitting
from pattern_bench.pipeline import rho as criterion
from pattern_bench.pipeline.record import Record, begin, is_complete, recorded
from pattern_bench.pipeline.run_pass import Met
from pattern_bench.pipeline.setup import Setup, layer_setting, prepare
from pattern_bench.plotting import figures
from pattern_bench.processes import collectives
from pattern_bench.results import schema, terminal

SUMMARY = "summary.json"


@enough_memory()
@rounding
def run(cfg: DictConfig, folder: Path) -> None:
    """Runs every stage, and writes each stage's files as soon as they are known. A run that was interrupted goes on
    where it was; one that is complete is left alone.

    Raises:
        UserError: for what the user can mend.
    """
    with joined(cfg.trainer):
        shown = Stages(cfg.quiet)
        folder = Path(collectives.text_from_any(str(folder) if collectives.first() else ""))
        if is_complete(cfg, folder, SUMMARY):
            shown.console.print(f"this run is complete: remove {folder / SUMMARY} to do it again", soft_wrap=True)
            return
        begun = begin(cfg, folder, SUMMARY)
        with shown.run("prepare", "prepare data and model") as bar:
            setup = prepare(cfg, folder, bar, explanations.check)
        with recorded(cfg, folder, begun, "job", _names(setup)) as record:
            _stages(setup, shown, record)


def _names(setup: Setup) -> dict[str, str]:
    """What a run is found by in the tracker."""
    layer = "all" if setup.layers == setup.all_layers else ",".join(setup.layers)
    method, uses_estimator = explanations.chosen_method(setup)
    # A job may be there for its method alone.
    who = setup.estimator.name if uses_estimator or setup.estimator.has_pattern else kind_of(method).name
    return {
        "title": f"{setup.model_name}/{layer}/{who}",
        **setup.names,
        "layer": layer,
        "estimator": setup.estimator.name,
        "method": kind_of(method).name,
        "criterion": str(setup.cfg.criterion),
        "probe": str(setup.cfg.probe.name),
    }


def _stages(setup: Setup, shown: Stages, record: Record) -> None:
    cfg, estimator, names = setup.cfg, setup.estimator, setup.names
    what = "-".join([*names.values(), estimator.name])
    unreadable: set[str] = set()
    record.csv("splits.csv", schema.split_table(setup.splits, unreadable))

    def meet(met: Met) -> None:
        if fresh := [name for name in met.unreadable if name not in unreadable]:
            some = ", ".join(fresh[:5]) + (" …" if len(fresh) > 5 else "")
            count = "1 image" if len(fresh) == 1 else f"{len(fresh)} images"
            shown.console.print(f"{count} cannot be read and are left out: {some}", highlight=False, soft_wrap=True)
            unreadable.update(fresh)

    fingerprints = {name: setup.splits[name].fingerprint for name in SPLITS}
    record.uses("data", setup.source.name, {"splits": fingerprints})
    record.uses("weights", setup.model_name, {"fingerprint": setup.model_key})

    accuracy: dict[str, Any] = {**names}
    reason = explanations.why_no_accuracy(setup)
    if reason is None:
        with shown.run("accuracy", "accuracy on the validation images") as bar:
            measured, met = explanations.measure_accuracy(setup, bar)
        meet(met)
        accuracy |= measured
        reason = measured.get("skipped")
    if reason is None:
        record.metrics({"accuracy/top1": accuracy["top1"], "accuracy/top5": accuracy["top5"]})
    else:
        shown.skip("accuracy", "accuracy on the validation images", reason)
        accuracy["skipped"] = reason
    record.json("accuracy.json", accuracy)

    def collect(split: str, name: str, title: str, sums: fitting.Sums[fitting.M]) -> fitting.SplitMoments[fitting.M]:
        with shown.run(name, title) as bar:
            moments, met = fitting.collect(setup, split, sums, bar)
        meet(met)
        of = {"model": setup.model_key, "images": fingerprints[split], "layers": setup.layers, **sums.key}
        of |= {"positions": cfg.moments.positions}
        record.uses("moments", f"{setup.model_name}-{setup.source.name}-{split}", of)
        return moments

    patterns: dict[str, Pattern] = {}
    how: dict[str, Any] = {}
    bootstrap = pd.DataFrame()
    if estimator.has_pattern:
        fit = collect("fit", "fit_patterns", "fit patterns on the first half", fitting.all_samples(setup, gram=False))
        patterns = fitting.fit_patterns(setup, fit)
        shaped = fitting.in_weight_shape(setup, patterns)
        record.tensors(
            "patterns.safetensors",
            schema.pattern_tensors(shaped),
            {**names, "estimator": estimator.name, "split": "fit", "images": str(len(setup.splits["fit"])),
             "seed": str(cfg.seed), "model_fingerprint": setup.model_key, **weight_digests.metadata(setup.belongs_to)},
        )  # fmt: skip
        fitted = {"estimator": estimator.name, "model": setup.model_key, "images": fingerprints["fit"]}
        record.uses("patterns", what, fitted, "patterns.safetensors")
        tables = []
        if "closed_form" in criterion.probes(setup):
            sums: Any = criterion.sums(setup)
            probe = collect("probe", "fit_probe", "fit v on the second half", sums)
            test = collect("validation", "validation_moments", "moments of the validation images", sums)
            with shown.run("rho", "ρ(S) of every neuron") as bar:
                table, how["regularisation"] = criterion.closed_form(setup, patterns, probe, test, bar)
            tables.append(table)
        if "sgd" in criterion.probes(setup):
            with shown.run("fit_readers", "fit v on the second half by descent") as bar:
                tell = functools.partial(record.curve, "descent")
                readers, how["descent"], met = criterion.descent(setup, patterns, bar, tell, record.listened)
            meet(met)
            with shown.run("read", "ρ(S) of every neuron, by descent") as bar:
                table, met = criterion.measure_readers(setup, patterns, readers, bar)
            meet(met)
            tables.append(table)
        rho = pd.concat(tables, ignore_index=True)
        if cfg.probe.name == "both" and collectives.first():
            how["probe_difference"] = criterion.difference(rho)
        if cfg.bootstrap.resamples:
            with shown.run("bootstrap", "ρ(S) of images drawn again") as bar:
                bootstrap = criterion.bootstrap(setup, fit, probe, test, bar)
            record.csv("bootstrap.csv", bootstrap)
    else:
        shaped = {}
        rho = criterion.missing_rho(setup)
        why = estimator.no_pattern_reason
        for name, title in (("fit_patterns", "fit patterns on the first half"), ("rho", "ρ(S) of every neuron")):
            shown.skip(name, title, why)
        record.tensors("patterns.safetensors", {}, {**names, "estimator": estimator.name, "reason": why})
    record.csv("rho.csv", rho)
    first = rho[rho.probe == criterion.probes(setup)[0]]
    rho_summary = schema.summarise_rho(first, bootstrap)
    record.metrics(
        {
            f"rho/{place}{figure}": layer[figure]
            for place, layer in [("", rho_summary["all"]), *((f"{of['layer']}/", of) for of in rho_summary["layers"])]
            for figure in ("mean", "median")
            if layer[figure] is not None
        }
    )
    for layer, rows in first.groupby("layer", sort=False):
        record.distribution(f"rho/{layer}/distribution", rows.rho)
    record.table("rho", rho)
    if len(bootstrap):
        record.table("bootstrap", bootstrap)
    about = f"{setup.model_name} on {setup.source.name}, {estimator.name}"
    record.picture("figures/rho", "rho.png", f"ρ(S) of {about}", lambda file: figures.draw_rho(rho, file, bootstrap))

    areas: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    patch = steps = None
    degradation = pd.DataFrame(columns=list(schema.DEGRADATION_COLUMNS))
    area_table = pd.DataFrame(columns=list(schema.AREA_COLUMNS))
    reason = explanations.why_no_explanation(setup)
    if reason is None:
        with shown.run("explain", "explain validation images") as bar:
            shown_images, met = explanations.explain(setup, shaped, bar)
        meet(met)
        record.picture(
            "figures/explanations", "explanations.png", f"Validation images and what explains {about}",
            lambda file: figures.draw_explanations(*shown_images, file),
        )  # fmt: skip
        patch, steps = explanations.patch_and_steps(setup)
        with shown.run("degrade", "image degradation") as bar:
            curves, by_image, images, met = explanations.degrade(setup, shaped, bar)
        meet(met)
        areas = {method: float(area.mean()) for method, area in by_image.items()}
        intervals = explanations.area_intervals(setup, by_image)
        who = estimator.name if explanations.chosen_method(setup)[1] else "none"
        degradation = schema.degradation_rows(curves, setup.model_name, setup.source.name, who)
        area_table = schema.area_rows(by_image, images, setup.model_name, setup.source.name, who)
    else:
        shown.skip("explain", "explain validation images", reason)
        shown.skip("degrade", "image degradation", reason)
    record.csv("degradation.csv", degradation)
    record.csv("areas.csv", area_table)
    record.table("degradation", degradation)
    record.picture(
        "figures/degradation", "degradation.png", f"Image degradation of {about}",
        lambda file: figures.draw_degradation(degradation, file),
    )  # fmt: skip
    for step, rows in degradation.groupby("step"):
        record.curve("degradation", int(str(step)), dict(zip(rows.method, rows.probability_mean, strict=True)))
    record.metrics({f"area_over_curve/{method}": area for method, area in areas.items()})
    record.csv("splits.csv", schema.split_table(setup.splits, unreadable))

    summary = {
        **names,
        "estimator": estimator.name,
        "method": kind_of(explanations.chosen_method(setup)[0]).name,
        "criterion": cfg.criterion,
        "probe": cfg.probe.name,
        "layer": layer_setting(cfg),
        "positions": cfg.moments.positions,
        "seed": cfg.seed,
        "processes": collectives.size(),
        "splits": {name: len(setup.splits[name]) for name in SPLITS},
        "unreadable": sorted(unreadable),
        **how,
        "rho": rho_summary,
        "patch": patch,
        "steps": steps,
        "area_over_curve": areas,
        "area_over_curve_interval": intervals,
        "accuracy": accuracy.get("top1"),
        "signal_angle_degrees": fitting.signal_angles(setup, patterns),
        "skipped": shown.skipped,
        **shown.figures(),
        "versions": schema.versions(),
    }
    record.metrics({f"{what}/{stage}": value for what, of in shown.figures().items() for stage, value in of.items()})
    terminal.show(record.end(SUMMARY, summary, what), shown.console)
