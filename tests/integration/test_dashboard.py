"""W&B views and report: what is in their specification, and that W&B's own library reads it back."""

import json
from collections import Counter

import pandas as pd
import pytest
from helpers.made_runs import make_run
from helpers.wandb_server import KEY, python, recorded, serving

from pattern_bench.commands.dashboard import main

pytest.importorskip("wandb_workspaces")
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2.internal import ReportViewspec
from wandb_workspaces.workspaces.internal import View

from pattern_bench.reporting import dashboard as views

FEW = ["data.limit=300", "model.training.epochs=4", "degradation.images=4", "degradation.steps=4"]
FEW += ["explanation.images=2"]
LAYERS = ["features.0", "features.2", "features.5", "features.7", "classifier.1", "classifier.3"]


@pytest.fixture(scope="module")
def runs(configure, tmp_path_factory):
    """A folder of runs of two estimators, a method without patterns, two criteria, and another model."""
    from pattern_bench.pipeline.job import run

    root = tmp_path_factory.mktemp("runs")
    jobs = {
        "a": ["estimator=a"],
        "some": ["estimator=w", "layer=features.*"],
        "gradient": ["curve=gradient"],
        "rectified": ["estimator=a", "criterion=rectified"],
        "other": ["model.width=4", "model.name=narrow_vgg"],
    }
    for name, overrides in jobs.items():
        (root / name).mkdir()
        run(configure(*FEW, *overrides), root / name)
    return root


@pytest.fixture
def written(runs, tmp_path, monkeypatch, capsys):
    """The specification that the command writes without a key, and what it says."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    file = tmp_path / "dashboard.json"
    main([str(runs), "--project", "patterns", "--entity", "lab", "--output", str(file)])
    return json.loads(file.read_text()), capsys.readouterr().out


def panels_of(view):
    return [panel for section in view.sections for panel in section.panels]


def test_without_a_key_the_specification_is_written_and_read_back(written):
    content, said = written
    views = [ws.Workspace._from_model(View.model_validate(view)) for view in content["workspaces"]]
    assert [view.name for view in views] == [
        "narrow_vgg on digits, criterion all, probe closed_form",
        "narrow_vgg on digits, all runs",
        "small_vgg on digits, criterion all, probe closed_form",
        "small_vgg on digits, criterion rectified, probe closed_form",
        "small_vgg on digits, criteria",
        "small_vgg on digits, all runs",
    ]
    assert said.startswith("6 views and a report")
    assert "not sent" in said
    page = wr.Report._from_model(ReportViewspec.model_validate(content["report"]))
    grids = [block for block in page.blocks if isinstance(block, wr.PanelGrid)]
    assert [grid.runsets[0].name for grid in grids] == [view.name for view in views]
    kinds = Counter(type(panel) for grid in grids for panel in grid.panels)
    assert kinds == Counter(type(panel) for view in views for panel in panels_of(view))
    assert set(kinds) == {wr.BarPlot, wr.LinePlot, wr.MediaBrowser, wr.RunComparer}
    # What is not given to the report's own project would be looked up.
    assert all(runs.get("project") is None for runs in run_sets(content["report"]))


def run_sets(node):
    if isinstance(node, dict):
        yield from node.get("runSets", [])
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from run_sets(value)


def test_the_figures_name_what_the_runs_measured(written):
    """Fig. 3 in the order of the layers; Fig. 4a with every method, and the random order."""
    content, _ = written
    view = ws.Workspace._from_model(View.model_validate(content["workspaces"][2]))
    fig3, estimators, methods, areas = panels_of(view)
    assert [metric.name for metric in fig3.metrics] == [f"rho/{layer}/median" for layer in LAYERS]
    assert estimators.x.name == methods.x.name == "degradation/step"
    curves = ["pattern_attribution", "gradient", "random_order"]
    assert [metric.name for metric in estimators.y] == ["degradation/pattern_attribution", "degradation/random_order"]
    assert sorted(metric.name for metric in methods.y) == sorted(f"degradation/{name}" for name in curves)
    assert sorted(metric.name for metric in areas.metrics) == sorted(f"area_over_curve/{name}" for name in curves)
    assert fig3.groupby.name == estimators.groupby.name == "names.estimator"


def test_the_report_has_medians_over_the_same_neurons_where_live_ones_differ(tmp_path):
    """The bars are what each run logged, of its own."""
    for estimator, dead in (("w", []), ("a_plus_minus", [1, 4]), ("x", [])):
        make_run(tmp_path / "differ" / estimator, estimator=estimator, dead=dead)
        make_run(tmp_path / "same" / estimator, estimator=estimator, criterion="rectified")
    _, page = views.build("lab", "patterns", [str(tmp_path)])
    (said,) = [block.text for block in page.blocks if isinstance(block, wr.MarkdownBlock)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert rows[0] == ["layer", "S_w", "S_a+-"]
    rho = pd.concat([pd.read_csv(tmp_path / "differ" / name / "rho.csv") for name in ("w", "a_plus_minus")])
    medians = rho[~rho.neuron.isin([1, 4])].groupby(["layer", "estimator"]).rho.median()
    assert rows[2:] == [
        [layer, f"{medians[layer, 'w']:.3f} (2 left out)", f"{medians[layer, 'a_plus_minus']:.3f} (0 left out)"]
        for layer in ("features.0", "features.2", "classifier")
    ]
    place = next(i for i, block in enumerate(page.blocks) if isinstance(block, wr.MarkdownBlock))
    assert page.blocks[place - 1].text == "net on digits, criterion all, probe closed_form"


def test_runs_are_filtered_and_grouped_by_keys_that_the_server_knows(written):
    """The server has what a configuration holds of a top-level key below ``value``."""
    content, _ = written
    (runs,) = run_sets(content["workspaces"][2]["spec"])
    found = {rule["key"]["name"]: rule["value"] for rule in runs["filters"]["filters"]}
    assert found == {
        "names.value.model": ["small_vgg"], "names.value.data": ["digits"], "names.value.criterion": ["all"],
        "names.value.probe": ["closed_form"],
    }  # fmt: skip
    assert {rule["key"]["section"] for rule in runs["filters"]["filters"]} == {"config"}
    assert {rule.get("connector") for rule in runs["filters"]["filters"]} == {None, "AND"}
    assert runs["grouping"] == [{"section": "config", "name": "names.value.estimator"}]
    section = content["workspaces"][2]["spec"]["section"]["panelBankConfig"]["sections"][0]
    assert section["panels"][0]["config"]["groupBy"] == "names.value.estimator"
    (criteria,) = run_sets(content["workspaces"][4]["spec"])
    assert [key["name"] for key in criteria["grouping"]] == [
        "names.value.estimator", "names.value.criterion", "names.value.probe",
    ]  # fmt: skip


def test_the_keys_are_those_of_a_run_of_the_job(run_job, monkeypatch, written):
    """What is drawn and what is grouped by, a job logs under these names."""
    from pattern_bench.tracking import base

    logged, configs = set(), []

    class Recording(base.Tracker):
        def metrics(self, values):
            logged.update(values)

        def curve(self, name, at, values):
            logged.update(f"{name}/{key}" for key in (*values, base.AXES[name]))

        def image(self, name, file, caption):
            logged.add(name)

    def track(settings, folder, run_id, job, names, config):
        configs.append({"names": names})
        return Recording()

    monkeypatch.setattr("pattern_bench.pipeline.run_folder.track", track)
    run_job(*FEW, "estimator=a")
    content, _ = written
    view = ws.Workspace._from_model(View.model_validate(content["workspaces"][3]))
    fig3, lines, areas = panels_of(view)
    drawn = {metric.name for metric in (*fig3.metrics, *lines.y, lines.x, *areas.metrics)}
    assert drawn <= logged
    assert {"model", "data", "criterion", "probe", "estimator"} <= configs[0]["names"].keys()
    galleries = panels_of(ws.Workspace._from_model(View.model_validate(content["workspaces"][5])))[0]
    assert "figures/explanations" in set(galleries.media_keys) & logged


@pytest.mark.slow
def test_with_a_key_views_and_report_are_saved_and_their_addresses_told(runs, tmp_path):
    with serving(recorded("wandb_project")) as (environment, asked):
        done = dashboard(runs, tmp_path, environment)
        assert done.returncode == 0, done.stderr
        server = environment["WANDB_BASE_URL"]
    assert done.stdout.splitlines()[1] == f"{server}/lab/patterns/reports/Which-explanation-to-believe--Vmlldzox"
    assert done.stdout.splitlines()[2:] == [f"{server}/lab/patterns?nw=abcdefghijk"] * 6
    sent = [json.loads(query["spec"]) for name, query in asked if name == "UpsertView2"]
    said = [view["spec"] for view in json.loads((tmp_path / "dashboard.json").read_text())["workspaces"]]
    assert list(map(run_filters, sent)) == list(map(run_filters, said))
    assert {query["entityName"] for name, query in asked if name == "upsertView"} == {"lab"}


def run_filters(spec):
    return [runs["filters"] for runs in run_sets(spec)]


def dashboard(runs, folder, environment):
    arguments = [runs, "--project", "patterns", "--entity", "lab"]
    return python(["-m", "pattern_bench.dashboard", *arguments], folder, environment)


@pytest.mark.slow
def test_a_server_that_refuses_is_one_message_and_the_file_is_there(runs, tmp_path):
    answers = recorded("wandb_project") | {"status": 403}
    with serving(answers) as (environment, _):
        done = dashboard(runs, tmp_path, environment)
    assert done.returncode == 1
    assert "error: W&B does not take the dashboards of lab/patterns: " in done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr + done.stdout
    assert (tmp_path / "dashboard.json").is_file()


def test_mistakes_are_one_message(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in (runs / "a").iterdir():
        if file.is_file():
            (odd / file.name).write_bytes(file.read_bytes())
    summary = json.loads((odd / "summary.json").read_text())
    (odd / "summary.json").write_text(json.dumps(summary | {"model": "it's a < b"}))
    where = ["--project", "p", "--entity", "e", "--output"]
    for folder, output, message in (
        (tmp_path / "none", "x.json", "is not a folder"),
        (tmp_path / "empty", "x.json", "holds no complete run"),
        (odd, "x.json", "cannot stand in a W&B filter"),
        (runs, "none/x.json", "cannot be written"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(folder), *where, str(tmp_path / output)])


@pytest.mark.slow
def test_without_the_package_it_names_the_extra(runs, tmp_path):
    hidden = (
        "import sys; sys.modules['wandb_workspaces'] = None; from pattern_bench.commands.dashboard import main; main()"
    )
    done = python(["-c", hidden, runs, "--project", "p", "--entity", "e"], tmp_path, {})
    assert done.returncode == 1
    assert done.stderr == "error: dashboards need wandb-workspaces: pip install 'pattern_bench[dashboard]'\n"
