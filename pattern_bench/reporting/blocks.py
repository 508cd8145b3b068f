"""The parts that the page is made of, as plain data: tables, figures, pictures, commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from pattern_bench.reporting.plots import Histogram, Plot


@dataclass(frozen=True)
class Field:
    """A cell of a table: what it shows, its kind (``number``, ``missing``, ``estimator``, ``code``, ``better``,
    ``worse`` or none), what it is sorted by where that is another thing, what is said of it beyond, and what stands
    small below it."""

    text: Any
    kind: str = ""
    value: float | str | None = None
    note: str = ""
    below: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; ``numbers`` says which columns are of numbers."""

    caption: str
    columns: list[str]
    rows: list[list[Field]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A plot, its values, and what is said below it."""

    heading: str
    plot: Plot
    values: Table
    note: str = ""


@dataclass(frozen=True)
class Distributions:
    """Histograms of a panel: a row per layer, a column per estimator, None where there is nothing to count."""

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
    """How to make a figure again."""

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
    return f"{value:.{places}f}".replace("-", "−")


def words(text: str) -> Field:
    return Field(text)


def numeral(value: float, places: int = 3, note: str = "") -> Field:
    """A number, or a dash where there is none."""
    if pd.isna(value):
        return Field("–", "number", None, note)
    return Field(number(value, places), "number", float(value), note)
