"""The pictures: Fig. 3, Fig. 4a and a gallery of explanations. Drawn through seaborn, saved at print quality."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text

from pattern_bench.plotting.styles import curve_label, curve_styles, estimator_colours, legible
from pattern_bench.results.labels import estimators, formula, method_place, ordered, plain
from pattern_bench.results.schema import of_same_neurons, standard_errors
from pattern_bench.storage.atomic import write_file

if TYPE_CHECKING:  # the report draws none
    from torch import Tensor

DPI = 200
PRINT_DPI = 300
PANELS_ACROSS = 4
MOST_WIDTH = 21
"""Of all panels in a row, in inches: what a page still shows legibly."""
MOST_BANDS = 8
"""More bands than these hide the curves."""
HEAT = "seismic"
RHO = r"$\rho(S)$"
MOST_LETTERS = 160
"""Of a line of text: more would make the figure wider than what it shows."""
P = ParamSpec("P")
R = TypeVar("R")


def as_written(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw all text within ``draw`` as it is, whatever names are made of: Matplotlib would read a formula wherever
    it finds two ``$``. Only estimators' labels and :data:`RHO` are drawn as such, by ``_save``."""

    @functools.wraps(draw)
    def drawn(*given: P.args, **named: P.kwargs) -> R:
        with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
            return draw(*given, **named)

    return drawn


def suffixes() -> list[str]:
    """Return the suffixes of the files that pictures can be written to, such as ``.png``."""
    return [f".{kind}" for kind in sorted(FigureCanvasAgg.get_supported_filetypes())]


def _save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    labels = [RHO, *(kind.math_label for kind in estimators().values())]
    formulas = re.compile("(" + "|".join(re.escape(text) for text in labels if "$" in text) + ")")
    for text in figure.findobj(Text):
        said = "\n".join(_shortened(line) for line in text.get_text().split("\n"))
        parts = formulas.split(said)
        if len(parts) > 1:  # every second one is a formula
            said = "".join(part if place % 2 else part.replace("$", r"\$") for place, part in enumerate(parts))
            text.set_parse_math(True)
        if said != text.get_text():
            text.set_text(said)
    write_file(path, lambda file: figure.savefig(file, dpi=dpi, bbox_inches="tight"))
    plt.close(figure)


def _shortened(line: str) -> str:
    half = MOST_LETTERS // 2
    return line if len(line) <= MOST_LETTERS else f"{line[:half]}…{line[-half:]}"


def _legend(label: str) -> str:
    """Return a label that Matplotlib shows: one that begins with ``_`` it takes for its own."""
    return f" {label}" if label.startswith("_") else label


@as_written
def draw_rho(rho: pd.DataFrame, path: Path, bootstrap: pd.DataFrame, missing: Sequence[tuple[str, ...]] = ()) -> bool:
    """Draw Fig. 3: rho per layer and estimator; points are medians over the neurons that are live under all estimators
    of the layer, bars reach from quartile to quartile, and black caps one standard error of the median (over all live
    neurons of the estimator) up and down where images were drawn again. The word stands in the place of what is
    ``missing``, by model, data, criterion, probe, layer and estimator.

    One panel per model, data set, criterion and probe. Draws nothing, and says so with False, where there is no rho.
    """
    live = of_same_neurons(rho).dropna(subset=["rho"])
    if live.empty:
        return False
    cells = live.groupby(["model", "data", "criterion", "probe", "layer", "estimator"], sort=False)
    table = cells.rho.quantile(np.array([0.25, 0.5, 0.75])).unstack().join(cells.layer_index.min()).reset_index()
    panels = list(table.groupby(["model", "data", "criterion", "probe"], sort=False))
    estimators = ordered([*table.estimator, *(cell[5] for cell in missing)])
    colours = {name: legible(colour) for name, colour in estimator_colours(estimators).items()}
    widths = [max(4.0, min(0.75, 6 / count + 0.2) * count) for count in (p.layer.nunique() for _, p in panels)]
    across = min(len(panels), PANELS_ACROSS, max(1, int(MOST_WIDTH / max(widths))))
    down = -(-len(panels) // across)
    if down > 1:
        widths = [max(widths)] * across
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            down, across, squeeze=False, sharey=True, figsize=(sum(widths) + 1, 4.2 * down),
            gridspec_kw={"width_ratios": widths}, layout="constrained",
        )  # fmt: skip
    dodge = 0.15
    for axis, ((model, data, criterion, probe), panel) in zip(axes.flat, panels, strict=False):
        order = panel.sort_values("layer_index").layer.unique().tolist()
        lacking = [cell[4:] for cell in missing if cell[:4] == (model, data, criterion, probe) and cell[4] in order]
        errors: Any = {}
        if len(bootstrap):
            names = "model == @model and data == @data and criterion == @criterion and probe == @probe"
            errors = standard_errors(bootstrap.query(names), ["layer", "estimator"])["median"]
        for number, name in enumerate(estimators):
            own = panel[panel.estimator == name]
            shift = dodge * (number - (len(estimators) - 1) / 2)
            places = [order.index(layer) + shift for layer in own.layer]
            axis.errorbar(
                places, own[0.5], yerr=[own[0.5] - own[0.25], own[0.75] - own[0.5]], color=colours[name], fmt="o",
                markersize=5, elinewidth=1.6, label=_legend(formula(name)),
            )  # fmt: skip
            caps = [float(errors.get((layer, name), np.nan)) for layer in own.layer]
            if np.isfinite(caps).any():
                axis.errorbar(places, own[0.5], yerr=caps, color="black", fmt="none", elinewidth=0.8, capsize=2.5,
                              zorder=5)  # fmt: skip
            for layer in (layer for layer, whose in lacking if whose == name):
                axis.text(order.index(layer) + shift, 0.01, "missing", rotation=90, ha="center", va="bottom",
                          fontsize=6, color=colours[name])  # fmt: skip
        by = "" if probe == "closed_form" else f", probe {probe}"
        axis.set(title=f"{model} on {data}, criterion {criterion}{by}", xlabel="layer", ylabel=RHO)
        axis.grid(visible=False, axis="x")
        axis.set_xticks(range(len(order)), order)
        axis.tick_params(axis="x", labelrotation=90 if len(order) > 8 else 30)
        axis.set_xlim(-0.5, len(order) - 0.5)
        axis.set_ylim(bottom=min(0.0, panel[0.25].min()) - 0.02)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="estimator")
    _save(figure, path, DPI if down <= 2 else DPI // 2)
    return True


@as_written
def draw_degradation(degradation: pd.DataFrame, path: Path, missing: Sequence[tuple[str, ...]] = ()) -> bool:
    """Draw Fig. 4a: mean probability of the class first predicted against the number of replaced patches.

    One panel per model and data set; the band is the standard error over images, where there are few curves. What is
    ``missing``, by model, data, estimator and method, stands in the legend as such.
    """
    if degradation.empty:
        return False
    panels = list(degradation.groupby(["model", "data"], sort=False))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            1, len(panels), squeeze=False, figsize=(5 * len(panels) + 2, 4), layout="constrained"
        )
    for axis, ((model, data), table) in zip(axes[0], panels, strict=True):
        curves = {(str(name), str(method)): curve for (name, method), curve in table.groupby(["estimator", "method"])}
        lacking = [(name, method) for *panel, name, method in missing if panel == [model, data]]
        for (name, method), style in (styles := curve_styles([*curves, *lacking])).items():
            label = _legend(curve_label(name, method, styles, formula(name)))
            colour = legible(style.colour)
            dashes = (0, style.dashes) if style.dashes else "-"
            if (name, method) not in curves:
                axis.plot([], label=f"{label} (missing)", color=colour, linestyle=dashes)
                continue
            curve = curves[name, method].sort_values("step")
            error = curve.probability_std / curve.n**0.5
            axis.plot(curve.step, curve.probability_mean, label=label, color=colour, linestyle=dashes)
            if len(styles) <= MOST_BANDS:
                axis.fill_between(curve.step, curve.probability_mean - error, curve.probability_mean + error,
                                  color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        axis.set(
            title=f"{model} on {data} (n = {int(table.n.max())})",
            xlabel="replaced patches", ylabel="probability of the predicted class", ylim=(0, 1.02),
        )  # fmt: skip
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)
    return True


@as_written
def draw_explanations(images: Tensor, columns: Mapping[str, Tensor], captions: list[str], path: Path) -> None:
    """Draw one row per image: the input, then each explanation. Signals are drawn as curves, volumes by the slice in
    the middle of their first spatial dimension.

    Args:
        images: (n, C, spatial...) network inputs, shown from their own minimum to their maximum.
        columns: by title, explanations of the same shape. A title that starts with ``signal`` is shown in colour
            as x / (2 max|x|) + 1/2, any other summed over channels as a diverging heat map.
        captions: a line per image.
    """
    count, width = len(images), 1 + len(columns)
    figure, axes = plt.subplots(count, width, squeeze=False, figsize=(1.9 * width, 2.05 * count), layout="constrained")
    for row, caption in enumerate(captions):
        image = images[row]
        low, high = image.min(), image.max()
        _show(axes[row][0], (image - low) / (high - low).clamp(min=1e-12))
        axes[row][0].set_ylabel(caption, fontsize=7)
        for axis, (title, explanations) in zip(axes[row][1:], columns.items(), strict=True):
            _show_explanation(axis, explanations[row], signal=title.startswith("signal"))
    for axis, title in zip(axes[0], ["input", *columns], strict=True):
        axis.set_title(title, fontsize=9)
    _save(figure, path)


@dataclass(frozen=True)
class Panel:
    """One picture of a gallery: (C, spatial...), shown as ``input`` (from its minimum to its maximum), in ``colour``
    (as x / (2 max|x|) + 1/2), or as ``heat`` (summed over channels, on a diverging map that is symmetric around 0)."""

    title: str
    image: Tensor
    how: str


@as_written
def draw_panels(
    rows: Sequence[Sequence[Panel | None]], labels: Sequence[str], path: Path, percentile: float = 100.0
) -> None:
    """Draw rows of panels with a label on the left of each; None leaves a place empty. At print quality.

    With a ``percentile`` below 100 that of |x| stands in the place of max|x|, and what lies beyond is cut off; the
    figure says so.
    """
    width = max(len(row) for row in rows)
    figure, axes = plt.subplots(
        len(rows), width, squeeze=False, figsize=(1.55 * width + 1.6, 1.75 * len(rows)), layout="constrained"
    )
    for row, label, places in zip(rows, labels, axes, strict=True):
        for axis, panel in zip(places, [*row, *[None] * (width - len(row))], strict=True):
            if panel is None:
                axis.axis("off")
                continue
            axis.set_title(panel.title, fontsize=8)
            if panel.how == "input":
                low, high = panel.image.min(), panel.image.max()
                _show(axis, (panel.image - low) / (high - low).clamp(min=1e-12))
            else:
                _show_explanation(axis, panel.image, panel.how == "colour", percentile)
        places[0].text(-0.08, 0.5, label, transform=places[0].transAxes, ha="right", va="center", fontsize=8)
    end = "max" if percentile == 100 else f"{percentile:g} %"
    if any(panel is not None and panel.how == "heat" for row in rows for panel in row):
        scale = figure.colorbar(
            ScalarMappable(Normalize(-1, 1), HEAT), ax=axes, ticks=[-1, 0, 1], fraction=0.02, pad=0.01, aspect=25,
            shrink=min(1.0, 3 / (1.75 * len(rows))),
        )  # fmt: skip
        scale.ax.set_yticklabels([f"−{end}", "0", end], fontsize=7)
    if percentile != 100:
        figure.supxlabel(f"scaled to the {percentile:g}th percentile of |x|; beyond it, values are cut off", fontsize=7)
    _save(figure, path, PRINT_DPI)


@as_written
def draw_similarity(table: pd.DataFrame, path: Path, title: str, xlabel: str, ylabels: Mapping[str, str]) -> None:
    """Draw curves of every method over depth, from the output to the input, a panel per measure; the band is one
    standard deviation over images up and down.

    Args:
        table: the columns ``method``, ``layer``, ``layer_index``, ``measure``, ``mean`` and ``std``.
        path: PNG.
        title: above all panels.
        xlabel: what the layers stand for.
        ylabels: of each measure, in the order of the panels.
    """
    order = table.sort_values("layer_index", ascending=False).drop_duplicates("layer_index").layer.tolist()
    methods = sorted(table.method.unique(), key=method_place)
    colours = dict(zip(methods, sns.color_palette("colorblind", max(10, len(methods))), strict=False))
    across = min(2, len(ylabels))
    down = -(-len(ylabels) // across)
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            down, across, squeeze=False, sharex=True, layout="constrained",
            figsize=(max(4.0, 0.19 * len(order) + 0.8) * across + 2.0, 3.0 * down + 1.6),
        )  # fmt: skip
    markers = "osD^vP*X<>h8"
    for axis, (measure, ylabel) in zip(axes.flat, ylabels.items(), strict=False):
        chosen = table[table.measure == measure]
        for i, method in enumerate(methods):
            curve = chosen[chosen.method == method].sort_values("layer_index", ascending=False)
            at = [order.index(layer) for layer in curve.layer]
            axis.plot(at, curve["mean"], label=_legend(plain(method)), color=colours[method], linewidth=1.4,
                      marker=markers[i % len(markers)], markersize=3.5)  # fmt: skip
            axis.fill_between(at, curve["mean"] - curve["std"], curve["mean"] + curve["std"], color=colours[method],
                              alpha=0.1, linewidth=0)  # fmt: skip
        lowest = min(0.0, chosen["mean"].min())
        axis.set(ylabel=ylabel, ylim=(lowest - 0.08, 1.05))
        axis.set_xticks(range(len(order)), order, rotation=90, fontsize=7 if len(order) > 12 else 8)
    for axis in axes.flat[len(ylabels) :]:  # an odd number of measures leaves a panel over
        axis.set_visible(False)
        axes[-2][-1].tick_params(labelbottom=True)
    axes[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel(xlabel, fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _plane(values: Tensor) -> Tensor:
    """Return what of (C, spatial...) can be drawn: all of signals (C, T) and images; of volumes the slice in the middle
    of the first spatial dimension."""
    while values.ndim > 3:
        values = values[:, values.shape[1] // 2]
    return values


def _show_explanation(axis: plt.Axes, explanation: Tensor, signal: bool, percentile: float = 100.0) -> None:
    explanation = _plane(explanation)
    shown = explanation if signal else explanation.sum(0)
    bound = float(np.percentile(shown.abs().numpy(), percentile))
    # Where fewer pixels than that are not zero, their own maximum.
    bound = max(bound or float(shown.abs().max()), 1e-30)
    if signal:
        _show(axis, (shown / (2 * bound) + 0.5).clamp(0, 1))
        return
    if shown.ndim == 1:
        shown = (shown / bound).clamp(-1, 1)
        for part, end in ((shown.clamp(min=0), 1.0), (shown.clamp(max=0), 0.0)):
            axis.fill_between(range(len(part)), part.numpy(), color=plt.get_cmap(HEAT)(end), linewidth=0)
        axis.set(xticks=[], yticks=[], ylim=(-1.05, 1.05))
        return
    axis.imshow(shown.numpy(), cmap=HEAT, vmin=-bound, vmax=bound, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _show(axis: plt.Axes, image: Tensor) -> None:
    """Show (C, spatial...) in [0, 1]: a signal as a curve per channel, an image in grey unless it has three."""
    image = _plane(image)
    if image.ndim == 2:
        axis.plot(image.mT.numpy(), linewidth=0.7)
        axis.set(xticks=[], yticks=[], ylim=(-0.05, 1.05))
        return
    if image.shape[0] == 3:
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axis.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
