"""Changes between two sets of runs, A and B: differences B − A with 95 % intervals, and what they are intervals
of. Larger is better for all of ρ, area over the curve and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from pattern_bench.reporting.gathering import CELL, CURVE, PANEL, ROUNDING, Cell, Gathered
from pattern_bench.reporting.runs import Run
from pattern_bench.reporting.tables import area_intervals, areas
from pattern_bench.results.labels import RANDOM_ORDER, estimators, ordered
from pattern_bench.results.schema import LAYER, of_same_neurons

RESAMPLES = 2000
NAMES = [*CELL, "method"]
ALL_LAYERS = "all layers"
BETTER, WORSE, UNCLEAR, SAME = "better", "worse", "no clear difference", "the same"
BASELINE = "baseline"
"""Of random directions and orders, for which there is no better: they show what changed for every explanation."""
DRAWING = ("seed", "bootstrap.chunks", "moments.positions")
"""Settings that the draws depend on, besides those of the data."""
Ends = tuple[float, float]
UNKNOWN: Ends = (math.nan, math.nan)


@dataclass(frozen=True)
class Change:
    """One quantity in A and in B.

    Args:
        quantity: ``rho``, ``area over the curve`` or ``accuracy``.
        names: of NAMES, those that it has.
        a, b: its values; NaN where there is none.
        low, high: ends of the 95 % interval of ``b − a``.
        interval: what the interval is of.
        note: in which of the two it is missing, or why there is no value.
        left_out: how many neurons have a ρ under the estimator, and none under another that is compared; of ρ alone.
    """

    quantity: str
    names: dict[str, str]
    a: float
    b: float
    low: float = math.nan
    high: float = math.nan
    interval: str = ""
    note: str = ""
    left_out: int | None = None

    @property
    def verdict(self) -> str:
        """Return how B stands to A: a change is clear where the whole interval, and more than rounding, speaks for."""
        if self.note:
            return self.note
        estimator = estimators().get(self.names.get("estimator", ""))
        if (estimator and estimator.baseline) or self.names.get("method", "").startswith(RANDOM_ORDER):
            return BASELINE
        if abs(self.b - self.a) <= ROUNDING * max(abs(self.a), abs(self.b)) + 1e-6:
            return SAME
        if math.isnan(self.low):
            return "no interval"
        return BETTER if self.low > 0 else WORSE if self.high < 0 else UNCLEAR


@dataclass(frozen=True)
class Side:
    """The results of A or of B, with the names that they have in the comparison.

    Args:
        rho: rows of all cells.
        drawn: resamples of each cell, where there are any.
        runs: which run has a cell.
        areas: of each curve, and the ends of its interval.
        accuracies: by model and data, of the latest run that measured it, and on how many images.
    """

    rho: pd.DataFrame
    drawn: dict[Cell, pd.DataFrame]
    runs: dict[Cell, Run]
    areas: dict[Cell, tuple[float, Ends]]
    accuracies: dict[Cell, tuple[float, int]]


def changes(a: Gathered, b: Gathered) -> list[Change]:
    """Return every change of ρ (all layers together, then each), area over the curve, and accuracy.

    Where A has one model and B another, they are compared with each other, and so are data sets.
    """
    names = alignment(a, b)
    sides = (_side(a, names[0]), _side(b, names[1]))
    return [*_rho(*sides), *_areas(*sides), *_accuracies(*sides)]


Alignment = dict[str, dict[str, str]]
"""By column, what names are called in the comparison."""


def alignment(a: Gathered, b: Gathered) -> tuple[Alignment, Alignment]:
    """Return the names of models and data of A, and of B, in the comparison: ``one → other`` where each side has one,
    and not the same."""
    names: tuple[Alignment, Alignment] = ({}, {})
    for place, column in enumerate(("model", "data")):
        mine, its = ({cell[place] for cell in [*side.cells, *side.curves]} for side in (a, b))
        if len(mine) == len(its) == 1 and mine != its:
            (one,), (other,) = mine, its
            names[0][column], names[1][column] = {one: f"{one} → {other}"}, {other: f"{one} → {other}"}
    return names


def _side(gathered: Gathered, names: Alignment) -> Side:
    def called(key: Any, columns: Sequence[str] = CELL) -> Cell:
        return tuple(names.get(column, {}).get(value, value) for column, value in zip(columns, key, strict=True))

    values, ends = areas(gathered.degradation), area_intervals(gathered.curves)
    accuracies: dict[Cell, tuple[float, int]] = {}
    for run in gathered.runs:
        if "top1" in run.accuracy:
            key = called((str(run.accuracy.get("model")), str(run.accuracy.get("data"))), CURVE[:2])
            accuracies[key] = (float(run.accuracy["top1"]), int(run.accuracy["images"]))
    aligned = {name: gathered.rho[name].cat.rename_categories(names[name]) for name in names}
    return Side(
        gathered.rho.assign(**aligned),
        {called(cell): rows for cell, rows in gathered.bootstrap.groupby(CELL, sort=False)},
        {called(cell): run for cell, run in gathered.cells.items()},
        {
            called(curve, CURVE): (float(values[curve]), (ends[curve][0], ends[curve][1]) if curve in ends else UNKNOWN)
            for curve in gathered.curves
        },
        accuracies,
    )


# --- rho ---


def _rho(a: Side, b: Side) -> list[Change]:
    wholes: dict[Cell, list[Cell]] = {}
    for cell in dict.fromkeys([*a.runs, *b.runs]):
        wholes.setdefault((*cell[:4], cell[5]), []).append(cell)
    rank = {name: place for place, name in enumerate(ordered(whole[4] for whole in wholes))}
    by_layer, over_layers = Neurons(a, b, LAYER), Neurons(a, b, PANEL)
    rows = []
    for (*panel, estimator), cells in sorted(wholes.items(), key=lambda whole: (whole[0][:4], rank[whole[0][4]])):
        names = {**dict(zip(PANEL, panel, strict=True)), "estimator": estimator}
        rows.append(_rho_change({**names, "layer": ALL_LAYERS}, a, b, cells, over_layers))
        rows += [_rho_change({**names, "layer": cell[4]}, a, b, [cell], by_layer) for cell in cells]
    return rows


class Neurons:
    """The neurons that A and B are compared over: those that are live under all estimators of both. Where A and B have
    different networks, whose neurons have nothing to do with each other, each has its own.

    Args:
        a, b: the sides.
        within: columns that tell apart what is not compared.
    """

    def __init__(self, a: Side, b: Side, within: Sequence[str]) -> None:
        both = pd.concat([a.rho.assign(side=0), b.rho.assign(side=1)], ignore_index=True)
        both = both.astype(dict.fromkeys(CELL, str)).drop_duplicates(["side", *CELL, "neuron"])
        neurons = both.drop_duplicates([*within, "layer", "neuron", "side"]).groupby([*within, "layer", "neuron"]).side
        listed_in_both: Any = (neurons.size() == 2).groupby(list(within)).all()
        self.within = len(within)
        self.paired = {
            where: listed or _same_network(a, b, where[0]) for where, listed in listed_in_both.to_dict().items()
        }
        wheres = pd.MultiIndex.from_frame(both[list(within)])
        apart = ~wheres.map(self.paired).to_numpy(dtype=bool)
        both["apart"] = apart * (1 + both.side)
        compared = of_same_neurons(both, [*within, "apart"], ["side", "estimator"])
        self.own, self.compared = (
            dict(iter(table.dropna(subset=["rho"]).set_index(["layer", "neuron"]).groupby(["side", *CELL]).rho))
            for table in (both, compared)
        )

    def of(self, cells: Sequence[Cell]) -> tuple[pd.Series, pd.Series, bool, int]:
        """Return ρ in A and in B by layer and neuron; whether they have the same neurons; and how many other live ones
        the estimator of the ``cells`` has."""
        mine, its = (_below(self.compared, side, cells) for side in (0, 1))
        own, others = (_below(self.own, side, cells).index for side in (0, 1))
        paired = self.paired[cells[0][: self.within]]
        if paired:
            return mine, its, True, len(own.union(others)) - len(mine.index.union(its.index))
        return mine, its, False, len(own) + len(others) - len(mine) - len(its)


def _below(values: dict[tuple[Any, ...], pd.Series], side: int, cells: Sequence[Cell]) -> pd.Series:
    """The ``values`` of a side's cells, below one another."""
    parts = [values[side, *cell] for cell in cells if (side, *cell) in values]
    return pd.concat(parts) if parts else pd.Series(dtype=float, index=pd.MultiIndex.from_arrays([[], []]))


def _same_network(a: Side, b: Side, model: str) -> bool:
    """Whether all runs of the model have the same settings of it, going by what is known."""
    known = [
        {key: value for key, value in run.settings.items() if key.startswith("model.")}
        for side in (a, b)
        for cell, run in side.runs.items()
        if cell[0] == model
    ]
    return all(known) and all(each == known[0] for each in known)


def _rho_change(names: dict[str, str], a: Side, b: Side, cells: Sequence[Cell], neurons: Neurons) -> Change:
    """Of one layer, or of several together. The interval is over images where both sides drew them again, for then
    patterns, v and ρ are computed anew for each draw (and averaged over all live neurons, which is what runs keep of
    it); otherwise over neurons, as if those of the layer were drawn from many like them, with the images as they are.
    Where both have the same neurons, they are compared one by one."""
    mine, its, paired, left_out = neurons.of(cells)
    for side, other in ((a, "A"), (b, "B")):
        if not any(cell in side.runs for cell in cells):
            return Change("rho", names, mine.mean(), its.mean(), note=f"missing in {other}", left_out=left_out)
    if not (len(mine) and len(its)):
        return Change("rho", names, mine.mean(), its.mean(), note="not defined", left_out=left_out)
    drawn = _drawn_again(a, cells, mine), _drawn_again(b, cells, its)
    if drawn[0] is not None and drawn[1] is not None:
        same = _same_draws([side.runs[cell] for side in (a, b) for cell in cells if cell in side.runs])
        ends, how = over_images(its.mean() - mine.mean(), drawn[0], drawn[1], same)
        how += ", with the neurons left out" if left_out else ""
    else:
        its = its.reindex(mine.index) if paired else its
        ends = over_neurons(mine.to_numpy(), its.to_numpy(), paired)
        how = f"neurons, {'paired' if paired else 'unpaired'} bootstrap"
    return Change("rho", names, mine.mean(), its.mean(), *ends, how, left_out=left_out)


def over_neurons(a: np.ndarray, b: np.ndarray, paired: bool) -> Ends:
    """Return the percentile bootstrap interval of ``mean(b) − mean(a)`` over neurons, (n,) each; those of a pair are
    drawn together."""
    draw = np.random.default_rng(0)
    means = _resampled_means(b - a, draw) if paired else _resampled_means(b, draw) - _resampled_means(a, draw)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    at_once = max(1, 2**22 // len(values))
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    return np.concatenate([values[draw.integers(len(values), size=(n, len(values)))].mean(1) for n in sizes])


def over_images(difference: float, a: np.ndarray, b: np.ndarray, same_draws: bool) -> tuple[Ends, str]:
    """Return the interval ``difference ± t · standard error`` from means under resamples of the images, (resamples,)
    each.

    Where both sides drew the same images, the error is the spread of the differences within a draw. Otherwise the two
    are taken for independent, which is too wide where they share images. Student's t stands for how well so many
    resamples know the error.
    """
    if same_draws and len(a) == len(b):
        error, known = float((b - a).std(ddof=1)), len(a)
    else:
        error, known = float(np.hypot(a.std(ddof=1), b.std(ddof=1))), min(len(a), len(b))
    reach = float(student.ppf(0.975, known - 1)) * error
    how = f"images, {'paired' if same_draws and len(a) == len(b) else 'independent'} resamples"
    return (difference - reach, difference + reach), how


def _drawn_again(side: Side, cells: Sequence[Cell], rho: pd.Series) -> np.ndarray | None:
    """Mean ρ under each resample over the layers, each weighted with its neurons in ``rho``, (resamples,); None where a
    layer has fewer than two resamples, or others than the rest."""
    neurons = rho.groupby(level=0).size()
    columns: list[pd.Series] = []
    weights = []
    for cell in cells:
        if cell not in side.runs or cell[4] not in neurons.index:
            continue
        if cell not in side.drawn:
            return None
        means = side.drawn[cell].drop_duplicates("resample").set_index("resample")["mean"].dropna()
        if len(means) < 2 or (columns and not means.index.equals(columns[0].index)):
            return None
        columns.append(means)
        weights.append(neurons[cell[4]])
    return np.average([each.to_numpy() for each in columns], axis=0, weights=weights) if columns else None


def _same_draws(runs: Sequence[Run]) -> bool:
    """Whether all runs drew the same images of the same splits, going by their settings."""
    drawn = [
        {key: value for key, value in run.settings.items() if key.split(".")[0] == "data" or key in DRAWING}
        for run in runs
    ]
    return all(drawn) and all(each == drawn[0] for each in drawn)


# --- area over the curve, accuracy ---


def _areas(a: Side, b: Side) -> list[Change]:
    """Intervals of the two runs, put together as if they were independent: too wide where they share images."""
    rows = []
    for curve in dict.fromkeys([*a.areas, *b.areas]):
        (mine, my_ends), (its, its_ends) = (side.areas.get(curve, (math.nan, UNKNOWN)) for side in (a, b))
        note = "missing in A" if curve not in a.areas else "missing in B" if curve not in b.areas else ""
        ends = difference_interval(mine, my_ends, its, its_ends)
        names = dict(zip(CURVE, curve, strict=True))
        rows.append(Change("area over the curve", names, mine, its, *ends, "images, independent", note))
    return rows


def _accuracies(a: Side, b: Side) -> list[Change]:
    rows = []
    for key in [key for key in a.accuracies if key in b.accuracies]:
        (mine, n), (its, m) = a.accuracies[key], b.accuracies[key]
        ends = difference_interval(mine, wilson(mine, n), its, wilson(its, m))
        names = {"model": key[0], "data": key[1]}
        rows.append(Change("accuracy", names, mine, its, *ends, "images, independent"))
    return rows


def difference_interval(a: float, a_ends: Ends, b: float, b_ends: Ends) -> Ends:
    """Return the interval of ``b − a`` from those of two independent estimates (Zou and Donner 2008: the distances from
    each estimate to its ends, added in squares)."""
    low = b - a - math.hypot(b - b_ends[0], a_ends[1] - a)
    high = b - a + math.hypot(b_ends[1] - b, a - a_ends[0])
    return low, high


def wilson(share: float, n: int) -> Ends:
    """Return Wilson's 95 % interval of a ``share`` between 0 and 1 of ``n`` draws (Wilson 1927)."""
    z = 1.959963984540054
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


# --- settings ---


def changed_settings(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return the settings, and versions of packages, that differ between A and B: dotted key, value in A, in B."""
    sides: list[dict[str, dict[str, None]]] = []
    for runs in (a, b):
        values: dict[str, dict[str, None]] = {}
        for run in runs:
            versions = {f"version of {name}": str(known) for name, known in run.summary.get("versions", {}).items()}
            for key, value in {**run.settings, **versions}.items():
                values.setdefault(key, {})[value] = None
        sides.append(values)
    keys = dict.fromkeys([*sides[0], *sides[1]])
    pairs = [(key, *(", ".join(sorted(side.get(key, {}))) or "–" for side in sides)) for key in keys]
    return [(key, mine, its) for key, mine, its in pairs if mine != its]


def change_table(every: Sequence[Change]) -> pd.DataFrame:
    """Return a table with a row per change."""
    rows = [
        {
            "quantity": change.quantity, **change.names, "a": change.a, "b": change.b,
            "difference": change.b - change.a, "low": change.low, "high": change.high, "interval": change.interval,
            "verdict": change.verdict, "left_out": change.left_out,
        }
        for change in every
    ]  # fmt: skip
    columns = ["quantity", *NAMES, "a", "b", "difference", "low", "high", "interval", "verdict", "left_out"]
    return pd.DataFrame(rows, columns=columns).astype({"left_out": "Int64"})
