"""The parts of a report's page, as plain data: tables, figures, pictures, commands. The template writes them down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from pattern_bench.reporting.plots import Histogram, Plot


@dataclass(frozen=True)
class Field:
    """A cell of a table.

    Args:
        text: what it shows.
        kind: how it looks: ``number``, ``missing``, ``estimator``, ``code``, ``better``, ``worse`` or none of these.
        value: what rows are sorted by; ``text`` for None.
        note: shown where the pointer rests on it.
        below: small print below the text.
    """

    text: Any
    kind: str = ""
    value: float | str | None = None
    note: str = ""
    below: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; ``numbers`` holds the places of the columns of numbers."""

    caption: str
    columns: list[str]
    rows: list[list[Field]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A plot, its values as a table, and a note below it."""

    heading: str
    plot: Plot
    values: Table
    note: str = ""


@dataclass(frozen=True)
class Distributions:
    """Histograms of a panel: a row per layer, a column per estimator; text where there is nothing to count. ``low`` and
    ``high`` are the ends of their axis."""

    heading: str
    estimators: list[str]
    rows: list[tuple[str, list[Histogram | str]]]
    low: str
    high: str


@dataclass(frozen=True)
class Picture:
    """An embedded picture; without a ``source`` the caption says why it is not shown."""

    heading: str
    source: str
    alt: str
    caption: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Reproduction:
    """The commands that make a figure again."""

    what: str
    commands: list[str]


@dataclass(frozen=True)
class Section:
    """A section of the page, in the order in which its parts stand: texts, tables, figures, distributions, pictures,
    tables that are folded away, commands."""

    key: str
    heading: str
    texts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    distributions: tuple[Distributions, ...] = ()
    pictures: tuple[Picture, ...] = ()
    folded: tuple[Table, ...] = ()
    commands: tuple[Reproduction, ...] = ()


def number(value: float, places: int = 3) -> str:
    """Return a number with so many decimal places, and a typographic minus."""
    return f"{value:.{places}f}".replace("-", "−")


def words(text: str) -> Field:
    """Return a cell of text."""
    return Field(text)


def numeral(value: float, places: int = 3, note: str = "") -> Field:
    """Return a cell with a number, or a dash for NaN."""
    if pd.isna(value):
        return Field("–", "number", None, note)
    return Field(number(value, places), "number", float(value), note)
