"""Where the marks of the page's figures stand: numbers only, in the units of an SVG; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pattern_bench.plotting.styles import SOLID, Style

HEIGHT, TOP, LEFT, RIGHT = 380.0, 16.0, 56.0, 14.0
SLOT, LEAST_WIDTH, CURVE_WIDTH = 15.0, 420.0, 760.0
BINS = 24
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0", "M-4 -4h8v8h-8z", "M0 -5.2L5 4H-5z", "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    "M0 5.2L5 -4H-5z", "M-1.6 -5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
)  # fmt: skip
"""Circle, square, triangle, diamond, triangle down, plus: with colour alone nobody has to tell series apart."""


@dataclass(frozen=True)
class Value:
    """A value of a series at a category or step; NaN where it is missing.

    Args:
        at: the category's or step's number.
        value: what the mark shows.
        low, high: ends of its bar or band.
        error: half the distance between its caps; NaN for none.
        text: what is said of it.
    """

    at: float
    value: float
    low: float
    high: float
    error: float
    text: str


@dataclass
class Series:
    """Marks of one series; each point is (x, y, text)."""

    name: Any
    colour: str
    dashes: str
    marker: str
    line: str = ""
    band: str = ""
    bars: list[tuple[float, float, float]] = field(default_factory=list)
    caps: list[tuple[float, float, float]] = field(default_factory=list)
    points: list[tuple[float, float, str]] = field(default_factory=list)
    missing: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """A figure: its size, ticks as (place, label), and series. ``bottom`` is where the x axis stands; a ``wide`` one is
    not made to fit a phone."""

    key: str
    title: str
    width: float
    height: float
    bottom: float
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    slanted: bool
    wide: bool
    zero: float | None
    series: list[Series]
    left: float = LEFT
    top: float = TOP
    right: float = RIGHT


def dots(
    key: str, title: str, x_label: str, y_label: str, categories: Sequence[str],
    series: Mapping[Any, Sequence[Value]], styles: Mapping[Any, Style], least: tuple[float, float],
) -> Plot:  # fmt: skip
    """Place points with bars, side by side in each category.

    Args:
        key: the figure's id.
        title: what it shows, for those who do not see it.
        x_label, y_label: of the axes.
        categories: their names, in order.
        series: the values of each, by its name.
        styles: of each.
        least: what the y axis reaches from and to, at least.
    """
    width = max(LEAST_WIDTH, LEFT + RIGHT + len(categories) * (SLOT * len(series) + 22))
    low, high = _range([v for values in series.values() for v in values], least)
    room = (width - LEFT - RIGHT) / max(1, len(categories))
    slot = min(SLOT * 1.6, room * 0.8 / max(1, len(series)))
    longest = max((len(name) for name in categories), default=0)
    slanted = longest * 7.2 > room
    foot = 34 + min(120.0, longest * 5.2 if slanted else 14)
    bottom = TOP + HEIGHT
    drawn = []
    for place, (name, values) in enumerate(series.items()):
        shift = slot * (place - (len(series) - 1) / 2)
        one = Series(name, styles[name].colour, "", MARKERS[place % len(MARKERS)])
        for v in values:
            x = _short(LEFT + room * (v.at + 0.5) + shift)
            if math.isnan(v.value):
                one.missing.append((x, v.text))
                one.points.append((x, _short(bottom - 9), v.text))
                continue
            y = _y(v.value, low, high)
            one.points.append((x, y, v.text))
            if v.low < v.high:
                one.bars.append((x, _y(v.low, low, high), _y(v.high, low, high)))
            if v.error > 0:
                one.caps.append((x, _y(v.value - v.error, low, high), _y(v.value + v.error, low, high)))
        drawn.append(one)
    ticks = [(_short(LEFT + room * (i + 0.5)), name) for i, name in enumerate(categories)]
    zero = _y(0, low, high) if low < 0 else None
    return Plot(key, title, _short(width), _short(bottom + foot), bottom, x_label, y_label, ticks, _ticks(low, high),
                slanted, True, zero, drawn)  # fmt: skip


def curves(
    key: str, title: str, x_label: str, y_label: str, series: Mapping[Any, Sequence[Value]],
    styles: Mapping[Any, Style],
) -> Plot:  # fmt: skip
    """Place lines with bands; arguments as for :func:`dots`. A series without values is missing."""
    low, high = 0.0, 1.0
    last = max((v.at for values in series.values() for v in values), default=1.0) or 1.0
    drawn = []
    for name, values in series.items():
        style = styles[name]
        dashes = " ".join(f"{2 * d:g}" for d in style.dashes) if style.dashes != SOLID else ""
        one = Series(name, style.colour, dashes, MARKERS[0])
        places = [(_short(LEFT + (CURVE_WIDTH - LEFT - RIGHT) * v.at / last), v) for v in values]
        one.points = [(x, _y(v.value, low, high), v.text) for x, v in places]
        if values:
            one.line = "M" + "L".join(f"{x:g} {y:g}" for x, y, _ in one.points)
            upper = [f"{x:g} {_y(min(v.high, 1.0), low, high):g}" for x, v in places]
            lower = [f"{x:g} {_y(max(v.low, 0.0), low, high):g}" for x, v in reversed(places)]
            one.band = "M" + "L".join(upper + lower) + "z"
        drawn.append(one)
    step = max(1, round(last / 10))
    ticks = [(_short(LEFT + (CURVE_WIDTH - LEFT - RIGHT) * n / last), str(n)) for n in range(0, int(last) + 1, step)]
    bottom = TOP + HEIGHT
    return Plot(key, title, CURVE_WIDTH, bottom + 60, bottom, x_label, y_label, ticks, _ticks(low, high), False,
                False, None, drawn)  # fmt: skip


def _range(values: Iterable[Value], least: tuple[float, float]) -> tuple[float, float]:
    ends = [end for v in values for end in (v.value, v.low, v.high, v.value - v.error, v.value + v.error)]
    ends = [end for end in ends if math.isfinite(end)]
    low, high = min([least[0], *ends]), max([least[1], *ends])
    room = 0.03 * (high - low)
    return (low - room if low < least[0] else low), (high + room if high > least[1] else high)


def _y(value: float, low: float, high: float) -> float:
    return _short(TOP + HEIGHT * (high - value) / (high - low))


def _short(value: float) -> float:
    return round(value, 2)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return ticks at round values: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    places = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(_y(n * step, low, high), f"{n * step:.{places}f}".replace("-", "−")) for n in range(first, last + 1)]


@dataclass(frozen=True)
class Histogram:
    """Bars of a small picture, 96 × 28, as the path of an SVG; and a text for those who do not see it."""

    path: str
    text: str


def histograms(values: np.ndarray, cells: np.ndarray, low: float, high: float) -> list[str]:
    """Return the SVG path of a histogram of each cell, all at once.

    Args:
        values: (n,), of all cells.
        cells: (n,), the number of the cell that each belongs to, from 0.
        low, high: ends of the axis; what lies beyond is counted in the first and last bin.
    """
    bins = np.clip(((values - low) / (high - low) * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(cells * BINS + bins, minlength=BINS * (cells.max() + 1)).reshape(-1, BINS)
    heights = 26 * counts / counts.max(1, keepdims=True).clip(min=1)
    return ["".join(f"M{4 * i} 28v{-h:.1f}h3.4V28z" for i, h in enumerate(row) if h) for row in heights.tolist()]
