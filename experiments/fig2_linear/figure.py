"""The figure: the example at three angles of the distractor, what turns with it, and how wrong each method is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from experiments.fig2_linear.angles import ATTRIBUTIONS, SIGNALS
from experiments.fig2_linear.example import SIGNAL, distractor, drawn, fitted
from pattern_bench.plotting.styles import GREY, PALETTE, estimator_colours, legible

SHOWN = (45, 75, 135)
DRAWN, REACH = 300, 3.2
COLOURS = {name: legible(colour) for name, colour in estimator_colours([]).items()}
# Methods with the same explanation share a line: label, one of them, colour.
LINES = {
    SIGNALS: [
        ("random", "PatternNet, random", COLOURS["random"]),
        ("$S_x$, the input", "S_x, the input", COLOURS["x"]),
        ("$S_w$, gradient, DeConvNet,\nGuided BackProp", "PatternNet, S_w", COLOURS["w"]),
        ("$S_a$", "PatternNet, S_a", COLOURS["a"]),
        ("$S_{a+-}$", "PatternNet, S_a+-", COLOURS["a_plus_minus"]),
    ],
    ATTRIBUTIONS: [
        ("PatternAttribution, random", "PatternAttribution, random", COLOURS["random"]),
        ("input × gradient (z-rule),\nIntegrated Gradients, occlusion", "LRP z-rule, input × gradient", COLOURS["x"]),
        ("SmoothGrad", "SmoothGrad", legible(PALETTE[8])),
        ("w²-rule, PatternAttribution $S_w$", "w²-rule", COLOURS["w"]),
        ("PatternAttribution, $S_a$", "PatternAttribution, S_a", COLOURS["a"]),
        ("PatternAttribution, $S_{a+-}$", "PatternAttribution, S_a+-", COLOURS["a_plus_minus"]),
    ],
}


def draw(angles: pd.DataFrame, weights: pd.DataFrame, path: Path, samples: int) -> None:
    """Writes the PNG.

    Args:
        angles: of ``angles.over_seeds``.
        weights: of ``angles.weights_at``, all angles and seeds.
        path: PNG.
        samples: that w and a of the upper row are fitted on.
    """
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for axis, phi in zip(axes[0], SHOWN, strict=True):
        _cloud(axis, phi, samples)
    axes[0][0].legend(frameon=True, fontsize=8, loc="upper left")
    _turning(axes[1][0], weights)
    _wrong(axes[1][1], angles, SIGNALS, "signals: angle to $a_s y$")
    _wrong(axes[1][2], angles, ATTRIBUTIONS, r"attributions: angle to $w \odot a_s y$")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _cloud(axis: Axes, phi: float, samples: int) -> None:
    x, y = drawn(DRAWN, phi, 0)
    axis.scatter(x[:, 0], x[:, 1], c=y, cmap="Greys", vmin=-2, s=9, linewidths=0)
    neuron, a_d = fitted(samples, phi, 0), distractor(phi)
    _arrow(axis, SIGNAL * 2.6, "signal $a_s$", COLOURS["a"], 9, 0.35)
    _arrow(axis, neuron.a * 2.6, "pattern $a$ (fitted)", "black", 2, 1.0)
    _arrow(axis, a_d * (2.6 / float(a_d.norm())), "distractor $a_d$", legible(GREY), 3, 1.0)
    _arrow(axis, neuron.w * (2.6 / float(neuron.w.norm())), "filter $w$ (fitted)", COLOURS["w"], 3, 1.0)
    axis.set(title=f"distractor at {phi:g}°", xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal",
             xlabel="$x_1$", ylabel="$x_2$")  # fmt: skip


def _arrow(axis: Axes, to: Tensor, label: str, colour: str, width: float, alpha: float) -> None:
    (x, y) = to.tolist()
    axis.plot([0, x], [0, y], color=colour, linewidth=width, alpha=alpha, label=label, solid_capstyle="butt")
    head = {"arrowstyle": "-|>", "color": colour, "alpha": alpha, "linewidth": width / 2}
    axis.annotate("", xy=(x * 1.08, y * 1.08), xytext=(0.9 * x, 0.9 * y), arrowprops=head)


def _turning(axis: Axes, weights: pd.DataFrame) -> None:
    """Directions of w and a against the signal, with their sign: the example turns, exact and on samples."""
    lines = (("filter $w$", "w", COLOURS["w"]), ("pattern $a$ of $S_a$", "a", COLOURS["a"]))
    for label, name, colour in lines:
        turned = weights.assign(degrees=np.degrees(np.arctan2(weights[f"{name}2"], weights[f"{name}1"])))
        over: Any = turned.groupby(["fit", "phi"]).degrees.agg(["mean", "std"])
        exactly, found = over.loc["exact"], over.loc["samples"]
        axis.plot(exactly.index, exactly["mean"], color=colour, linewidth=1.6, label=f"{label}, exact")
        axis.errorbar(found.index, found["mean"], yerr=found["std"], color=colour, fmt="o", markersize=3, elinewidth=1,
                      label=f"{label}, from samples")  # fmt: skip
    axis.set(
        title="what turns with the distractor", xlabel="direction of the distractor φ (degrees)",
        ylabel="direction (degrees, signal at 0)", xticks=range(0, 181, 30), yticks=range(-90, 91, 30),
    )  # fmt: skip
    axis.legend(frameon=True, fontsize=8)


def _wrong(axis: Axes, angles: pd.DataFrame, tells: str, title: str) -> None:
    """Lines are exact; bands reach one standard deviation over seeds up and down from what samples give."""
    for label, method, colour in LINES[tells]:
        own = angles[(angles.tells == tells) & (angles.method == method)]
        line, found = own[own.fit == "exact"], own[own.fit == "samples"]
        axis.plot(line.phi, line["mean"], color=colour, linewidth=1.6, label=label,
                  linestyle=(0, (3, 2)) if "a+-" in method else "-")  # fmt: skip
        axis.fill_between(found.phi, found["mean"] - found.sd_seeds, found["mean"] + found.sd_seeds, color=colour,
                          alpha=0.1 if "random" in method else 0.25, linewidth=0)  # fmt: skip
    axis.set(title=title, xlabel="direction of the distractor φ (degrees)", ylabel="angle to the truth (degrees)",
             xticks=range(0, 181, 30), yticks=range(0, 91, 15), ylim=(-3, 93))  # fmt: skip
    axis.legend(frameon=True, fontsize=7, loc="upper center", framealpha=0.85)
