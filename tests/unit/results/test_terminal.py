"""What a job shows while it runs and at its end, and what it measures of its stages."""

import io
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from pattern_bench.engine.progress import StageProgress
from pattern_bench.reporting import tables
from pattern_bench.reporting.console import show as show_report
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


def test_what_the_cache_had_counts_for_no_speed(configure, tmp_path):
    from pattern_bench.pipeline.job import run

    cache = f"cache.dir={tmp_path / 'cache'}"
    rates = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(configure(*SMALL, cache, "layer=features.0"), tmp_path / name)
        rates.append(json.loads((tmp_path / name / "summary.json").read_text())["images_per_second"])
    assert {"fit_patterns", "accuracy"} <= rates[0].keys()
    assert "fit_patterns" not in rates[1]
    assert "accuracy" in rates[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_a_stages_peak_is_its_own():
    stages = StageProgress(quiet=True)
    with stages.run("large", ""):
        np.ones(300 << 17)  # 300 MiB
    with stages.run("small", ""):
        pass
    assert stages.peak_memory_mib["large"] > stages.peak_memory_mib["small"] + 250


def test_a_sweeps_table_has_every_cell_and_says_which_are_missing():
    rows = []
    for estimator, values in {"a": [0.9, 0.8, 0.1], "x": [None, None, None]}.items():
        for index, layer in enumerate(["conv1", "conv2"]):
            if (layer, estimator) != ("conv2", "a"):
                rows += [
                    {"model": "m", "data": "d", "criterion": "all", "probe": "sgd", "layer": layer,
                     "layer_index": index, "estimator": estimator, "rho": value} for value in values
                ]  # fmt: skip
    missing = [("m", "d", "all", "sgd", "conv2", "a"), ("m", "d", "all", "sgd", "conv1", "w")]
    curves = pd.DataFrame(
        {"model": "m", "data": "d", "estimator": "a", "method": "pattern_net", "step": [0, 1, 2],
         "probability_mean": [1.0, 0.5, 0.3]}
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    rho = pd.DataFrame(rows).astype({"rho": float}).assign(dead=False)
    table = tables.rho_table(rho, pd.DataFrame(), missing)
    show_report(table, tables.areas(curves), [("m", "d", "w", "pattern_net")], console)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert ["layer", "S_x", "S_w", "S_a"] in lines
    assert ["conv1", "–", "missing", "0.800"] in lines
    assert ["conv2", "–", "missing"] in lines
    assert ["m", "d", "PatternNet,", "S_a", "0.400"] in lines
    assert ["m", "d", "PatternNet,", "S_w", "missing"] in lines


@pytest.mark.slow
def test_a_sweep_ends_with_its_table(command):
    done = command("-m", "estimator=x,w", "layer=features.0", "logger=none", *SMALL)
    assert done.returncode == 0
    assert done.stderr.count("median ρ(S): small_vgg on digits, criterion all, probe closed_form") == 1
    quiet = command("-m", "estimator=x,w", "layer=features.0", "logger=none", "quiet=true", *SMALL)
    assert quiet.stderr == ""
