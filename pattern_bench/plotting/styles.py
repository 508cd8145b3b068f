"""Colours and dashes: the same for the same name in every figure, for colour-blind readers too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import seaborn as sns

from pattern_bench import methods
from pattern_bench.results.labels import RANDOM_ORDER, estimators, method_place, ordered, plain

_SEABORN = ("blue", "orange", "green", "vermilion", "purple", "brown", "pink", "silver", "yellow", "sky")
COLOURS = dict(zip(_SEABORN, sns.color_palette("colorblind").as_hex(), strict=True))
"""By the name that an estimator gives as its ``colour``. Brown is the paper's S_x, since orange, dark enough for white
paper, is S_a's vermilion to colour-blind readers."""
_ORDER = ("blue", "brown", "green", "vermilion", "purple", "orange", "pink", "silver", "yellow", "sky")
PALETTE = [COLOURS[name] for name in _ORDER]
_FIRST_FREE = 6
"""In ``PALETTE``: where the colours of estimators begin that give none."""
GREY = "#737373"
SOLID, DASHED, DOTTED, DASH_DOTTED = (), (5.0, 2.0), (1.0, 1.5), (6.0, 2.0, 1.0, 2.0)
LINES: dict[str, tuple[float, ...]] = {
    "solid": SOLID, "dashed": DASHED, "dotted": DOTTED, "dash-dotted": DASH_DOTTED,
}  # fmt: skip
"""By the name that a method gives as its ``line``: dashes and gaps, in multiples of a curve's width."""


@dataclass(frozen=True)
class Style:
    """How a curve is drawn: its colour, and dashes and gaps in multiples of its width (none: solid)."""

    colour: str
    dashes: tuple[float, ...] = SOLID


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``, as WCAG defines it: 0 is black, 1 white.

    >>> luminance("#ffffff")
    1.0
    """
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast of two colours, from 1 to 21; marks need 3.

    >>> contrast("#000000", "#ffffff")
    21.0
    """
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def legible(colour: str, background: str = "#ffffff", least: float = 3.0) -> str:
    """Return ``colour``, made darker or lighter until it has a contrast of ``least`` to the background."""
    end = 0 if luminance(background) > 0.18 else 255
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    for step in range(101):
        mixed = "#" + "".join(f"{round(c + (end - c) * step / 100):02x}" for c in channels)
        if contrast(mixed, background) >= least:
            break
    return mixed


def estimator_colours(names: Iterable[str]) -> dict[str, str]:
    """Return colours by name: those of the suite's estimators as they say, then of ``names``, others by name.

    Colour-blind safe. The suite's have the same colour in every figure, others wherever the same stand beside them.

    >>> estimator_colours(["mine"])["a"] == COLOURS["vermilion"]
    True
    """
    chosen = {name: COLOURS[facts.colour] for name, facts in estimators().items() if facts.colour}
    others = sorted(set(names) - {*chosen, "none"})
    free = {name: PALETTE[(_FIRST_FREE + i) % len(PALETTE)] for i, name in enumerate(others)}
    return {**chosen, "none": GREY, **free}


def curve_styles(curves: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Style]:
    """Return styles by estimator and method, in the order of the legend: estimators have their colours, dash-dotted
    under PatternNet; methods without patterns the other colours, dashed; the random order is grey and dotted."""
    every = list(dict.fromkeys(curves))
    colours = estimator_colours(name for name, _ in every)
    places = {name: place for place, name in enumerate(ordered({name for name, _ in every} - {"none"}))}
    free = sorted({method for name, method in every if name == "none"}, key=method_place)
    free = [method for method in free if not method.startswith(RANDOM_ORDER)]
    others = [5, 9, 8, 6, 0, 1, 2, 3, 4]
    styles = {}
    for name, method in sorted(every, key=lambda key: (places.get(key[0], 99), method_place(key[1]))):
        if method.startswith(RANDOM_ORDER):
            styles[name, method] = Style(GREY, DOTTED)
        elif name == "none":
            place = free.index(method)
            styles[name, method] = Style(PALETTE[others[place % 9]], DASHED if place < 9 else DASH_DOTTED)
        else:
            facts = methods.by_name().get(method.split(",")[0])
            styles[name, method] = Style(colours[name], LINES[facts.line] if facts else SOLID)
    return styles


def curve_label(estimator: str, method: str, curves: Iterable[tuple[str, str]], label: str) -> str:
    """Return what the legend calls a curve among ``curves``: its estimator's ``label``, its method's, or both.

    >>> curve_label("a", "pattern_net", [("a", "pattern_net"), ("w", "pattern_net")], "S_a")
    'S_a'
    >>> curve_label("a", "pattern_net", [("a", "pattern_net"), ("a", "pattern_attribution")], "S_a")
    'S_a, PatternNet'
    """
    every = set(curves)
    if estimator == "none":
        return plain(method)
    with_patterns = {m for name, m in every if name != "none"}
    free = {m for name, m in every if name == "none"}
    return f"{label}, {plain(method)}" if len(with_patterns) > 1 or len(free) > 1 else label
