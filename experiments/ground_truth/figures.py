"""The two figures: what predicts who is right, and precision over signal-to-noise ratio and suppressor strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from experiments.ground_truth.networks import MODELS
from experiments.ground_truth.scoring import BASELINES, ESTIMATORS
from experiments.ground_truth.tables import NAMES, label
from pattern_bench.plotting.styles import GREY, curve_styles, estimator_colours, legible
from pattern_bench.results.labels import formula

DPI = 120
MARKERS = dict(zip(MODELS, "sD^", strict=True))
SHOWN = [
    ("a", "pattern_net"), ("a_plus_minus", "pattern_net"), ("a", "pattern_attribution"),
    ("a_plus_minus", "pattern_attribution"), ("none", "gradient"), ("none", "lrp_z"), ("none", "dtd_w2"),
    ("none", "guided_backprop"), ("none", "prediction_difference"), ("none", "input"), ("none", "random_map"),
]  # fmt: skip


def draw_predicts(table: pd.DataFrame, correlations: pd.DataFrame, path: Path) -> None:
    """Precision over ρ, under two criteria, and over two areas, a row for each scenario; a point is the mean over
    seeds of one explanation in one setting. Above each panel stand the correlations in one network, of each model."""
    table = table[table.reached & ~table.method.isin(BASELINES)]
    colours = {name: legible(colour) for name, colour in estimator_colours(ESTIMATORS).items()} | {"none": GREY}
    panels = {
        "rho_first": (r"$\rho$ of the first layer", "estimators"),
        "rectified_first": (r"$\rho$ of the first layer, rectified", "estimators"),
        "area_mean": ("area over the curve, patches' mean", "methods"),
        "area_zero": ("area over the curve, patches at zero", "methods"),
    }
    scenarios = table.scenario.unique()
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            len(scenarios), len(panels), squeeze=False, sharey=True, sharex="col", layout="constrained",
            figsize=(16, 0.6 + 3.2 * len(scenarios)),
        )  # fmt: skip
    for line, scenario in zip(axes, scenarios, strict=True):
        for axis, (predictor, (xlabel, among)) in zip(line, panels.items(), strict=True):
            for row in table[table.scenario == scenario].dropna(subset=[predictor]).itertuples():
                colour = colours[str(row.estimator)]
                axis.scatter(
                    getattr(row, predictor), row.precision, marker=MARKERS[str(row.model)], s=26, linewidths=1.1,
                    edgecolors=colour, facecolors="none" if row.method == "pattern_net" else colour, alpha=0.8,
                    zorder=1 if row.estimator == "none" else 2,
                )  # fmt: skip
            chosen = correlations[
                (correlations.scenario == scenario) & (correlations.predictor == predictor)
                & (correlations.explanations == among) & (correlations.score == "precision")
            ]  # fmt: skip
            texts = [f"{NAMES[str(row.model)]} {row.correlation:.2f} ± {row.correlation_error:.2f}"
                     for row in chosen.itertuples()]  # fmt: skip
            axis.set(ylim=(-0.04, 1.04))
            axis.set_title("rank correlation\n" + ", ".join(texts), fontsize=8)
            if scenario == scenarios[-1]:
                axis.set_xlabel(xlabel)
        line[0].set_ylabel(f"{scenario}\nprecision")
    handles = [_mark(formula(name), color=colours[name]) for name in ESTIMATORS] + [_mark("no patterns", color=GREY)]
    handles += [_mark("PatternNet", color="black", markerfacecolor="none"), _mark("all others", color="black")]
    handles += [_mark(NAMES[model], color="black", marker=MARKERS[model]) for model in MODELS]
    axes[0][-1].legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


def _mark(text: str, **style: Any) -> Line2D:
    return Line2D([], [], label=text, **{"marker": "o", "linestyle": "", "markersize": 5, **style})


def draw_sweep(table: pd.DataFrame, path: Path) -> None:
    """Precision by method over the signal's share (where the suppressor is as in most rows) and over the suppressor's
    strength, a column for each model; bands are 95 % intervals over seeds."""
    styles = curve_styles(SHOWN)
    usual = {name: table[name].mode().iloc[0] for name in ("signal", "suppressor")}
    rows = {"signal": "the signal's share α", "suppressor": "strength of the suppressor's distractor β"}
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(2, len(MODELS), sharey=True, figsize=(12, 7), layout="constrained")
    for line, (setting, xlabel) in zip(axes, rows.items(), strict=True):
        other = "suppressor" if setting == "signal" else "signal"
        part = table[table[other] == usual[other]].sort_values(setting)
        for axis, model in zip(line, MODELS, strict=True):
            for who, style in styles.items():
                curve = part[(part.model == model) & (part.estimator == who[0]) & (part.method == who[1])]
                dashes = (0, style.dashes) if style.dashes else "-"
                colour = legible(style.colour)
                axis.plot(curve[setting], curve.precision, label=label(*who), color=colour, linestyle=dashes,
                          marker="o", markersize=3)  # fmt: skip
                axis.fill_between(
                    curve[setting], curve.precision - curve.precision_error, curve.precision + curve.precision_error,
                    color=colour, alpha=0.12, linewidth=0,
                )  # fmt: skip
            accuracy = part[part.model == model].drop_duplicates(setting)
            axis.plot(accuracy[setting], accuracy.accuracy, label="accuracy", color="black", linewidth=0.8, alpha=0.6)
            axis.set(title=NAMES[model], xlabel=xlabel, ylim=(-0.03, 1.03))
        line[0].set_ylabel("precision at the truth mask's size")
    axes[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)
