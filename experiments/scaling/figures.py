"""The two figures: errors over images and positions by layer; cost as images, layers, width and GPUs grow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.scaling.cost import EVERYTHING, FORWARD, PATTERNS, RHO
from pattern_bench.plotting.styles import GREY, PALETTE, legible

COLOURS = {FORWARD: GREY, PATTERNS: legible(PALETTE[2]), EVERYTHING: legible(PALETTE[5]), RHO: legible(PALETTE[3])}
LABELS = {FORWARD: "plain forward pass", PATTERNS: "patterns", EVERYTHING: "everything for exact ρ",
          RHO: "ρ of all neurons (solves)"}  # fmt: skip
DPI = 80
NETWORK_COLOURS = (0, 1, 2, 3, 4, 5, 8, 9)
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw_errors(
    patterns: pd.DataFrame, rho: pd.DataFrame, by_share: pd.DataFrame, rho_by_share: pd.DataFrame,
    layers: Sequence[str], path: Path,
) -> None:  # fmt: skip
    """One line per layer, from dark (the first) to light (the last).

    Args:
        patterns: of ``errors.pattern_errors``.
        rho: of ``errors.rho_errors``.
        by_share: patterns of ``errors.position_errors``.
        rho_by_share: ρ of the same.
        layers: in the order they run.
        path: PNG.
    """
    colours = sns.color_palette("viridis", len(layers))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for axis, name, title in ((axes[0][0], "a", "pattern of $S_a$"), (axes[0][1], "a₊", "pattern $a_+$ of $S_{a+-}$")):
        _lines(axis, patterns[patterns.pattern == name], "n", "disjoint", layers, colours)
        n = np.array(sorted(patterns.n.unique()))
        middle = patterns[(patterns.pattern == name) & (patterns.n == n[0])].disjoint.median()
        axis.plot(n, middle * np.sqrt(n[0] / n), color="black", linestyle="--", linewidth=1, label="$1/\\sqrt{n}$")
        axis.legend(frameon=True, fontsize=8)
        axis.set(title=title, xlabel="images n", ylabel="distance of two fits of n images each", yscale="log")
    _lines(axes[0][2], by_share[by_share.pattern == "a"], "share", "full", layers, colours)
    axes[0][2].set(title="pattern of $S_a$, sampled positions", xlabel="share of positions", ylim=(0, None),
                   ylabel="distance to all positions, same images")  # fmt: skip
    panels = (
        (axes[1][0], rho, "n", "all", "ρ of $S_{a+-}$, all", "images for patterns, as many for v"),
        (axes[1][1], rho, "n", "rectified", "ρ of $S_{a+-}$, rectified", "images for patterns, as many for v"),
        (axes[1][2], rho_by_share, "share", "all", "ρ of $S_{a+-}$, all, sampled positions", "share of positions"),
    )
    for axis, table, over, criterion, title, xlabel in panels:
        chosen = table[(table.estimator == "a_plus_minus") & (table.criterion == criterion)]
        if over == "n":
            _lines(axis, chosen, over, "rho", layers, colours)
            axis.set(title=title, xlabel=xlabel, ylabel="median ρ of the layer, same held-out images")
        else:
            _lines(axis, chosen, over, "off", layers, colours)
            axis.set(title=title, xlabel=xlabel, ylabel="median |ρ − ρ of all positions|", ylim=(0, None))
    for axis in axes.flat:
        values = sorted({round(float(x), 4) for line in axis.lines for x in line.get_xdata()})
        axis.set_xscale("log")
        crowded = [after < 1.3 * value for value, after in itertools.pairwise([*values, float("inf")])]
        labels = ["" if close else f"{value:g}" for value, close in zip(values, crowded, strict=True)]
        axis.set_xticks(values, labels, fontsize=8)
        axis.xaxis.set_minor_formatter(NullFormatter())
        _plain_numbers(axis)
    scale = figure.colorbar(ScalarMappable(cmap=ListedColormap(colours)), ax=axes, fraction=0.02, pad=0.01, aspect=40)
    places = (np.arange(len(layers)) + 0.5) / len(layers)
    scale.set_ticks(places.tolist(), labels=list(layers))
    scale.ax.tick_params(labelsize=6)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


def _plain_numbers(axis: Axes) -> None:
    """On the upright axis; on a logarithmic one at 1, 2 and 5."""
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(PLAIN)


def _lines(axis: Axes, table: pd.DataFrame, over: str, value: str, layers: Sequence[str], colours: list) -> None:
    for layer, colour in zip(layers, colours, strict=True):
        mean = table[table.layer == layer].groupby(over)[value].mean()
        axis.plot(mean.index, mean, color=colour, linewidth=1.1, marker="o", markersize=2.5)


def draw_cost(
    images: pd.DataFrame, layers: pd.DataFrame, width: pd.DataFrame, positions: pd.DataFrame, gpus: pd.DataFrame,
    path: Path,
) -> None:  # fmt: skip
    """Measured cost by images, layers, width and share of positions, and the projection by GPUs.

    Args:
        images: of ``cost.by_images``.
        layers: of ``cost.by_layers``.
        width: of ``cost.by_width``.
        positions: of ``cost.by_positions``.
        gpus: of ``projection.projection``.
        path: PNG.
    """
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    panels = (
        (axes[0][0], images, "images", "seconds", "seconds by images", "images"),
        (axes[0][1], images, "images", "mib", "most memory, beyond what was held (MiB)", "images"),
        (axes[0][2], layers, "layers", "ratio", "forward passes by layers", "first k layers of the network"),
        (axes[1][0], width, "channels", "seconds", "seconds by width", "channels C of a 3×3 layer at 28×28"),
        (axes[1][1], positions, "share", "ratio", "forward passes by sampled positions", "share of positions"),
    )
    for axis, table, over, value, title, xlabel in panels:
        for what, own in table.groupby("what", sort=False):
            if value == "ratio" and what == FORWARD:
                continue
            axis.plot(
                own[over], own[value], color=COLOURS[str(what)], marker="o", markersize=4, label=LABELS[str(what)]
            )
            if value == "ratio":
                axis.fill_between(own[over], own.least, own.most, color=COLOURS[str(what)], alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel=xlabel)
        if value == "seconds":
            axis.set(xscale="log", yscale="log")
        else:
            axis.set(xscale="linear" if over == "layers" else "log", ylim=(0, None))
        axis.set_xticks(sorted(table[over].unique()), [f"{x:g}" for x in sorted(table[over].unique())])
        axis.xaxis.set_minor_formatter(NullFormatter())
        _plain_numbers(axis)
        axis.legend(frameon=True, fontsize=8)
    axis = axes[1][2]
    for place, (network, own) in enumerate(gpus.groupby("network", sort=False)):
        colour = legible(PALETTE[NETWORK_COLOURS[place % len(NETWORK_COLOURS)]])
        axis.plot(own.gpus, own.seconds / 60, color=colour, marker="o", markersize=3, label=network)
        axis.plot(own.gpus, own.seconds.iloc[0] / 60 / own.gpus, color=colour, linestyle=":", linewidth=1)
    axis.set(title="on paper: minutes for all of ImageNet", xlabel="GPUs (dotted: no serial part)", xscale="log",
             yscale="log")  # fmt: skip
    axis.set_xticks(sorted(gpus.gpus.unique()), [str(x) for x in sorted(gpus.gpus.unique())])
    axis.xaxis.set_minor_formatter(NullFormatter())
    _plain_numbers(axis)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)
