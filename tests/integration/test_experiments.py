"""The experiments' own arithmetic, and one of each kind run as a reader would."""

import importlib
import json
import re
import sys
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.made_runs import LAYERS, make_run
from helpers.paths import ROOT
from torch import nn

import pattern_bench as pb
from experiments import jobs, pages, pictures
from experiments.fig3_signal_estimators import __main__ as fig3
from experiments.fig3_signal_estimators.regimes import OwnMeans
from experiments.fig4a_degradation import __main__ as fig4a
from experiments.ground_truth import scoring
from experiments.models import __main__ as models
from experiments.neurons import over_same_neurons
from pattern_bench.core.active_moments import FiringCollector, firing_rho
from pattern_bench.core.collector import Collector
from pattern_bench.results.schema import write_csv
from pattern_bench.storage.tensor_files import write_tensors


def test_a_block_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# Title\n\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\n")
    pages.write_block(page, "a", r"| \1 | new |")
    pages.write_block(page, "b", "x")
    expected = "# Title\n\n<!-- a -->\n| \\1 | new |\n<!-- /a -->\nbetween\n<!-- b -->\nx\n<!-- /b -->\n"
    assert page.read_text() == expected
    with pytest.raises(SystemExit, match="lacks the marks <!-- c -->"):
        pages.write_block(page, "c", "x")


def test_numbers_with_and_without_error():
    assert pages.with_error(0.937, 0.012) == "0.94 ± 0.01"
    assert pages.with_error(0.937, float("nan"), 1) == "0.9"
    assert pages.with_error(float("nan"), 0.1) == "–"


def test_networks_without_their_files_are_left_out(tmp_path, capsys):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    options = jobs.arguments("", [jobs.DIGITS, jobs.SQUEEZENET, jobs.CIFAR]).parse_args(["--cifar", str(tmp_path)])
    assert jobs.given([jobs.DIGITS, jobs.SQUEEZENET, jobs.CIFAR], options) == [jobs.DIGITS, jobs.CIFAR]
    assert "squeezenet is left out: it needs --photographs and --squeezenet" in capsys.readouterr().out
    assert f"data.root='{tmp_path}/train'" in jobs.settings(jobs.CIFAR, options)
    options.cifar = tmp_path / "O'Hara"
    assert rf"data.root='{tmp_path}/O\'Hara/train'" in jobs.settings(jobs.CIFAR, options)
    with pytest.raises(SystemExit, match=r"none/train/ and .*none/test/ must be there"):
        jobs.given([jobs.CIFAR], Namespace(cifar=tmp_path / "none"))


def test_the_pictures_that_may_be_shown_are_there_and_small(tmp_path):
    from PIL import Image

    folder = pictures.photographs(tmp_path / "photographs")
    assert sorted(path.name for path in folder.iterdir()) == sorted(pictures.PHOTOGRAPHS)
    pictures.keep_small(folder / "china.jpg", tmp_path / "small.jpg", width=100)
    assert Image.open(tmp_path / "small.jpg").size[0] == 100
    pictures.keep_small(folder / "china.jpg", tmp_path / "small.png", width=100)
    assert Image.open(tmp_path / "small.png").mode == "P"


EXPERIMENTS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py"))
SECTIONS = ["Question", "Command", "Results", "What it says", "What limits it"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_a_page_of_the_same_sections_with_its_command_and_a_result(experiment):
    folder = ROOT / "experiments" / experiment
    page = (folder / "README.md").read_text()
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == SECTIONS
    command = page[page.index("## Command") : page.index("## Results")]
    assert f"python -m experiments.{experiment}" in command
    starts = re.findall(r"^<!-- ([^/].*) -->$", page, re.MULTILINE)
    assert [f"/{name}" for name in starts] == re.findall(r"^<!-- (/.*) -->$", page, re.MULTILINE)
    assert starts or list(folder.glob("*.jpg"))
    for line in page.splitlines():
        for part in line.split("](")[1:]:
            target = part.partition(")")[0].partition("#")[0]
            if target and "://" not in target:
                assert (folder / target).exists(), f"{experiment}/README.md links to {target}"


def test_every_folder_of_experiments_is_a_command_and_stands_on_the_first_page():
    folders = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/README.md"))
    assert folders == EXPERIMENTS
    page = (ROOT / "experiments" / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(\w+)\]\(\1/README.md\)", page, re.MULTILINE)) == EXPERIMENTS


# --- Fig. 3 ---


def test_layers_get_the_papers_names():
    index = [0, 2, 5, 7, 10, 12, 14]
    layers = [*(f"features.{i}" for i in index), "classifier.1", "classifier.4"]
    table = pd.DataFrame({"layer": layers, "layer_index": range(len(layers))})
    assert fig3.in_the_papers_terms(table).layer.tolist() == [
        "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3", "fc6", "fc7",
    ]  # fmt: skip
    other = pd.DataFrame({"layer": ["features.0", "features.3.squeeze"], "layer_index": [0, 1]})
    assert fig3.in_the_papers_terms(other).layer.tolist() == other.layer.tolist()


def made(seed=0):
    """ρ of two layers and resamples of their means."""
    rng = np.random.default_rng(seed)
    common = {"criterion": "all", "estimator": "a"}
    rho, drawn = [], []
    for index, layer in enumerate(("conv1_1", "conv1_2", "conv2_1", "fc6")):
        rho += [{**common, "layer": layer, "layer_index": index, "rho": r, "dead": False} for r in rng.random(6)]
        drawn += [
            {**common, "layer": layer, "layer_index": index, "resample": i, "mean": m}
            for i, m in enumerate(rng.random(5))
        ]
    return pd.DataFrame(rho), pd.DataFrame(drawn)


def test_errors_are_over_images_where_they_were_drawn_again_and_over_neurons_elsewhere():
    rho, drawn = made()
    rho.loc[0, ["rho", "dead"]] = [np.nan, True]
    layers = fig3.by_layer(rho, drawn[drawn.layer != "fc6"]).set_index("layer")
    assert layers.loc["conv1_1", ["neurons", "dead"]].tolist() == [5, 1]
    assert layers.error["conv1_2"] == pytest.approx(drawn[drawn.layer == "conv1_2"]["mean"].std())
    assert layers.error["fc6"] == pytest.approx(rho[rho.layer == "fc6"].rho.std() / 6**0.5)
    assert layers.error_over.tolist() == ["images"] * 3 + ["neurons"]


def test_the_error_over_layers_is_of_their_mean_in_each_resample():
    rho, drawn = made()
    found = fig3.over_layers(fig3.by_layer(rho, drawn), drawn).set_index("where")
    both = drawn[drawn.layer.isin(["conv1_2", "conv2_1"])].groupby("resample")["mean"].mean()
    assert found.error["conv"] == pytest.approx(both.std())
    assert found["mean"]["conv"] == pytest.approx(rho[rho.layer.isin(["conv1_2", "conv2_1"])].rho.mean())
    assert "| small VGG, digits | all" in fig3.summary(
        pd.concat([found.reset_index().assign(estimator=name, network="digits") for name in fig3.ESTIMATORS])
    )


def test_the_figure_is_over_the_neurons_that_are_live_under_all_estimators():
    """The digits' dense layers: a neuron that never fires has a low ρ under S_a, and none under S_a+-."""
    rho, drawn = made()
    rho = rho.assign(neuron=list(range(6)) * 4)
    other = rho.assign(estimator="a_plus_minus")
    other.loc[(other.layer == "fc6") & (other.neuron < 2), ["rho", "dead"]] = [np.nan, True]
    rho.loc[(rho.layer == "fc6") & (rho.neuron < 2), "rho"] = -1.0
    both = pd.concat([rho, other], ignore_index=True)
    layers = fig3.compared_by_layer(both, drawn).set_index(["estimator", "layer"])
    pair = rho[(rho.layer == "fc6") & (rho.neuron >= 2)].rho
    assert layers["mean"]["a", "fc6"] == layers["mean"]["a_plus_minus", "fc6"] == pytest.approx(pair.mean())
    assert layers[["neurons", "dead", "left_out"]].loc[("a", "fc6")].tolist() == [4, 0, 2]
    assert layers[["neurons", "dead", "left_out"]].loc[("a_plus_minus", "fc6")].tolist() == [4, 2, 0]
    assert (layers.left_out.drop(("a", "fc6")) == 0).all()
    # And beside what was changed.
    changed = fig3.beside_usual(rho, other.assign(changed=fig3.OWN))
    assert changed.set_index("where")["mean"]["dense"].tolist() == pytest.approx([pair.mean()] * 2)


def test_some_neurons_for_a_layer_add_the_error_of_their_draw():
    rho, drawn = made()
    some = rho.groupby("layer").head(2).assign(criterion="positive")
    layers = fig3.by_layer(pd.concat([rho, some]), drawn.assign(criterion="positive"))
    of_draw = layers.set_index(["criterion", "layer"]).error_of_draw
    assert (of_draw["all"] == 0).all()
    pair = some[some.layer == "conv1_2"].rho
    assert of_draw["positive", "conv1_2"] == pytest.approx((pair.var() / 2 * (1 - 2 / 6)) ** 0.5)
    both = drawn[drawn.layer.isin(["conv1_2", "conv2_1"])].groupby("resample")["mean"].mean().std()
    choice = of_draw["positive"][["conv1_2", "conv2_1"]]
    found = fig3.over_layers(layers, drawn.assign(criterion="positive")).set_index(["criterion", "where"]).error
    assert found["positive", "conv"] == pytest.approx((both**2 + (choice**2).sum() / 4) ** 0.5)


def test_what_was_changed_stands_beside_the_usual():
    rho, drawn = made()
    usual = fig3.over_layers(fig3.by_layer(rho, drawn), drawn).assign(network="digits")
    usual = pd.concat([usual.assign(estimator=name) for name in fig3.ESTIMATORS])
    own = fig3.over_changed(rho.assign(estimator="own_means", changed=fig3.OWN))
    assert own.set_index("where")["mean"]["conv"] == pytest.approx(
        rho[rho.layer.isin(["conv1_2", "conv2_1"])].rho.mean()
    )
    lines = fig3.findings(own.assign(network="digits"), usual).splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["conv", "dense"]
    conv = f"{own.set_index('where')['mean']['conv']:.2f}"
    assert [cell.strip() for cell in lines[2].split("|")[4:-1]] == [f"{conv} / {conv}", "–", "–", "–", conv]


def test_about_each_regimes_own_means_nothing_is_left_where_a_neuron_fires():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double().requires_grad_(False)
    x = torch.randn(3000, 5).double() @ torch.randn(5, 5).double() + 0.5
    moments, firing = Collector(layer, gram=False), FiringCollector(layer, torch.arange(4))
    for collector in (moments, firing):
        collector.add(x, layer(x))
    pattern = OwnMeans().fit(layer.weight, moments.moments(), torch.Generator())
    fired = x[layer(x)[:, 1] > 0]
    u = fired @ layer.weight[1]
    covariance = (fired - fired.mean(0)).T @ (u - u.mean()) / len(u)
    torch.testing.assert_close(pattern.positive[1], covariance / u.var(correction=0))
    values, _ = firing_rho(firing.moments(), firing.moments(), layer.weight, pattern, 1e-8)
    torch.testing.assert_close(values, torch.ones(4).double(), rtol=0, atol=1e-4)


# --- Fig. 4a ---


def test_methods_are_compared_image_by_image():
    rng = np.random.default_rng(0)
    base = rng.normal(size=40)
    tables = [("a_plus_minus", "pattern_attribution", base), ("none", "gradient", base - 0.1), ("x", "lrp_z", base[:9])]
    areas = pd.concat(
        pd.DataFrame({"estimator": e, "method": m, "image": range(len(area)), "area": area}) for e, m, area in tables
    )
    ranked = fig4a.ranking(areas).set_index("method")
    gradient = ranked.loc["gradient"]
    # The spread over images is large, and that of the difference nothing.
    assert gradient.area_high - gradient.area_low > 0.3
    assert [gradient.difference, gradient.difference_low, gradient.difference_high] == pytest.approx([-0.1] * 3)
    assert ranked.images["S_x (LRP z-rule, input × gradient)"] == 9
    assert "PatternAttribution, S_a+-" in fig4a.table(fig4a.ranking(areas))


def test_the_papers_order_is_asked_step_by_step(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    who = [("none", "random_order"), *((e, "pattern_attribution") for e in ("a", "w")), ("x", "lrp_z")]
    who.append(("a_plus_minus", "pattern_attribution"))
    base = rng.normal(size=40)
    areas = pd.concat(
        pd.DataFrame({"estimator": e, "method": f"{m}, blur", "image": range(40), "area": base + 0.1 * place**2})
        for place, (e, m) in enumerate(who)
    )
    found = fig4a.steps(areas)
    assert found.step.tolist() == ["random order < S_a", "S_a < S_w", "S_w < S_x", "S_x < S_a+-"]
    assert found.difference.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert fig4a.steps(areas, sign=-1).high.tolist() == pytest.approx([-0.1, -0.3, -0.5, -0.7])

    monkeypatch.setattr(fig4a, "HERE", tmp_path)
    (tmp_path / "README.md").write_text("<!-- order -->\n<!-- /order -->\n")
    fig4a.keep_order("cifar", {"blurred": areas})
    fig4a.keep_order("digits", {fig4a.USUAL: areas, fig4a.LEAST: areas})
    fig4a.keep_order("cifar", {fig4a.USUAL: areas})
    lines = (tmp_path / "README.md").read_text().splitlines()[3:-1]
    shown = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]
    digits, cifar = fig4a.TITLES["digits"], fig4a.TITLES["cifar"]
    assert [row[:2] for row in shown] == [
        [digits, "as usual"], [digits, "least relevant first"], [cifar, "as usual"], [cifar, "blurred"]
    ]  # fmt: skip
    assert "**+0.100 (+0.100 to +0.100)**" in lines[0]
    assert "**-0.100" in lines[1]


# --- models ---


def test_angles_between_filters_and_patterns(tmp_path):
    torch.manual_seed(0)
    w, a = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    dead = torch.tensor([False, True, False])
    for name, pattern in (("w", w / 7), ("a", a)):
        (tmp_path / name).mkdir()
        tensors = {"features.0/positive": pattern, "features.0/negative": pattern, "features.0/dead": dead}
        write_tensors(tmp_path / name / "patterns.safetensors", tensors, {})
    found = models.angles(tmp_path / "w", tmp_path / "a").degrees.to_numpy()
    expected = [
        np.degrees(np.arccos(np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q)))
        for p, q in ((w[i].flatten().numpy(), a[i].flatten().numpy()) for i in (0, 2))
    ]
    assert found == pytest.approx(expected, abs=1e-3)
    # Beside a third, of those alone that are live there, too.
    third = {"features.0/positive": a, "features.0/negative": a, "features.0/dead": torch.tensor([True, False, False])}
    (tmp_path / "third").mkdir()
    write_tensors(tmp_path / "third" / "patterns.safetensors", third, {})
    beside = models.angles(tmp_path / "w", tmp_path / "a", tmp_path / "third").degrees
    assert beside.tolist() == pytest.approx(expected[1:], abs=1e-3)


def test_a_models_means_are_over_the_neurons_that_are_live_under_all_estimators(tmp_path):
    dead = {"w": [], "a": [1], "a_plus_minus": [1, 4]}
    for place, (name, dies) in enumerate(dead.items()):
        run = make_run(tmp_path / str(place), estimator=name, dead=dies)
        torch.manual_seed(place)
        tensors = {}
        for layer, neurons in LAYERS.items():
            pattern = torch.randn(neurons, 9)
            alone = torch.tensor([neuron in dies for neuron in range(neurons)])
            tensors |= {f"{layer}/positive": pattern, f"{layer}/negative": pattern, f"{layer}/dead": alone}
        write_tensors(run / "patterns.safetensors", tensors, {})
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"accuracy": 0.5}))
    table = models.measured(tmp_path).set_index("layer")
    rows = pd.concat([pd.read_csv(file) for file in tmp_path.glob("*/rho.csv")])
    shared = rows[~rows.neuron.isin([1, 4])].groupby(["layer", "estimator"]).rho.mean()
    for layer in LAYERS:
        assert [table[name][layer] for name in dead] == pytest.approx([shared[layer, name] for name in dead])
        assert table.left_out[layer] == 2


# --- ground truth, scaling ---


def test_estimators_that_were_measured_from_python_are_compared_over_the_same_neurons():
    nan = torch.nan
    rho = {
        "w": {"one": torch.tensor([0.1, 0.2, 0.3, nan]), "two": torch.tensor([0.5, 0.6])},
        "a": {"one": torch.tensor([nan, 0.7, 0.8, nan]), "two": torch.tensor([nan, nan])},
    }
    by_layer, together = over_same_neurons(rho), over_same_neurons(rho, within=())
    for found, two in ((by_layer, [0.5, 0.6]), (together, [nan, nan])):
        assert found["w"]["one"].tolist() == pytest.approx([nan, 0.2, 0.3, nan], nan_ok=True)
        assert found["a"]["one"].tolist() == pytest.approx([nan, 0.7, 0.8, nan], nan_ok=True)
        assert found["w"]["two"].tolist() == pytest.approx(two, nan_ok=True)


def test_where_the_truth_is_known_rho_is_of_the_same_neurons():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval().requires_grad_(False)
    network[0].bias[:3] = torch.tensor([-50.0, 50.0, -50.0])  # never fires, always fires, never fires
    images = torch.randn(60, 6)
    moments = pb.collect_moments(network, [images])
    patterns = {name: pb.fit_patterns(network, moments, name) for name in ("w", "a", "a_plus_minus")}
    dead = patterns["a_plus_minus"]["0"].dead
    assert dead[:3].all()
    found = scoring._rho(network, patterns, moments, moments)
    for name, own in patterns.items():
        layers = pb.evaluate(network, own, moments, moments)
        live = [layers["0"][~dead], layers["2"][~patterns["a_plus_minus"]["2"].dead]]
        assert found[name]["rho_first"] == pytest.approx(float(live[0].mean()))
        assert found[name]["rho_all"] == pytest.approx(float(torch.cat(live).mean()))
    assert found["w"]["rho_first"] != pytest.approx(
        float(pb.evaluate(network, patterns["w"], moments, moments)["0"].mean())
    )


# --- as a reader runs them ---


@pytest.mark.slow
def test_a_sweep_of_an_experiment_runs_and_is_left_alone_when_it_is_complete(cache_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATTERN_BENCH_CACHE", str(cache_dir))
    settings = ["data.limit=200", "model.training.epochs=1", *fig3.NOTHING_ELSE, "estimator=w,a", "criterion=all"]
    folder = jobs.sweep(tmp_path / "sweep", *settings)
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*/rho.csv")}
    assert len(made) == 2
    jobs.sweep(tmp_path / "sweep", *settings)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/rho.csv")} == made
    assert {json.loads(path.read_text())["estimator"] for path in folder.glob("*/summary.json")} == {"w", "a"}
    with pytest.raises(SystemExit):
        jobs.sweep(tmp_path / "wrong", "estimator=none")
    capfd.readouterr()


def test_tables_of_the_experiments_are_guarded_and_read_back(tmp_path):
    from experiments.pages import beside_others

    file = tmp_path / "models.csv"
    first = pd.DataFrame({"model": ["=1+1", "net", "-x"], "rho": [0.123456, -1.5, 2.0]})
    write_csv(file, first, "%.3g")
    assert file.read_text() == "model,rho\n'=1+1,0.123\nnet,-1.5\n'-x,2\n"
    again = beside_others(file, pd.DataFrame({"model": ["=1+1"], "rho": [9.0]}), ["model"])
    assert again.model.tolist() == ["net", "-x", "=1+1"]


def test_no_experiment_writes_a_table_without_the_guard():
    for file in (ROOT / "experiments").rglob("*.py"):
        assert ".to_csv(" not in file.read_text(), file


FILES = {
    "benchmark": ["--weights", "--images"], "fig2_linear": [], "fig3_signal_estimators": ["--photographs", "--cifar"],
    "fig4a_degradation": ["--photographs", "--cifar"], "fig4b_estimators": ["--photographs"],
    "fig5_gallery": ["--photographs"], "ground_truth": [], "loading": ["--images"],
    "models": ["--photographs", "--cifar"], "sanity": ["--photographs", "--squeezenet"],
    "scaling": ["--photographs", "--vgg16"],
}  # fmt: skip
"""What each experiment asks for."""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_what_it_needs(experiment, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiment", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"experiments.{experiment}.__main__").main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "Writes" in said
    for option in FILES.get(experiment, []):
        assert f"{option} " in said
