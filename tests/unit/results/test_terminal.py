"""What a job shows while it runs and at its end, and what it measures of its stages."""

import io
import json
import re

import pandas as pd
import pytest
from rich.console import Console

from pattern_bench.results import terminal

SMALL = ["data.limit=300", "model.training.epochs=2", "degradation.images=6", "explanation.images=2"]


@pytest.fixture(scope="module")
def done(configure, tmp_path_factory):
    """A small job's folder and summary."""
    from pattern_bench.pipeline.job import run

    folder = tmp_path_factory.mktemp("run")
    run(configure(*SMALL, f"cache.dir={tmp_path_factory.mktemp('cache')}"), folder)
    return folder, json.loads((folder / "summary.json").read_text())


def shown(summary, width=100):
    console = Console(file=io.StringIO(), width=width)
    terminal.show(summary, console)
    return console.file.getvalue()


def test_the_table_has_the_figures_of_rho_csv(done):
    folder, summary = done
    rows = {line.split()[0]: line for line in shown(summary).splitlines() if line.strip()}
    live = pd.read_csv(folder / "rho.csv").dropna(subset=["rho"])
    for layer, rho in [*live.groupby("layer").rho, ("all", live.rho)]:
        low, median, high = rho.quantile([0.25, 0.5, 0.75])
        expected = f" {rho.mean():.3f} {median:.3f} {low:.2f} to {high:.2f} "
        assert expected in re.sub(" +", " ", rows[layer])


def test_the_table_fits_into_80_columns_and_is_plain_in_a_file(done):
    text = shown(done[1], width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "ρ(S) of S_a+-: small_vgg on digits" in text


@pytest.mark.parametrize("missing", ["rho", "curve"])
def test_what_a_run_does_not_have_is_not_shown(done, missing):
    summary = dict(done[1])
    if missing == "rho":
        nothing = {"mean": None, "median": None, "q25": None, "q75": None, "neurons": 3, "dead": 0}
        summary["rho"] = {"all": nothing, "layers": [{"layer": "features.0", **nothing}]}
        assert "ρ(S)" not in shown(summary)
    else:
        summary |= {"accuracy": None, "area_over_curve": {}}
        assert "area" not in shown(summary)
        assert "accuracy" not in shown(summary)


def test_a_layer_without_live_neurons_has_a_row(done):
    summary = json.loads(json.dumps(done[1]))
    summary["rho"]["layers"][0] |= {"mean": None, "median": None, "q25": None, "q75": None, "dead": 16}
    (row,) = [line for line in shown(summary).splitlines() if line.strip().startswith("features.0")]
    assert row.split() == ["features.0", "16", "16", "–", "–", "–"]


@pytest.mark.slow
def test_quiet_shows_the_folder_and_nothing_else(command):
    done = command(*SMALL, "logger=none", "quiet=true")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("results: ")
    assert len(done.stdout.splitlines()) == 1


def test_stages_say_how_many_images_they_took_a_second(done):
    rates, seconds = done[1]["images_per_second"], done[1]["seconds"]
    counts = {"accuracy": 60, "fit_patterns": 120, "fit_probe": 120, "validation_moments": 60}
    for stage, images in counts.items():
        assert rates[stage] == pytest.approx(images / seconds[stage], rel=0.05, abs=0.2)
    # Once by the method's order, and by the random one unless another job has left that in the cache.
    assert any(rates["degrade"] == pytest.approx(n / seconds["degrade"], rel=0.05, abs=0.2) for n in (6, 12))
    assert "rho" not in rates  # counts layers


@pytest.mark.slow
def test_a_sweep_ends_with_its_table(command):
    done = command("-m", "estimator=x,w", "layer=features.0", "logger=none", *SMALL)
    assert done.returncode == 0
    assert done.stderr.count("median ρ(S): small_vgg on digits, criterion all, probe closed_form") == 1
    quiet = command("-m", "estimator=x,w", "layer=features.0", "logger=none", "quiet=true", *SMALL)
    assert quiet.stderr == ""
