"""W&B views and a W&B report of runs, as ``python -m pattern_bench.dashboard`` builds them.

A view of the workspace has one model, data set, criterion and probe, with Fig. 3 as bars and Fig. 4a as lines by
estimator. Another of each model and data set has what goes beyond one of these: criteria side by side, galleries, and
what its runs differ in. The report has all of it on one page. The run folders say which layers and curves there are;
the numbers are W&B's. The only module that knows wandb-workspaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr
from wandb_workspaces.reports.v2.internal import ReportViewspec
from wandb_workspaces.workspaces.internal import View

from pattern_bench.errors import UserError
from pattern_bench.plotting.styles import estimator_colours
from pattern_bench.reporting.gathering import CELL, latest
from pattern_bench.reporting.runs import Run, RunFolders, read_runs
from pattern_bench.reporting.tables import COMPLETE, rho_table
from pattern_bench.results.labels import RANDOM_ORDER, ordered, plain

PICTURES = ("explanations", "fig1", "fig4b", "fig5", "randomisation", "convergence")
"""Of the job, of galleries and of sanity checks."""
UNFILTERABLE = set("'=<>\\\n")
"""Characters that no name in a filter may have: wandb-workspaces writes filters as expressions."""
MANY = 1000
"""Bars or runs in a panel, at most, instead of W&B's few."""
HOW_TO_READ = """\
ρ(S) = 1 − max corr(y, vᵀd) asks what is left of a neuron's output in what an estimator takes for the distractor. 1 is
nothing, the best. Bars are medians over the live neurons of a layer, as each run logged them; S_x has none, since it
leaves no residual. Where estimators have other live neurons, a table has them over the same ones. The curves are of
image degradation: the mean probability of the class first predicted, while the most relevant patches are replaced.
The faster it falls, the better the explanation.""".replace("\n", " ")


@dataclass(frozen=True, order=True)
class Setting:
    """Names that the runs in one figure share. Its fields are keys of ``names`` in the configuration of a W&B run."""

    model: str
    data: str
    criterion: str
    probe: str

    @property
    def title(self) -> str:
        """Return the title of its figures."""
        return f"{self.model} on {self.data}, criterion {self.criterion}, probe {self.probe}"


@dataclass
class Measured:
    """The layers, estimators and curves of a setting's runs.

    Attributes:
        layers: by name, their place in the network.
        estimators: names.
        curves: by method, whether it uses patterns; without the random order.
        same_neurons: Fig. 3 over the neurons that are live under all estimators, as Markdown; empty where all have the
            same.
    """

    layers: dict[str, int] = field(default_factory=dict)
    estimators: set[str] = field(default_factory=set)
    curves: dict[str, bool] = field(default_factory=dict)
    same_neurons: str = ""


def measured(folders: Sequence[str]) -> dict[Setting, Measured]:
    """Read the complete runs at or below ``folders``, and group what they measured by setting.

    Raises:
        UserError: where there is no complete run, or one is damaged.
    """
    below = RunFolders()
    for name in folders:
        below.look(Path(name).expanduser(), name)
    runs = read_runs(below)
    if not runs:
        raise UserError(f"DIR={' '.join(folders)} holds no complete run (none has a summary.json): run the job first")
    by_setting: dict[Setting, Measured] = {}
    runs_of: dict[Setting, list[Run]] = {}
    for run in runs:
        try:
            setting = Setting(*(str(run.summary[name]) for name in ("model", "data", "criterion", "probe")))
            here = by_setting.setdefault(setting, Measured())
            runs_of.setdefault(setting, []).append(run)
            here.estimators.add(str(run.summary["estimator"]))
        except KeyError as error:
            raise UserError(f"the summary.json in {run.folder} has no {error}: run it again") from error
        places = run.rho.drop_duplicates("layer")
        here.layers |= dict(zip(places.layer, places.layer_index, strict=True))
        curves = run.degradation.drop_duplicates("method")[["method", "estimator"]].itertuples(index=False)
        here.curves |= {method: who != "none" for method, who in curves if not method.startswith(RANDOM_ORDER)}
    for setting, here in by_setting.items():
        here.same_neurons = same_neurons(runs_of[setting])
    return dict(sorted(by_setting.items()))


def same_neurons(runs: Sequence[Run]) -> str:
    """Return Fig. 3 of the ``runs`` over the neurons that are live under all their estimators: medians by layer, as
    Markdown. Empty where nothing is left out, so that what each run logged is over the same neurons."""
    rho, *_ = latest(runs, "rho", CELL)
    if "sgd" in set(rho.probe) and "closed_form" in set(rho.probe):  # of both, runs log the latter
        rho = rho[rho.probe == "closed_form"]
    table = rho_table(rho, pd.DataFrame())
    if not (table.left_out > 0).any():
        return ""
    cells = table.assign(
        text=[f"{m:.3f} ({out} left out)" for m, out in zip(table["median"], table.left_out, strict=True)]
    )
    wide = cells[cells.status == COMPLETE].pivot(index="layer", columns="estimator", values="text")
    wide = wide.reindex(index=list(dict.fromkeys(table.layer)), columns=ordered(wide.columns)).fillna("–")
    wide.columns = [plain(name) for name in wide.columns]
    said = "Median ρ over the neurons of a layer that are live under all estimators, and how many others are left out:"
    return f"{said}\n\n{wide.to_markdown(disable_numparse=True)}"


# --- panels ---


def fig3(here: Measured) -> list[Any]:
    """Return the panels of Fig. 3: median ρ by layer."""
    layers = sorted(here.layers, key=lambda layer: here.layers[layer])
    return [
        _bars(
            "Fig. 3: median ρ by layer, each over its own live neurons",
            [f"rho/{layer}/median" for layer in layers],
            width=24,
        )
    ]


def fig4a(here: Measured) -> list[Any]:
    """Return the panels of Fig. 4a: curves of the methods with patterns, of all methods where there are others, and the
    areas over them."""
    with_patterns = [method for method, patterns in here.curves.items() if patterns]
    panels = []
    if with_patterns:
        panels.append(_lines("Fig. 4a: estimators", with_patterns))
    if len(here.curves) > len(with_patterns):
        panels.append(_lines("Fig. 4a: all methods", here.curves))
    if panels:
        areas = [f"area_over_curve/{method}" for method in (*here.curves, RANDOM_ORDER)]
        panels.append(_bars("Area over the curve: larger is better", areas, width=24))
    return panels


def galleries() -> list[Any]:
    """Return the panel of the pictures that galleries log."""
    keys = [f"figures/{name}" for name in PICTURES]
    return [wr.MediaBrowser(title="Galleries", media_keys=keys, num_columns=2, layout=wr.Layout(w=24, h=14))]


def comparison() -> list[Any]:
    """Return the panel of settings in which runs differ."""
    return [wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=14))]


def _bars(title: str, metrics: list[Any], width: int) -> Any:
    return wr.BarPlot(
        title=title, metrics=metrics, orientation="v", groupby=wr.Config("names.estimator"), groupby_aggfunc="mean",
        max_bars_to_show=MANY, max_runs_to_show=MANY, layout=wr.Layout(w=width, h=10),
    )  # fmt: skip


def _lines(title: str, methods: Iterable[str]) -> Any:
    """A line per method and estimator: runs of another method have nothing to add to it."""
    return wr.LinePlot(
        title=title, x="degradation/step", y=[f"degradation/{method}" for method in (*methods, RANDOM_ORDER)],
        title_x="patches replaced", title_y="mean probability", smoothing_type="none",
        groupby=wr.Config("names.estimator"), groupby_aggfunc="mean", groupby_rangefunc="minmax",
        max_runs_to_show=MANY, layout=wr.Layout(w=12, h=10),
    )  # fmt: skip


# --- views and report ---


@dataclass(frozen=True)
class Part:
    """A view of the workspace, and a part of the report.

    Args:
        title: its own.
        names: what the configuration of its runs says under ``names``.
        groups: what its runs are grouped by, too keys of ``names``.
        sections: panels by title.
        text: said above them in the report, as Markdown.
    """

    title: str
    names: dict[str, str]
    groups: tuple[str, ...]
    sections: dict[str, list[Any]]
    text: str = ""

    @property
    def filters(self) -> Any:
        """
        Raises:
            UserError: where a name cannot stand in a filter of W&B's library.
        """
        for key, value in self.names.items():
            if UNFILTERABLE & set(value):
                raise UserError(f"{key}={value!r} cannot stand in a W&B filter, for its ' = < > or \\: choose another")
        # As W&B's own pages write them: what the configuration has of ``names`` lies below ``names.value``.
        return expr.And(*(expr.Config(f"names.value.{key}").isin([value]) for key, value in self.names.items()))


def parts(by_setting: Mapping[Setting, Measured]) -> list[Part]:
    """Return the parts of each model and data set: the figures of each setting, the criteria where there are several,
    and the rest."""
    made = []
    for (model, data), settings in _by_model(by_setting).items():
        title, names = f"{model} on {data}", {"model": model, "data": data}
        for setting, here in settings.items():
            sections = {"Fig. 3": fig3(here), "Fig. 4a": fig4a(here)}
            made.append(Part(setting.title, vars(setting), ("estimator",), sections, here.same_neurons))
        if len(settings) > 1:
            # Without a group of its own, a panel takes that of the runs.
            bars = wr.BarPlot(
                title="Median ρ of all layers", metrics=["rho/median"], orientation="v", max_bars_to_show=MANY,
                max_runs_to_show=MANY, layout=wr.Layout(w=24, h=10),
            )  # fmt: skip
            groups = ("estimator", "criterion", "probe")
            made.append(Part(f"{title}, criteria", names, groups, {"Criteria": [bars]}))
        rest = {"Galleries": galleries(), "What the runs differ in": comparison()}
        made.append(Part(f"{title}, all runs", names, (), rest))
    return made


def _by_model(by_setting: Mapping[Setting, Measured]) -> dict[tuple[str, str], dict[Setting, Measured]]:
    grouped: dict[tuple[str, str], dict[Setting, Measured]] = {}
    for setting, here in by_setting.items():
        grouped.setdefault((setting.model, setting.data), {})[setting] = here
    return grouped


def workspace(entity: str, project: str, part: Part, estimators: Iterable[str]) -> ws.Workspace:
    """Return a view with the panels of ``part``, in the colours of the ``estimators``."""
    colours = estimator_colours(estimators)
    return ws.Workspace(
        entity=entity, project=project, name=part.title,
        sections=[
            ws.Section(name=name, panels=panels, is_open=True, layout_settings=ws.SectionLayoutSettings(columns=2))
            for name, panels in part.sections.items()
            if panels
        ],
        settings=ws.WorkspaceSettings(max_runs=MANY),
        runset_settings=ws.RunsetSettings(
            filters=part.filters,
            groupby=[ws.Config(f"names.{group}") for group in part.groups],
            group_colors={name: colours[name] for name in ordered(estimators)} if part.groups else {},
            pinned_columns=["summary:rho/median", "summary:accuracy/top1"],
        ),
    )  # fmt: skip


def report(entity: str, project: str, made: Iterable[Part]) -> wr.Report:
    """Return a W&B report with a heading, a text and panels for each part."""
    blocks: list[Any] = [wr.P(HOW_TO_READ), wr.TableOfContents()]
    for part in made:
        # A run set without a project is of the report's own; with one, the library would ask the server for it.
        runs = wr.Runset(name=part.title, filters=part.filters, groupby=[f"config.names.{g}" for g in part.groups])
        panels = [panel for panels in part.sections.values() for panel in panels]
        said = [wr.MarkdownBlock(part.text)] if part.text else []
        blocks += [wr.H1(part.title), *said, wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        project=project, entity=entity, title="Which explanation to believe", description="ρ and image degradation",
        blocks=blocks, width="fluid",
    )  # fmt: skip


# --- as files, and on the server ---


def build(entity: str, project: str, folders: Sequence[str]) -> tuple[list[ws.Workspace], wr.Report]:
    """Return the views and the report of the runs in ``folders``, which are not sent yet.

    Raises:
        UserError: where there are no runs, or W&B's library refuses what they are called.
    """
    by_setting = measured(folders)
    estimators = set().union(*(here.estimators for here in by_setting.values()))
    try:
        views = [workspace(entity, project, part, estimators) for part in parts(by_setting)]
        return views, report(entity, project, parts(by_setting))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"W&B's library refuses the names of these runs: {' '.join(str(error).split())}") from error


def specification(views: Iterable[ws.Workspace], page: wr.Report) -> dict[str, Any]:
    """Return what would be sent to W&B, as plain data: ``workspaces`` and ``report``, read back by the library's own
    models.

    Raises:
        ValueError: where it does not read what it wrote.
    """
    content = {
        "workspaces": [_plain(view._to_model()) for view in views],
        "report": _plain(page._to_model()),
    }
    for view in content["workspaces"]:
        ws.Workspace._from_model(View.model_validate(view))
    wr.Report._from_model(ReportViewspec.model_validate(content["report"]))
    return content


def _plain(model: Any) -> dict[str, Any]:
    """A model of wandb-workspaces as plain data."""
    content: dict[str, Any] = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    return content


def save(views: Iterable[ws.Workspace], page: wr.Report) -> list[str]:
    """Make new views and a new report on the server; return their addresses.

    Raises:
        UserError: where the server refuses them.
    """
    try:
        # First, since it makes the project where there is none.
        page.save()
        return [page.url, *(view.save().url for view in views)]
    except Exception as error:  # W&B's own, which this module does not know
        said = " ".join(str(error).split())
        raise UserError(f"W&B does not take the dashboards of {page.entity}/{page.project}: {said}") from error
