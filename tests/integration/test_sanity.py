"""Sanity checks: their measures against scipy and by brute force, and the checks on networks with known answers."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method
from pattern_bench.methods.gradients import Gradient
from pattern_bench.pipeline.sanity import run
from pattern_bench.pipeline.sanity_rows import COLUMNS, MEASURES

SMALL = ["data.limit=300", "model.training.epochs=4", "images=4", "refit=20", "directions=3"]


# --- randomisation ---


class InputItself(Method):
    """Explains nothing: the same whatever the weights."""

    name, kind = "input_itself", "attribution"

    def _attribute(self, x, target):
        return x.clone()


@pytest.fixture
def check(cache_dir, tmp_path):
    def start(*overrides, folder="sanity"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("sanity", ["logger=none", f"cache.dir={cache_dir}", *SMALL, *overrides])
        (tmp_path / folder).mkdir(exist_ok=True)
        summary = run(cfg, tmp_path / folder)
        assert json.loads((tmp_path / folder / "sanity.json").read_text()) == summary
        return tmp_path / folder, pd.read_csv(tmp_path / folder / "sanity.csv"), summary

    return start


def test_both_checks_leave_their_files(check):
    folder, table, summary = check()
    assert {path.name for path in folder.iterdir()} == {
        "sanity.csv", "sanity.json", "randomisation.png", "convergence.png", "config.yaml",
    }  # fmt: skip
    assert tuple(table.columns) == COLUMNS
    methods = {
        "gradient", "deconvnet", "guided_backprop", "pattern_net", "lrp_z", "dtd_w2", "pattern_attribution",
    }  # fmt: skip
    assert set(table.method) == methods
    random = table[table.check == "randomisation"]
    assert set(random.measure) == set(MEASURES)
    assert len(random) == 7 * 6 * 4
    converging = table[table.check == "convergence"]
    assert len(converging) == 7 * 7
    assert converging[converging.layer == "output"]["mean"].nunique() == 1
    assert converging["mean"].between(0, 1 + 1e-9).all()
    assert table["mean"].dropna().between(-1 - 1e-9, 1 + 1e-9).all()
    with_patterns = table.method.isin(["pattern_net", "pattern_attribution"])
    assert (table.estimator[with_patterns] == "a_plus_minus").all()
    assert (table.estimator[~with_patterns] == "none").all()
    assert (table.n <= 4).all()
    assert summary["patterns"] == "refitted"
    assert set(summary["at_the_image"]) == methods


def test_a_method_that_ignores_the_weights_keeps_its_heat_map_and_the_gradient_does_not(check, monkeypatch):
    def methods(*_):
        return {"input_itself": InputItself, "gradient": Gradient}

    monkeypatch.setattr("pattern_bench.pipeline.sanity.methods_shown", methods)
    _, table, summary = check("model=linear")
    random = table[table.check == "randomisation"]
    assert np.allclose(random[random.method == "input_itself"]["mean"], 1)
    assert (random[random.method == "gradient"]["mean"].abs() < 0.7).all()
    assert set(table[table.check == "convergence"].method) == {"gradient"}
    assert "one pass back" in summary["left_out"]["input_itself, convergence"]


def test_patterns_are_refitted_or_kept(check):
    show = "show=[pattern_attribution]"
    refitted, kept = check(show, folder="a")[1], check(show, "refit=0", folder="b")
    assert kept[2]["patterns"] == "kept"
    end = [t[(t.check == "randomisation") & (t.layer_index == 0)]["mean"].to_numpy() for t in (refitted, kept[1])]
    assert not np.allclose(*end)
    # What is sent back through the trained network has nothing to do with it.
    same = [t[t.check == "convergence"]["mean"].to_numpy() for t in (refitted, kept[1])]
    assert np.allclose(*same)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["images=0"], "images=0 is not possible"),
        (["refit=-1"], "refit=-1 is not possible"),
        (["directions=1"], "directions=1 is not possible"),
        (["start=ones"], "start=ones is unknown"),
        (["start=classes", "directions=11"], "directions=11 is more than the 10 classes"),
        (["images=61"], "images=61 is more than the 60 images"),
        (["refit=121"], "refit=121 is more than the 120 images"),
        (["show=gradients"], "show=gradients is unknown"),
        (["estimator=x"], "estimator=x has none"),
        (["layer=features.0"], "layer=all"),
    ],
)
def test_mistakes_are_found_before_long_work(check, monkeypatch, overrides, message):
    monkeypatch.setattr("pattern_bench.pipeline.patterns.collect", partial(pytest.fail, "moments were collected"))
    with pytest.raises(UserError, match=message):
        check(*overrides)


@pytest.mark.slow
def test_the_command_gives_one_message(command):
    done = command("probe=sgd", module="pattern_bench.sanity")
    assert done.returncode == 1
    assert "error: probe=sgd has no effect on the sanity checks: leave it out" in done.stderr
    assert "Traceback" not in done.stderr
