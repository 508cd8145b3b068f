"""``report --compare A B``: changes as Markdown, as CSV, as a page and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pattern_bench.plotting.styles import Style, estimator_colours
from pattern_bench.reporting.blocks import Field, Figure, Reproduction, Section, Table, number, numeral, words
from pattern_bench.reporting.changes import (
    ALL_LAYERS,
    BETTER,
    WORSE,
    Change,
    change_table,
    changed_settings,
    changes,
)
from pattern_bench.reporting.embedding import pictures
from pattern_bench.reporting.gathering import Gathered
from pattern_bench.reporting.plots import Value, dots
from pattern_bench.reporting.sections import missing_tables
from pattern_bench.reporting.tables import in_markdown
from pattern_bench.results.labels import ordered, plain
from pattern_bench.results.schema import in_cells, write_csv
from pattern_bench.storage.atomic import write_file

COLUMNS = ["quantity", "of", "A", "B", "B − A", "95 % interval", "verdict", "left out"]
HOW = (
    "Larger is better: of ρ (1: the estimator found all of the signal), of the area over the degradation curve, and of "
    "accuracy. A verdict is given where the whole 95 % interval of the difference speaks for it; of twenty that did "
    "not change, about one gets a verdict by chance. Baselines, random directions and orders, show what changed "
    "whatever the explanation: that predictions fall more easily, say."
)
NEURONS = (
    "ρ is averaged over the neurons that are live under all estimators in A and in B (of different networks, in each "
    "by itself); how many other live neurons an estimator has, stands under ‘left out’."
)
INTERVALS = (
    "Intervals over images (paired or independent resamples) tell whether the difference would stay with other images; "
    "those over neurons, given where images were not drawn again in both, whether it would with other neurons like "
    "these, for the same images. Intervals called independent are too wide where A and B share images. Of images that "
    "were drawn again runs keep means over all live neurons of an estimator: where some are left out, and the interval "
    "says that they are in it, its width is that of these means."
)


def compare(a: Gathered, b: Gathered, output: Path) -> tuple[list[Change], list[tuple[str, str, str]]]:
    """Return every change and every setting that changed; write ``compare.csv`` and ``compare.md`` into ``output``."""
    every, settings = changes(a, b), changed_settings(a.runs, b.runs)
    write_csv(output / "compare.csv", change_table(every))
    text = "\n".join(markdown(every, settings))
    write_file(output / "compare.md", lambda file: file.write_text(text + "\n"))
    return every, settings


def markdown(every: Sequence[Change], settings: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return the lines of ``compare.md``."""
    rows = pd.DataFrame([line(change) for change in every], columns=COLUMNS)
    lines = ["# What changed from A to B", "", HOW, "", NEURONS, "", INTERVALS, ""]
    lines += [in_cells(rows, in_markdown).to_markdown(index=False, disable_numparse=True), "", "## Settings", ""]
    if settings:
        table = in_cells(pd.DataFrame(settings, columns=["setting", "A", "B"]), in_markdown)
        lines.append(table.to_markdown(index=False, disable_numparse=True))
    else:
        lines.append("No setting differs.")
    return lines


def said(every: Sequence[Change], settings: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return lines for the terminal: settings, changes but for single layers, and how many of those are clear."""
    lines = [f"{key}: {mine} → {its}" for key, mine, its in settings] or ["no setting differs"]
    rows = pd.DataFrame([line(change) for change in every if is_whole(change)], columns=COLUMNS)
    lines += ["", rows.to_markdown(index=False, disable_numparse=True, tablefmt="simple"), ""]
    verdicts = [change.verdict for change in every if not is_whole(change)]
    counted = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return [*lines, f"single layers: {counted}"] if verdicts else lines


def is_whole(change: Change) -> bool:
    """Return whether a change is of all layers together, an area or an accuracy, and of no single layer."""
    return change.names.get("layer", ALL_LAYERS) == ALL_LAYERS


def line(change: Change) -> list[str]:
    """Return a change as a row of text, in the order of COLUMNS."""
    values = ["–" if value != value else number(value, 4) for value in (change.a, change.b, change.b - change.a)]
    shown = [*values, _interval(change), change.verdict, _left_out(change)]
    return [change.quantity.replace("rho", "ρ"), of(change), *shown]


def of(change: Change) -> str:
    """Return the names that a change belongs to, in words: its layer, estimator, method and so on."""
    names = change.names
    parts = [names["model"], names["data"], names.get("criterion", "")]
    if names.get("probe", "closed_form") != "closed_form":
        parts.append(names["probe"])
    if names.get("estimator", "none") != "none":
        parts.append(plain(names["estimator"]))
    parts += [plain(names["method"])] if "method" in names else []
    return ", ".join(part for part in [*parts, names.get("layer", "")] if part)


def _left_out(change: Change) -> str:
    return "–" if change.left_out is None else str(change.left_out)


def _interval(change: Change) -> str:
    return "–" if change.low != change.low else f"{number(change.low, 4)} to {number(change.high, 4)}"


# --- the page ---


def comparison_sections(
    a: Gathered, b: Gathered, every: Sequence[Change], settings: Sequence[tuple[str, str, str]], command: str
) -> list[Section]:
    """Return the sections of the page: changes as a whole, by layer, in settings; pictures of both; what is missing in
    either."""
    layers = [change for change in every if not is_whole(change)]
    shown = [
        Section("comparison", "What changed", (HOW, NEURONS, INTERVALS),
                (_table("Changes", [c for c in every if is_whole(c)]),)),
        Section("layers", "ρ by layer", figures=tuple(_figures(layers)), folded=(_table("Changes by layer", layers),)),
        _settings(settings),
    ]  # fmt: skip
    for name, side in (("A", a), ("B", b)):
        runs = list({id(run): run for run in [*side.cells.values(), *side.curves.values()]}.values())
        if embedded := tuple(pictures(runs, side.pictures)):
            shown.append(Section(f"pictures-{name}", f"Galleries of {name}", pictures=embedded))
        if tables := tuple(missing_tables(side)):
            shown.append(Section(f"missing-{name}", f"What is missing in {name}", tables=tables))
    shown.append(Section("reproduce", "How to make it again", commands=(Reproduction("This page", [command]),)))
    return shown


def _table(caption: str, every: Sequence[Change]) -> Table:
    columns = ["quantity", "of", "A", "B", "B − A", "95 % interval", "interval over", "verdict", "left out"]
    kinds = {BETTER: "better", WORSE: "worse"}
    rows = []
    for change in every:
        missing = "missing" if change.verdict.startswith("missing") else ""
        rows.append(
            [words(change.quantity.replace("rho", "ρ")), words(of(change)), numeral(change.a, 4), numeral(change.b, 4),
             numeral(change.b - change.a, 4), Field(_interval(change), "number", change.low),
             words(change.interval or "–"), Field(change.verdict, kinds.get(change.verdict, missing)),
             Field(_left_out(change), "number", change.left_out)]
        )  # fmt: skip
    return Table(caption, columns, rows, frozenset({*range(2, 6), 8}))


def _settings(settings: Sequence[tuple[str, str, str]]) -> Section:
    if not settings:
        return Section("settings", "Settings", ("No setting differs.",))
    rows = [[Field(key, "code"), words(mine), words(its)] for key, mine, its in settings]
    return Section("settings", "Settings", tables=(Table("Settings that differ", ["setting", "A", "B"], rows),))


def _figures(layers: Sequence[Change]) -> list[Figure]:
    """Differences of mean ρ with their intervals, a figure per model, data, criterion and probe."""
    panels: dict[tuple[str, ...], list[Change]] = {}
    for change in layers:
        if not change.note:
            key = tuple(change.names[name] for name in ("model", "data", "criterion", "probe"))
            panels.setdefault(key, []).append(change)
    figures = []
    for place, ((model, data, criterion, probe), own) in enumerate(panels.items()):
        heading = f"{model} on {data}, criterion {criterion}" + ("" if probe == "closed_form" else f", probe {probe}")
        names = list(dict.fromkeys(change.names["layer"] for change in own))
        estimators = ordered(change.names["estimator"] for change in own)
        colours = estimator_colours(estimators)
        series = {
            one: [_value(change, names) for change in own if change.names["estimator"] == one] for one in estimators
        }
        plot = dots(
            f"change-{place}", f"Change of mean ρ by layer and estimator, {heading}", "layer", "mean ρ, B − A", names,
            series, {one: Style(colours[one]) for one in estimators}, (-0.02, 0.02),
        )  # fmt: skip
        note = "Above 0, B is better. Bars are 95 % intervals."
        figures.append(Figure(heading, plot, _table(f"Change of ρ, {heading}", own), note))
    return figures


def _value(change: Change, layers: list[str]) -> Value:
    names, difference = change.names, change.b - change.a
    text = f"{plain(names['estimator'])}, {names['layer']}: {number(difference, 4)} ({_interval(change)}), "
    text += f"from {number(change.a, 4)} to {number(change.b, 4)}: {change.verdict}"
    return Value(layers.index(names["layer"]), difference, change.low, change.high, float("nan"), text)
