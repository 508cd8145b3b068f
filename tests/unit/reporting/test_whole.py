"""Tables of a run against each other and its summary: what was cut, doubled or changed is refused."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.made_runs import make_run

from pattern_bench.errors import UserError
from pattern_bench.reporting.runs import read_run
from pattern_bench.results.schema import area_rows, degradation_rows, summarise_rho, write_csv

METHODS = ("pattern_attribution", "random_order")


def whole_run(folder, **about):
    """A run whose summary says of its tables what the job says."""
    make_run(folder, resamples=4, **about)
    summary = json.loads((folder / "summary.json").read_text())
    rho, bootstrap = (pd.read_csv(folder / f"{name}.csv") for name in ("rho", "bootstrap"))
    draw = torch.Generator().manual_seed(0)
    curves = {name: torch.rand(20, 9, generator=draw, dtype=torch.float64) for name in METHODS}
    areas = {name: (curve[:, :1] - curve).mean(1) for name, curve in curves.items()}
    write_csv(folder / "degradation.csv", degradation_rows(curves, "net", "digits", "a"))
    write_csv(folder / "areas.csv", area_rows(areas, [f"{i}.jpg" for i in range(20)], "net", "digits", "a"))
    means = {name: float(area.mean()) for name, area in areas.items()}
    summary |= {
        "rho": summarise_rho(rho[rho.probe == "closed_form"], bootstrap), "steps": 8, "area_over_curve": means,
        "area_over_curve_interval": {name: [-1, 1] for name in means}, "splits": {"validation": 50},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def changed(folder, file, change):
    table = pd.read_csv(folder / file)
    done = change(table)
    (table if done is None else done).to_csv(folder / file, index=False)


def setting(column, value, row=0):
    def change(table):
        table[column] = table[column].astype(object)
        table.loc[row, column] = value

    return change


def twice(table):
    return pd.concat([table, table.iloc[3:4]])


@pytest.mark.parametrize(("file", "change", "said"), [
    ("rho.csv", lambda t: t.head(0), "rho.csv has no rows"),
    ("rho.csv", lambda t: t.head(12), "rho.csv and summary.json have other layers: classifier"),
    ("rho.csv", lambda t: t.head(10), "rho.csv and summary.json have other layers: classifier"),
    ("rho.csv", lambda t: t.head(-1), r"rho.csv has 4 neurons in layer classifier, and summary.json 5"),
    ("rho.csv", twice, "rho.csv has 1 neurons twice"),
    ("rho.csv", lambda t: pd.concat([t, t]), "rho.csv has 25 neurons twice"),
    ("rho.csv", setting("rho", np.nan), "rho.csv has the mean .* in layer features.0, and summary.json "),
    ("rho.csv", setting("rho", 7.5), "rho.csv has the mean .* in layer features.0, and summary.json "),
    ("rho.csv", setting("rho", 0.5, 6), "rho.csv gives a dead neuron a ρ"),
    ("rho.csv", setting("dead", False, 6), "rho.csv has 0 dead in layer features.0, and summary.json 1"),
    ("rho.csv", setting("probe", "sgd"), "rho.csv has probes"),
    ("bootstrap.csv", lambda t: t.head(-1), "bootstrap.csv has 3 resamples of one layer and 4 of another"),
    ("bootstrap.csv", twice, "bootstrap.csv lacks resamples, or has some twice"),
    ("bootstrap.csv", setting("layer", "other"), "bootstrap.csv has a layer that rho.csv has not: other"),
    ("degradation.csv", lambda t: t.head(0), "degradation.csv has curves of none, and summary.json of "),
    ("degradation.csv", lambda t: t.head(3),
     "degradation.csv ends pattern_attribution at step 2, and summary.json at 8"),
    ("degradation.csv", lambda t: t.drop(4), "degradation.csv lacks steps of pattern_attribution"),
    ("degradation.csv", twice, "degradation.csv lacks steps of pattern_attribution"),
    ("degradation.csv", setting("probability_mean", 7.5), "degradation.csv has what is no probability"),
    ("degradation.csv", setting("probability_mean", 0.99), "degradation.csv has the area .* of pattern_attribution"),
    ("degradation.csv", setting("probability_std", 3.0), "degradation.csv has what is no deviation"),
    ("degradation.csv", setting("n", 19), "degradation.csv counts 19 and 20 images"),
    ("degradation.csv", lambda t: t.assign(n=60), "degradation.csv counts 60 images"),
    ("areas.csv", setting("area", np.nan), "areas.csv has an image without an area"),
    ("areas.csv", setting("area", 0.9), "areas.csv has the area .* of pattern_attribution, and summary.json "),
    ("areas.csv", lambda t: t.head(-1), "areas.csv has 19 images of random_order, and degradation.csv 20"),
    ("areas.csv", lambda t: t.head(20), "areas.csv and degradation.csv have other curves"),
])  # fmt: skip
def test_a_table_that_is_not_whole_is_damaged(tmp_path, file, change, said):
    run = whole_run(tmp_path / "run")
    read_run(run, "run")
    changed(run, file, change)
    with pytest.raises(UserError, match=rf"^the run in run is damaged \(({said}).*\): remove it or run it again$"):
        read_run(run, "run")


def test_of_an_earlier_version_only_what_it_says_is_compared(tmp_path):
    run = whole_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "areas.csv").unlink()
    for name in ("rho", "area_over_curve", "area_over_curve_interval", "steps", "splits", "probe"):
        del summary[name]
        (run / "summary.json").write_text(json.dumps(summary))
        read_run(run, "run")
    changed(run, "rho.csv", twice)
    with pytest.raises(UserError, match="neurons twice"):
        read_run(run, "run")


def test_without_patterns_no_neuron_has_a_rho(tmp_path):
    run = make_run(tmp_path / "run", estimator="x")
    summary = json.loads((run / "summary.json").read_text())
    summary["rho"] = summarise_rho(pd.read_csv(run / "rho.csv"), pd.DataFrame())
    (run / "summary.json").write_text(json.dumps(summary))
    assert read_run(run, "run").rho.rho.isna().all()
    changed(run, "rho.csv", setting("rho", 0.5))
    with pytest.raises(UserError, match=r"rho.csv has the mean 0.5 in layer features.0, and summary.json None"):
        read_run(run, "run")


@pytest.mark.parametrize("criterion", ["all", "positive"])
def test_of_two_probes_the_summary_is_of_the_first(tmp_path, criterion):
    run = whole_run(tmp_path / "run", criterion=criterion)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "probe": "both"}))
    rho = pd.read_csv(run / "rho.csv")
    second = rho.assign(probe="sgd", rho=rho.rho + 0.1)
    if criterion == "positive":  # descent measures all neurons, the closed form some
        second = pd.concat([second, second.head(1).assign(neuron=99)])
    pd.concat([rho, second]).to_csv(run / "rho.csv", index=False)
    read_run(run, "run")
    pd.concat([rho, second.iloc[9:]]).to_csv(run / "rho.csv", index=False)
    with pytest.raises(UserError, match=r"rho.csv lacks 9 neurons of probe sgd|rho.csv lacks 8 neurons of probe sgd"):
        read_run(run, "run")
    rho.to_csv(run / "rho.csv", index=False)
    with pytest.raises(UserError, match=r"rho.csv has probes"):
        read_run(run, "run")


@pytest.mark.parametrize("file", [
    "rho.csv", "degradation.csv", "areas.csv", "bootstrap.csv", "accuracy.json", "config.yaml", ".hydra/overrides.yaml",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, file, kind):
    run = whole_run(tmp_path / "run", overrides=["estimator=a"])
    (run / file).unlink()
    if kind == "pipe":
        os.mkfifo(run / file)
    elif kind == "folder":
        (run / file).mkdir()
    else:
        (run / file).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"is damaged \(.*{file.rpartition('/')[2]} is no file\)"):
        read_run(run, "run")
