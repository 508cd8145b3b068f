"""What the comparison of two sets of runs says: its intervals against closed forms, brute force and SciPy."""

import math

import numpy as np
import pandas as pd
import pytest
from helpers.made_runs import LAYERS, make_run
from scipy import stats

from pattern_bench.commands.report import main
from pattern_bench.reporting.changes import (
    change_table,
    changed_settings,
    changes,
    difference_interval,
    over_images,
    over_neurons,
    wilson,
)
from pattern_bench.reporting.gathering import gather


def found(folder):
    return gather([(folder, folder.name)])


def compared(a, b):
    return change_table(changes(found(a), found(b)))


# --- intervals ---


def test_the_paired_interval_is_that_of_the_differences():
    draw = np.random.default_rng(0)
    a = draw.uniform(size=400)
    b = a + draw.normal(0.03, 0.05, 400)
    low, high = over_neurons(a, b, paired=True)
    mean, error = (b - a).mean(), (b - a).std(ddof=1) / 20
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    # Unpaired, what neurons share is not taken out.
    wide = over_neurons(a, b, paired=False)
    error = math.hypot(a.std(ddof=1), b.std(ddof=1)) / 20
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert wide[1] - wide[0] > 3 * (high - low)


def test_intervals_over_neurons_agree_with_scipys_bootstrap():
    draw = np.random.default_rng(1)
    a, b = draw.beta(2, 5, 40), draw.beta(2, 4, 55)
    given = stats.bootstrap(
        (a, b), lambda x, y, axis: y.mean(axis) - x.mean(axis), method="percentile", n_resamples=20000, rng=draw
    ).confidence_interval  # fmt: skip
    assert over_neurons(a, b, paired=False) == pytest.approx((given.low, given.high), abs=0.006)


def test_the_interval_over_images_is_students_of_the_paired_draws():
    draw = np.random.default_rng(2)
    a = draw.normal(0.5, 0.05, 20)
    b = a + draw.normal(0.02, 0.01, 20)
    (low, high), how = over_images(0.02, a, b, same_draws=True)
    expected = stats.t.interval(0.95, 19, 0.02, (b - a).std(ddof=1))
    assert (low, high) == pytest.approx(expected)
    assert how == "images, paired resamples"
    (low, high), how = over_images(0.02, a, b, same_draws=False)
    assert high - 0.02 == pytest.approx(stats.t.ppf(0.975, 19) * math.hypot(a.std(ddof=1), b.std(ddof=1)))
    assert how == "images, independent resamples"


def test_wilsons_interval_is_scipys():
    for hits, n in ((0, 20), (7, 20), (97, 100), (100, 100)):
        expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_of_a_difference_of_normal_estimates_is_the_normal_one():
    low, high = difference_interval(0.5, (0.4, 0.6), 0.8, (0.6, 1.0))
    assert (low, high) == pytest.approx((0.3 - math.hypot(0.1, 0.2), 0.3 + math.hypot(0.1, 0.2)))
    # And is not symmetric where they are not: what counts is how far down B reaches, and how far up A.
    low, high = difference_interval(0.5, (0.5, 0.9), 0.8, (0.5, 0.8))
    assert (low, high) == pytest.approx((0.3 - 0.5, 0.3))


def test_intervals_hold_the_true_difference_about_as_often_as_they_say():
    draw = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        shared = draw.normal(size=60)
        a, b = shared + draw.normal(size=60), shared + 0.4 + draw.normal(size=60)
        low, high = over_neurons(a, b, paired=True)
        held += low < 0.4 < high
    assert 180 <= held <= 199


# --- what is compared with what ---


def test_better_worse_and_the_same(tmp_path):
    for name, better in (("a", 0.0), ("b", 0.1)):
        make_run(tmp_path / name / "a", estimator="a", better=better)
        make_run(tmp_path / name / "w", estimator="w", better=-better)
        make_run(tmp_path / name / "plus", estimator="a_plus_minus")
        make_run(tmp_path / name / "random", estimator="random", better=better)
        make_run(tmp_path / name / "x", estimator="x")
    table = compared(tmp_path / "a", tmp_path / "b")
    rho = table[table.quantity == "rho"]
    verdicts = {name: set(rows.verdict) for name, rows in rho.groupby("estimator")}
    assert verdicts == {
        "a": {"better"}, "w": {"worse"}, "a_plus_minus": {"the same"}, "random": {"baseline"}, "x": {"not defined"},
    }  # fmt: skip
    rows = rho[(rho.estimator == "a")]
    assert rows.layer.tolist() == ["all layers", *LAYERS]
    assert rows.difference.to_numpy() == pytest.approx(0.1)
    assert set(rows.interval) == {"neurons, paired bootstrap"}
    mine = pd.read_csv(tmp_path / "a" / "a" / "rho.csv").rho
    assert rows.a.iloc[0] == pytest.approx(mine.mean())
    area = table[(table.quantity == "area over the curve") & (table.estimator == "a")].iloc[0]
    assert (area.difference, area.low, area.high) == pytest.approx((0.05, 0.05 - 0.05 * 2**0.5, 0.05 + 0.05 * 2**0.5))
    assert area.verdict == "no clear difference"
    assert set(table[table.method == "random_order"].verdict) == {"baseline"}


def test_resamples_give_intervals_over_images_paired_where_the_draws_are_the_same(tmp_path):
    make_run(tmp_path / "a", resamples=12)
    make_run(tmp_path / "b", resamples=12, better=0.02)
    make_run(tmp_path / "c", resamples=12, settings={"data": {"name": "digits", "limit": 200}})
    assert set(compared(tmp_path / "a", tmp_path / "b").interval[:4]) == {"images, paired resamples"}
    assert set(compared(tmp_path / "a", tmp_path / "c").interval[:4]) == {"images, independent resamples"}
    make_run(tmp_path / "d")
    assert set(compared(tmp_path / "a", tmp_path / "d").interval[:4]) == {"neurons, paired bootstrap"}


def test_another_model_is_compared_layer_by_layer_and_what_is_not_there_is_said(tmp_path):
    make_run(tmp_path / "a", model="old")
    make_run(tmp_path / "b", model="new", layers={"features.0": 8, "features.2": 20, "head": 5}, better=0.1)
    table = compared(tmp_path / "a", tmp_path / "b")
    assert set(table.model) == {"old → new"}
    rho = table[table.quantity == "rho"].set_index("layer")
    assert rho.interval["features.0"] == "neurons, paired bootstrap"
    assert rho.interval["features.2"] == rho.interval["all layers"] == "neurons, unpaired bootstrap"
    assert (rho.verdict["classifier"], rho.verdict["head"]) == ("missing in B", "missing in A")


def test_settings_that_differ_are_listed_and_those_of_places_are_not(tmp_path):
    make_run(tmp_path / "a", settings={"cache": {"dir": "/one"}, "model": {"name": "net", "epochs": 3}})
    make_run(tmp_path / "b" / "1", seed=1, settings={"cache": {"dir": "/two"}, "model": {"name": "net", "epochs": 5}})
    make_run(tmp_path / "b" / "2", seed=0, estimator="w", settings={"model": {"name": "net", "epochs": 5}})
    listed = changed_settings(found(tmp_path / "a").runs, found(tmp_path / "b").runs)
    assert listed == [("model.epochs", "3", "5"), ("seed", "0", "0, 1")]


def test_the_command_writes_and_says_it(tmp_path, capsys):
    make_run(tmp_path / "a", accuracy=0.7, picture=True)
    make_run(tmp_path / "b", better=0.1, seed=0, accuracy=0.9, settings={"seed": 4}, picture=True)
    main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "seed: 0 → 4" in said
    assert "S_a, all layers" in said
    assert "single layers: 3 better" in said
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"index.html", "compare.md", "compare.csv"}
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert len(table) == 1 + 3 + 2 + 1
    accuracy = table[table.quantity == "accuracy"].iloc[0]
    assert (accuracy.a, accuracy.b, accuracy.verdict) == (0.7, 0.9, "better")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| ρ " in text
    assert "| seed " in text
    with pytest.raises(SystemExit, match="2"):
        main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")])
