"""Sanity checks: their measures against scipy and by brute force, and the checks on networks with known answers."""

import json
from collections import OrderedDict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy.stats import spearmanr
from torch import nn

from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method
from pattern_bench.methods.gradients import Gradient, IntegratedGradients
from pattern_bench.methods.patterns import DtdW2, LrpZ
from pattern_bench.metrics.similarity import convergence, cosine, rank_data, similarities, spearman, ssim
from pattern_bench.pipeline.convergence import back_propagated, start_vectors
from pattern_bench.pipeline.randomisation import randomise
from pattern_bench.pipeline.sanity import run
from pattern_bench.pipeline.sanity_rows import COLUMNS, MEASURES

SMALL = ["data.limit=300", "model.training.epochs=4", "images=4", "refit=20", "directions=3"]


# --- measures ---


def test_spearman_is_scipys_also_with_ties():
    torch.manual_seed(0)
    a, b = torch.randn(4, 50), torch.randn(4, 50)
    a[1], b[1] = a[1].round(), b[1].round()
    b[2] = a[2].exp()
    for i, value in enumerate(spearman(a, b)):
        assert float(value) == pytest.approx(spearmanr(a[i].numpy(), b[i].numpy()).statistic, abs=1e-12)
    assert rank_data(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[3.5, 1.0, 3.5, 2.0]]
    assert spearman(torch.ones(1, 5), torch.randn(1, 5)).isnan().all()


@pytest.mark.parametrize("shape", [(12, 9), (8, 8), (5, 6), (3, 3)])
def test_ssim_is_its_definition_window_by_window(shape):
    torch.manual_seed(0)
    a, b = torch.randn(1, *shape).double(), torch.randn(1, *shape).double()
    side = min(7, *shape)
    side -= 1 - side % 2
    x, y = (m[0].numpy() / (2 * m.abs().max().item()) + 0.5 for m in (a, b))
    found = []
    for i in range(shape[0] - side + 1):
        for j in range(shape[1] - side + 1):
            p, q = x[i : i + side, j : j + side].ravel(), y[i : i + side, j : j + side].ravel()
            (vp, c), (_, vq) = np.cov(p, q)
            c1, c2 = 0.01**2, 0.03**2
            found.append(
                (2 * p.mean() * q.mean() + c1) * (2 * c + c2)
                / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (vp + vq + c2))
            )  # fmt: skip
    assert float(ssim(a, b)) == pytest.approx(np.mean(found), abs=1e-12)


def test_measures_do_not_depend_on_scale_and_hold_for_huge_values():
    torch.manual_seed(0)
    a, b = torch.randn(3, 8, 8).double(), torch.randn(3, 8, 8).double()
    here, there = similarities(a, b), similarities(a * 1e200, b * 1e-200)
    for name in MEASURES:
        assert torch.allclose(here[name], there[name])
        assert torch.allclose(similarities(a, a)[name], torch.ones(3).double())
    assert torch.allclose(here["cosine"], nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)))
    assert similarities(a, -a)["spearman_absolute"].allclose(torch.ones(3).double())
    one_signed = similarities(a.abs(), -a.abs())
    assert (one_signed["ssim"] < 0).all()
    assert one_signed["cosine"].allclose(-torch.ones(3).double())
    assert all(values.isnan().all() for values in similarities(a, torch.zeros_like(a)).values())
    assert cosine(a.flatten(1), -a.flatten(1)).allclose(-torch.ones(3).double())


def test_convergence_leaves_out_what_has_no_direction():
    line = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.0, 0.0], [torch.inf, 1.0]])
    assert float(convergence(line)) == pytest.approx(1)
    assert float(convergence(torch.eye(3))) == 0
    assert convergence(line[2:]).isnan()


# --- directions ---


def chain(*weights):
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False).double() for w in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight
    return nn.Sequential(OrderedDict((f"l{i}", layer) for i, layer in enumerate(layers))).eval().requires_grad_(False)


def converged(method, model, starts):
    vectors = back_propagated(method, [f"l{i}" for i in range(len(model))], torch.randn(1, 6).double(), starts)
    return [float(convergence(vectors[name])) for name in vectors]


def test_orthogonal_layers_keep_the_angles_and_one_of_rank_one_ends_them():
    torch.manual_seed(0)
    starts = start_vectors("gaussian", 4, 6, seed=1)
    turns = [torch.linalg.qr(torch.randn(6, 6).double())[0] for _ in range(3)]
    model = chain(*turns)
    assert converged(Gradient(model), model, starts) == pytest.approx([float(convergence(starts))] * 3)
    flat = torch.outer(torch.randn(6), torch.randn(6)).double()
    model = chain(turns[0], flat, turns[1])
    found = converged(Gradient(model), model, starts)
    assert found[:2] == pytest.approx([1, 1])
    assert found[2] == pytest.approx(float(convergence(starts)))


def test_vectors_are_what_the_methods_themselves_send_back():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(l0=nn.Linear(6, 8), relu=nn.ReLU(inplace=True), l1=nn.Linear(8, 5))).eval()
    model.requires_grad_(False)
    x = torch.randn(1, 6)
    for method in (Gradient(model), LrpZ(model), DtdW2(model)):
        found = back_propagated(method, ["l0", "l1"], x, torch.eye(5)[2:3])
        expected = method.attribute(x, 2)
        scale = float(found["l0"].norm() / expected.norm())  # dtd_w2 starts from the output's value, here from 1
        assert torch.allclose(found["l0"], expected * scale, atol=1e-6) or torch.allclose(
            found["l0"], -expected * scale, atol=1e-6
        )
        assert found["l1"].shape == (1, 8)
        again = method.attribute(x, 2)  # the method is itself again
        assert torch.equal(again, expected)
    relevance = back_propagated(LrpZ(model), ["l1"], x, torch.eye(5)[:1])["l1"]
    assert torch.allclose(relevance, model.l0(x).relu() * model.l1.weight[0])


def test_a_method_of_many_passes_has_no_directions():
    model = nn.Sequential(OrderedDict(l0=nn.Linear(6, 5))).eval()
    with pytest.raises(UserError, match="one pass back"):
        back_propagated(IntegratedGradients(model), ["l0"], torch.randn(1, 6), torch.eye(5))


def test_start_vectors():
    assert start_vectors("classes", 3, 10, 0).sum(1).tolist() == [1, 1, 1]
    assert float(convergence(start_vectors("classes", 5, 10, 0))) == 0
    assert torch.equal(start_vectors("gaussian", 3, 10, 0), start_vectors("gaussian", 3, 10, 0))


# --- randomisation ---


def test_randomised_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    before, state = first.weight.clone(), torch.random.get_rng_state()
    randomise(first, 5)
    randomise(second, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, before)
    randomise(second, 6)
    assert not torch.equal(first.weight, second.weight)


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
