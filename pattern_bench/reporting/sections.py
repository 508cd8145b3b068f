"""The sections of a report's page: figures and tables, and the texts beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pattern_bench.plotting.styles import Style, curve_label, curve_styles, estimator_colours
from pattern_bench.reporting.blocks import (
    Distributions,
    Field,
    Figure,
    Reproduction,
    Section,
    Table,
    number,
    numeral,
    words,
)
from pattern_bench.reporting.embedding import pictures
from pattern_bench.reporting.gathering import PANEL, Gathered
from pattern_bench.reporting.plots import Histogram, Value, curves, dots, histograms
from pattern_bench.reporting.runs import JOB, Pictures, Run, differing
from pattern_bench.reporting.sweeps import command_of
from pattern_bench.reporting.tables import MISSING, UNDEFINED, conflict_table, missing_table, overview
from pattern_bench.results.labels import ordered, plain
from pattern_bench.results.schema import of_same_neurons

NO_RHO = "no value: without a residual (S_x), or without a neuron that is live under all estimators, ρ is not defined"


# --- the overview ---


def overview_table(gathered: Gathered) -> Table:
    """Return the first table of the page: a row per model, data, criterion and estimator, with mean ρ and areas."""
    lines = overview(gathered)
    methods = sorted({method for line in lines for method in line.areas}, key=lambda m: (m.startswith("random"), m))
    columns = ["model", "data", "criterion", "estimator", "mean ρ", *(f"area, {plain(m)}" for m in methods),
               "accuracy"]  # fmt: skip
    rows = []
    for line in lines:
        model, data, criterion, probe, estimator = line.names
        asked = f"{criterion} ({probe})" if probe not in ("closed_form", "") else criterion
        who = (
            Field("no patterns", value="~") if estimator == "none" else Field(estimator, "estimator", plain(estimator))
        )
        rows.append(
            [words(model), words(data), words(asked or "–"), who, _mean(line),
             *(_area(line.areas[m]) if m in line.areas else Field("", "number") for m in methods),
             numeral(line.accuracy)]
        )  # fmt: skip
    return Table(
        "Mean ρ over the neurons of all layers that are live under all estimators of a model, data set and criterion, "
        "with ± one standard error over images where images were drawn again (1: the estimator found all of the "
        "signal, 0: none); area over the degradation curve with its 95 % interval "
        "over images, by method (larger is better); top-1 accuracy of the network.",
        columns, rows, frozenset(range(4, len(columns))),
    )  # fmt: skip


def _mean(line: Any) -> Field:
    if not line.layers and line.lacking:
        return Field(MISSING, "missing")
    if math.isnan(line.mean):
        return Field("–", "number", None, NO_RHO if line.names[4] != "none" else "")
    said = [f"{line.lacking} of {line.layers + line.lacking} layers are missing"] if line.lacking else []
    if line.left_out:
        live = line.neurons + line.left_out
        said.append(f"{line.left_out} of {live} live neurons are left out: another estimator has no ρ for them")
    below = f"± {number(line.error)}" if line.error >= 0 else ""
    return Field(number(line.mean), "number", line.mean, "; ".join(said), below)


def _area(value: tuple[float, float, float] | None) -> Field:
    if value is None:
        return Field(MISSING, "missing")
    area, low, high = value
    return Field(number(area), "number", area, below=f"{number(low)} to {number(high)}" if low == low else "")


# --- the figures ---


def same_neurons(table: pd.DataFrame) -> str:
    """Say which neurons the values of Fig. 3, a ``table``, are over, and how many are left out."""
    said = "The neurons of a layer are those that are live under all estimators which have a ρ there, so that all are "
    said += "compared over the same ones"
    cells = table[table.left_out > 0]
    if cells.empty:
        return f"{said}; none is left out."
    most: Any = cells.sort_values("left_out", kind="stable").iloc[-1]
    return (
        f"{said}. Other live ones are left out in {len(cells)} of {int((table.neurons > 0).sum())} values (at most "
        f"{most.left_out} of {most.neurons}, of {plain(most.estimator)} in {most.layer} of {most.model}); "
        "standard errors are of means and medians with them, since runs keep no others."
    )


def rho_figures(table: pd.DataFrame) -> list[Figure]:
    """Return Fig. 3, a figure per panel, from the table of :func:`pattern_bench.reporting.tables.rho_table`."""
    figures = []
    for place, (panel, rows) in enumerate(table.groupby(PANEL, sort=False)):
        layers = list(dict.fromkeys(rows.layer))
        names = [name for name in ordered(rows.estimator) if (rows.status[rows.estimator == name] != UNDEFINED).any()]
        colours = estimator_colours(table.estimator)
        series = {name: [_rho_value(row, layers) for _, row in rows[rows.estimator == name].iterrows()
                         if row.status != UNDEFINED] for name in names}  # fmt: skip
        plot = dots(
            f"fig3-{place}", f"ρ by layer and estimator, {_panel(panel)}", "layer", "ρ(S)", layers, series,
            {name: Style(colours[name]) for name in names}, (0.0, 1.0),
        )  # fmt: skip
        figures.append(Figure(_panel(panel), plot, _rho_values(rows, panel)))
    return figures


def _panel(panel: Sequence[Any]) -> str:
    model, data, criterion, probe = panel
    return f"{model} on {data}, criterion {criterion}" + ("" if probe == "closed_form" else f", probe {probe}")


def _rho_value(row: Any, layers: list[str]) -> Value:
    what = f"{plain(row.estimator)}, {row.layer}: "
    if row.status == MISSING:
        nothing = math.nan
        return Value(layers.index(row.layer), nothing, nothing, nothing, nothing, what + "missing")
    error = float(row.get("standard_error_median", math.nan))
    said = f"median {number(row['median'])}" + (f" ± {number(error)}" if error == error else "")
    said += f", quartiles {number(row.q25)} to {number(row.q75)}, mean {number(row['mean'])}, {row.neurons} neurons"
    said += f", {row.dead} of them dead" if row.dead else ""
    said += f", {row.left_out} more left out" if row.left_out else ""
    return Value(layers.index(row.layer), row["median"], row.q25, row.q75, error, what + said)


def _rho_values(rows: pd.DataFrame, panel: Sequence[Any]) -> Table:
    columns = ["layer", "estimator", "mean", "median", "lower quartile", "upper quartile"]
    columns += ["neurons", "dead", "left out"]
    errors = [name for name in ("standard_error_mean", "standard_error_median") if name in rows]
    shown = []
    order = {layer: place for place, layer in enumerate(dict.fromkeys(rows.layer))}
    for _, row in rows.iterrows():
        line = [Field(row.layer, value=order[row.layer]), Field(row.estimator, "estimator", plain(row.estimator))]
        if row.status == MISSING:
            line += [Field(MISSING, "missing"), *[Field("", "number")] * (6 + len(errors))]
        else:
            note = NO_RHO if row.status == UNDEFINED else ""
            line += [numeral(row[name], note=note) for name in ("mean", "median", "q25", "q75")]
            line += [numeral(row[name], 0) for name in ("neurons", "dead", "left_out")]
            line += [numeral(row[name]) for name in errors]
        shown.append(line)
    columns += [name.replace("_", " ") for name in errors]
    return Table(f"ρ, {_panel(panel)}", columns, shown, frozenset(range(2, len(columns))))


def degradation_figures(gathered: Gathered) -> list[Figure]:
    """Return Fig. 4a, a figure per model and data."""
    figures = []
    panels = dict.fromkeys(curve[:2] for curve in [*gathered.curves, *gathered.missing_curves])
    for place, (model, data) in enumerate(panels):
        table = gathered.degradation[(gathered.degradation.model == model) & (gathered.degradation.data == data)]
        lacking = [(name, method) for *panel, name, method in gathered.missing_curves if panel == [model, data]]
        known: dict[Any, pd.DataFrame] = {
            key: rows.sort_values("step") for key, rows in table.groupby(["estimator", "method"], sort=False)
        }
        styles = curve_styles([*known, *lacking])
        names = {key: curve_label(*key, styles, plain(key[0])) for key in styles}
        series = {names[key]: _curve(names[key], known[key]) if key in known else [] for key in styles}
        plot = curves(
            f"fig4a-{place}", f"probability of the class first predicted by replaced patches, {model} on {data}",
            "replaced patches", "probability", series, {names[key]: style for key, style in styles.items()},
        )  # fmt: skip
        images = f"Mean over {int(table.n.max())} images; the bands are one standard error." if len(table) else ""
        figures.append(Figure(f"{model} on {data}", plot, _curve_values(names, known, f"{model} on {data}"), images))
    return figures


def _curve(name: str, rows: pd.DataFrame) -> list[Value]:
    values = []
    errors = rows.probability_std / rows.n**0.5
    for step, mean, error in zip(rows.step, rows.probability_mean, errors, strict=True):
        spread = f" ± {number(error)}" if error == error else ""
        around = 0.0 if math.isnan(error) else error
        text = f"{name}, {step} patches replaced: {number(mean)}{spread}"
        values.append(Value(step, mean, mean - around, mean + around, math.nan, text))
    return values


def _curve_values(names: dict[Any, str], known: dict[Any, pd.DataFrame], where: str) -> Table:
    by_step = {key: dict(zip(rows.step, rows.probability_mean, strict=True)) for key, rows in known.items()}
    steps = sorted({step for values in by_step.values() for step in values})
    rows = [
        [numeral(step, 0), *(numeral(by_step[key].get(step, math.nan)) if key in known else Field(MISSING, "missing")
                             for key in names)]
        for step in steps
    ]  # fmt: skip
    columns = ["replaced patches", *names.values()]
    return Table(f"Mean probability, {where}", columns, rows, frozenset(range(len(columns))))


def distributions(rho: pd.DataFrame, table: pd.DataFrame) -> list[Distributions]:
    """Return histograms of ρ over the neurons of Fig. 3, a panel per model, data, criterion and probe; ``table`` is
    that of Fig. 3."""
    compared = of_same_neurons(rho).dropna(subset=["rho"])
    live = {panel: rows for panel, rows in compared.groupby(PANEL, sort=False)}
    listed = []
    for panel, lines in table.groupby(PANEL, sort=False):
        if panel not in live:
            continue
        rows = live[panel]
        low, high = (float(end) for end in rows.rho.quantile(np.array([0.001, 0.999])))
        low, high = min(0.0, low), max(1.0, high)
        places = rows.groupby(["layer", "estimator"], sort=False).ngroup().to_numpy()
        firsts = rows.iloc[np.unique(places, return_index=True)[1]]
        paths = histograms(rows.rho.to_numpy(), places, low, high)
        path_of = dict(zip(zip(firsts.layer, firsts.estimator, strict=True), paths, strict=True))
        layers, estimators = list(dict.fromkeys(lines.layer)), ordered(lines.estimator)
        cells: dict[Any, Histogram | str] = {}
        for line in lines.to_dict("records"):
            key = (line["layer"], line["estimator"])
            text = f"{number(line['median'], 2)} ({number(line['q25'], 2)} to {number(line['q75'], 2)})"
            nothing = MISSING if line["status"] == MISSING else "–"
            cells[key] = Histogram(path_of[key], text) if key in path_of else nothing
        shown = [(layer, [cells.get((layer, name), "–") for name in estimators]) for layer in layers]
        listed.append(Distributions(_panel(panel), estimators, shown, number(low, 2), number(high, 2)))
    return listed


# --- runs: what is missing, what disagrees, settings, commands ---


def missing_tables(gathered: Gathered) -> list[Table]:
    """Return tables of the jobs that are not complete, and of values that are missing in the figures."""
    table = missing_table(gathered)
    tables = []
    if gathered.missing_jobs:
        rows = [[words(job.folder), Field(" ".join(job.overrides), "code")] for job in gathered.missing_jobs]
        tables.append(Table("Jobs that are not complete", ["folder", "overrides"], rows))
    cells = table[table.command.isna()]
    if len(cells):
        names = ["model", "data", "criterion", "probe", "layer", "estimator", "method"]
        shown = cells[names].fillna("–")
        rows = [[words(value) for value in row] for row in shown.itertuples(index=False)]
        tables.append(Table("Values that are missing in the figures", names, rows))
    return tables


def conflicts_table(gathered: Gathered) -> Table | None:
    """Return the table of results that later runs replaced by other numbers; None where there are none."""
    if not gathered.conflicts:
        return None
    table = conflict_table(gathered.conflicts)
    names = ["model", "data", "criterion", "probe", "layer", "estimator", "method", "kept", "replaced", "settings"]
    rows = []
    for row in table.fillna({"criterion": "–", "probe": "–", "layer": "–", "method": "–"}).to_dict("records"):
        line = [words(row[name]) for name in names]
        line[9:9] = [numeral(row["kept_mean"], 4), numeral(row["replaced_mean"], 4)]
        rows.append(line)
    columns = [*names[:9], "mean now", "mean before", "settings that differ"]
    return Table("Cells and curves of earlier runs that later ones replaced by other numbers", columns, rows,
                 frozenset({9, 10}))  # fmt: skip


def settings_tables(runs: Sequence[Run]) -> list[Table]:
    """Return tables of the settings in which runs differ, a row per run; of those that they share; and of versions."""
    tables = []
    keys = differing(run.settings for run in runs)
    if keys:
        rows = [[words(run.name), *(words(run.settings.get(key, "–")) for key in keys)] for run in reversed(runs)]
        tables.append(Table("Settings in which runs differ, the latest run first", ["run", *keys], rows))
    shared = next((run.settings for run in reversed(runs) if run.settings), {})
    rows = [[words(key), words(value)] for key, value in shared.items() if key not in keys]
    if rows:
        tables.append(Table("Settings that all runs share", ["setting", "value"], rows))
    versions: dict[str, Counter[str]] = {}
    for run in runs:
        for package, version in run.summary.get("versions", {}).items():
            versions.setdefault(str(package), Counter())[str(version)] += 1
    rows = [
        [words(package), words(", ".join(f"{v} ({n} runs)" if len(counts) > 1 else v for v, n in counts.items()))]
        for package, counts in versions.items()
    ]
    if rows:
        tables.append(Table("Versions", ["package", "version"], rows))
    return tables


def reproductions(gathered: Gathered, report: str) -> list[Reproduction]:
    """Return the commands behind each figure; ``report`` is the report's own."""
    fig3 = [_command(gathered, JOB, run) for run in _unique(gathered.cells.values())]
    fig4a = [_command(gathered, JOB, run) for run in _unique(gathered.curves.values())]
    galleries = [_command(gathered, gallery.kind, gallery) for gallery in gathered.pictures]
    steps = [("Fig. 3", fig3), ("Fig. 4a", fig4a), ("Galleries and sanity checks", galleries)]
    shown = [Reproduction(what, list(dict.fromkeys(commands))) for what, commands in steps if commands]
    return [*shown, Reproduction("This report", [report])]


def _unique(runs: Iterable[Run]) -> list[Run]:
    return list({id(run): run for run in runs}.values())


def _command(gathered: Gathered, kind: str, run: Run | Pictures) -> str:
    for sweep in gathered.sweeps.values():
        if sweep.kind == kind and run.folder.is_relative_to(sweep.folder):
            return command_of(kind, ["-m", *sweep.arguments])
    if run.overrides is None:
        return f"# the command of {run.name} is not known: its settings are above"
    return command_of(kind, run.overrides)


# --- the sections ---


def report_sections(gathered: Gathered, rho: pd.DataFrame, command: str) -> list[Section]:
    """Return all sections of a report, in the order of the page.

    Args:
        gathered: the results of all runs.
        rho: Fig. 3 as a table.
        command: the report's own.
    """
    curves_shown = tuple(degradation_figures(gathered))
    shown = tuple(pictures(_unique([*gathered.cells.values(), *gathered.curves.values()]), gathered.pictures))
    conflicts = conflicts_table(gathered)
    return [
        Section("overview", "Overview", tuple(unlike(gathered)), (overview_table(gathered),)),
        Section(
            "fig3", "Fig. 3: ρ by layer and estimator",
            ("Marks are medians over the neurons of a layer, bars reach from quartile to quartile, and black caps one "
             "standard error over images up and down, where images were drawn again. 1: a linear reader finds nothing "
             "of the neuron’s output in what the estimator left over; 0: everything.", same_neurons(rho)),
            figures=tuple(rho_figures(rho)),
        ),
        Section(
            "fig4a", "Fig. 4a: image degradation",
            ("The probability of the class first predicted, while patches are replaced, the most relevant first. The "
             "faster the fall, the better the explanation." if curves_shown else "No run has a degradation curve.",),
            figures=curves_shown,
        ),
        Section(
            "distributions", "Distributions of ρ over neurons",
            distributions=tuple(distributions(gathered.rho, rho)),
        ),
        *([Section("pictures", "Galleries", pictures=shown)] if shown else []),
        missing_section(gathered),
        Section(
            "conflicts", "Where runs disagree",
            ("Where several runs have a cell, the latest complete one has it.",) if conflicts else
            ("No two runs have different numbers for the same cell.",),
            folded=(conflicts,) if conflicts else (),
        ),
        Section("settings", "Settings and versions", folded=tuple(settings_tables(gathered.runs))),
        Section("reproduce", "How to make it again", commands=tuple(reproductions(gathered, command))),
    ]  # fmt: skip


SWEPT = ("estimator", "criterion", "method", "probe", "layer", "bootstrap", "explanation", "trainer")
"""Groups of settings that tell results apart, or change none."""


def unlike(gathered: Gathered) -> Iterator[str]:
    """Say where results that stand side by side come from runs with other settings, such as other images."""
    by_panel: dict[tuple[str, str], list[Run]] = {}
    for (model, data, *_), run in [*gathered.cells.items(), *gathered.curves.items()]:
        by_panel.setdefault((model, data), []).append(run)
    for (model, data), runs in by_panel.items():
        keys = [key for key in differing(run.settings for run in _unique(runs)) if key.split(".")[0] not in SWEPT]
        if keys:
            yield f"Not all results of {model} on {data} have the same settings: the runs differ in {', '.join(keys)}."


def missing_section(gathered: Gathered) -> Section:
    """Return the section of what is missing, with the commands that run it."""
    tables = tuple(missing_tables(gathered))
    texts = [] if tables else ["Every job that was begun, or that a sweep was to have, is complete."]
    texts += [
        f"Which jobs the sweep in {name} was to have is not known, since another sweeper than Hydra’s own chose them."
        for name, sweep in gathered.sweeps.items()
        if sweep.jobs is None
    ]
    commands = list(dict.fromkeys(job.command for job in gathered.missing_jobs))
    steps = (Reproduction("What runs them", commands),) if commands else ()
    return Section("missing", "What is missing", tuple(texts), tables, commands=steps)
