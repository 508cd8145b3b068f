"""The main job, stage by stage: from images to Fig. 3 and Fig. 4a."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from pattern_bench import criterion, figures, results, stages
from pattern_bench.core.estimators import Pattern
from pattern_bench.data.splits import SPLITS
from pattern_bench.files import write_tensors
from pattern_bench.methods.base import kind_of
from pattern_bench.progress import Stages
from pattern_bench.streams import Seen
from pattern_bench.tracking import Tracker


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Runs every stage, writes each stage's files as soon as they are known, and returns the summary.

    Raises:
        UserError: for what the user can mend.
    """
    config = stages.begin(cfg, folder)
    shown = Stages()
    with shown.run("prepare", "prepare data and model") as bar:
        setup = stages.prepare(cfg, bar)
    name = f"{setup.model_name}/{cfg.layer}/{setup.estimator.name}"
    with Tracker(cfg.logger, folder, name, config) as tracker:
        summary = _stages(cfg, folder, setup, shown, tracker)
        summary |= {"skipped": shown.skipped, "seconds": shown.seconds, **results.environment()}
        results.write_json(folder / "summary.json", summary)
    return summary


def _stages(cfg: DictConfig, folder: Path, setup: stages.Setup, shown: Stages, tracker: Tracker) -> dict[str, Any]:
    estimator, names = setup.estimator, setup.names
    unreadable: set[str] = set()
    results.write_csv(folder / "splits.csv", stages.split_table(setup, unreadable))

    accuracy: dict[str, Any] = {**names}
    reason = stages.why_no_accuracy(setup)
    if reason is None:
        with shown.run("accuracy", "accuracy on the validation images") as bar:
            accuracy |= stages.measure_accuracy(setup, bar)
        tracker.metrics({"accuracy/top1": accuracy["top1"], "accuracy/top5": accuracy["top5"]})
    else:
        shown.skip("accuracy", "accuracy on the validation images", reason)
        accuracy["skipped"] = reason
    results.write_json(folder / "accuracy.json", accuracy)

    def meet(seen: Seen) -> None:
        if fresh := [name for name in seen.unreadable if name not in unreadable]:
            some = ", ".join(fresh[:5]) + (" …" if len(fresh) > 5 else "")
            shown.console.print(f"{len(fresh)} images cannot be read and are left out: {some}")
            unreadable.update(fresh)

    def collect(split: str, name: str, title: str, gram: bool) -> Any:
        with shown.run(name, title) as bar:
            moments, seen = stages.collect(setup, split, gram, bar)
        meet(seen)
        return moments

    patterns: dict[str, Pattern] = {}
    how: dict[str, Any] = {}
    bootstrap = pd.DataFrame()
    if estimator.has_pattern:
        fit = collect("fit", "fit_patterns", "fit patterns on the first half", gram=False)
        patterns = stages.fit_patterns(setup, fit)
        shaped = stages.in_weight_shape(setup, patterns)
        write_tensors(
            folder / "patterns.safetensors",
            results.pattern_tensors(shaped),
            {**names, "estimator": estimator.name, "split": "fit", "images": str(len(setup.splits["fit"])),
             "seed": str(cfg.seed), "model_fingerprint": setup.model_key},
        )  # fmt: skip
        tables = []
        if "closed_form" in criterion.probes(setup):
            probe = collect("probe", "fit_probe", "fit v on the second half", gram=True)
            test = collect("validation", "validation_moments", "moments of the validation images", gram=True)
            with shown.run("rho", "ρ(S) of every neuron") as bar:
                table, how["regularisation"] = criterion.closed_form(setup, patterns, probe, test, bar)
            tables.append(table)
        if "sgd" in criterion.probes(setup):
            with shown.run("fit_readers", "fit v on the second half by descent") as bar:
                readers, how["descent"], met = criterion.descent(setup, patterns, folder, bar)
            meet(met)
            with shown.run("read", "ρ(S) of every neuron, by descent") as bar:
                table, met = criterion.measure_readers(setup, patterns, readers, bar)
            meet(met)
            tables.append(table)
        rho = pd.concat(tables, ignore_index=True)
        if cfg.probe.name == "both":
            how["probe_difference"] = criterion.difference(rho)
        if cfg.bootstrap.resamples:
            with shown.run("bootstrap", "ρ(S) of images drawn again") as bar:
                bootstrap = criterion.bootstrap(setup, bar)
            results.write_csv(folder / "bootstrap.csv", bootstrap)
    else:
        shaped = {}
        rho = criterion.missing_rho(setup)
        why = estimator.no_pattern_reason
        for name, title in (("fit_patterns", "fit patterns on the first half"), ("rho", "ρ(S) of every neuron")):
            shown.skip(name, title, why)
        write_tensors(folder / "patterns.safetensors", {}, {**names, "estimator": estimator.name, "reason": why})
    results.write_csv(folder / "rho.csv", rho)
    results.write_csv(folder / "splits.csv", stages.split_table(setup, unreadable))
    rho_summary = results.summarise_rho(rho[rho.probe == criterion.probes(setup)[0]], bootstrap)
    tracker.metrics(
        {
            f"rho/{layer['layer']}/{figure}": layer[figure]
            for layer in rho_summary["layers"]
            for figure in ("mean", "median")
            if layer[figure] is not None
        }
    )
    tracker.table("rho", rho)
    if figures.draw_rho(rho, folder / "rho.png", bootstrap):
        tracker.image("figures/rho", folder / "rho.png")

    areas: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    patch = steps = None
    degradation = pd.DataFrame(columns=list(results.DEGRADATION_COLUMNS))
    reason = stages.why_no_explanation(setup)
    if reason is None:
        with shown.run("explain", "explain validation images"):
            images, columns, captions = stages.explain(setup, shaped)
            figures.draw_explanations(images, columns, captions, folder / "explanations.png")
        tracker.image("figures/explanations", folder / "explanations.png")
        patch, steps = stages.patch_and_steps(setup)
        with shown.run("degrade", "image degradation") as bar:
            curves = stages.degrade(setup, shaped, bar)
        areas, intervals = stages.area_by_method(curves), stages.area_intervals(setup, curves)
        who = estimator.name if stages.chosen_method(setup)[1] else "none"
        degradation = results.degradation_rows(curves, setup.model_name, setup.source.name, who)
    else:
        shown.skip("explain", "explain validation images", reason)
        shown.skip("degrade", "image degradation", reason)
    results.write_csv(folder / "degradation.csv", degradation)
    if figures.draw_degradation(degradation, folder / "degradation.png"):
        tracker.image("figures/degradation", folder / "degradation.png")
    for method, step, probability in degradation[["method", "step", "probability_mean"]].itertuples(index=False):
        tracker.metrics({f"degradation/{method}": probability}, step=int(step))
    tracker.metrics({f"area_over_curve/{method}": area for method, area in areas.items()})

    return {
        **names,
        "estimator": estimator.name,
        "method": kind_of(stages.chosen_method(setup)[0]).name,
        "criterion": cfg.criterion,
        "probe": cfg.probe.name,
        "layer": stages.layer_setting(cfg),
        "positions": cfg.moments.positions,
        "seed": cfg.seed,
        "splits": {name: len(setup.splits[name]) for name in SPLITS},
        "unreadable": sorted(unreadable),
        **how,
        "rho": rho_summary,
        "patch": patch,
        "steps": steps,
        "area_over_curve": areas,
        "area_over_curve_interval": intervals,
        "accuracy": accuracy.get("top1"),
        "signal_angle_degrees": stages.signal_angles(setup, patterns),
    }
