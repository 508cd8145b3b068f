"""The whole job: through the command line where that matters, in this process elsewhere."""

import json
import math

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision import models

from pattern_bench.commands.report import main as report
from pattern_bench.errors import UserError
from pattern_bench.results.schema import (
    AREA_COLUMNS,
    BOOTSTRAP_COLUMNS,
    DEGRADATION_COLUMNS,
    RHO_COLUMNS,
    SPLIT_COLUMNS,
)

FILES = {
    "rho.csv", "degradation.csv", "areas.csv", "accuracy.json", "splits.csv", "patterns.safetensors", "summary.json",
    "rho.png", "degradation.png", "explanations.png", "config.yaml",
}  # fmt: skip
SMALL = ["data.limit=300", "model.training.epochs=4", "degradation.images=8"]


def read(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_default_job_through_the_command_line(command, tmp_path):
    done = command("estimator=a_plus_minus")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert {path.name for path in folder.iterdir()} >= FILES | {".hydra", "wandb"}
    titles = [
        "prepare data and model", "accuracy", "fit patterns on the first half", "fit v on the second half",
        "moments of the validation", "ρ(S) of every neuron", "explain validation images", "image degradation",
    ]  # fmt: skip
    places = [done.stderr.index(title) for title in titles]
    assert places == sorted(places)

    rho = pd.read_csv(folder / "rho.csv")
    assert tuple(rho.columns) == RHO_COLUMNS
    assert rho.groupby("layer_index").size().tolist() == [16, 16, 32, 32, 64, 10]
    assert rho.rho.isna().equals(rho.dead)
    assert rho.rho.dropna().between(-0.01, 1.1).all()
    summary = read(folder)
    assert summary["accuracy"] >= 0.97
    assert summary["rho"]["all"]["mean"] == pytest.approx(rho.rho.mean())
    assert summary["rho"]["layers"][0]["median"] == pytest.approx(rho.rho[rho.layer_index == 0].median())
    assert json.loads((folder / "accuracy.json").read_text())["top1"] == summary["accuracy"]

    splits = pd.read_csv(folder / "splits.csv")
    assert tuple(splits.columns) == SPLIT_COLUMNS
    assert sorted(splits["index"]) == list(range(1797))
    degradation = pd.read_csv(folder / "degradation.csv")
    assert tuple(degradation.columns) == DEGRADATION_COLUMNS
    assert set(degradation.method) == {"pattern_attribution", "random_order"}
    assert degradation.groupby("method").step.max().tolist() == [16, 16]
    areas = pd.read_csv(folder / "areas.csv")
    assert tuple(areas.columns) == AREA_COLUMNS
    assert set(areas.image) <= set(splits[splits.split == "validation"].name)
    for method, curve in degradation.groupby("method"):
        area = (curve.probability_mean.iloc[0] - curve.probability_mean).mean()
        assert summary["area_over_curve"][method] == pytest.approx(area)
        each = areas[areas.method == method]
        assert len(each) == each.image.nunique() == int(curve.n.iloc[0])
        assert each.area.mean() == pytest.approx(area)
        # When every patch is replaced, the order no longer matters.
    last = degradation[degradation.step == 16].probability_mean
    assert last.max() - last.min() < 1e-5

    with safe_open(folder / "patterns.safetensors", "pt") as file:
        assert file.metadata()["estimator"] == "a_plus_minus"
        assert file.get_tensor("features.2/positive").shape == (16, 16, 3, 3)
        assert int(file.get_tensor("features.2/dead").sum()) == rho[rho.layer == "features.2"].dead.sum()
    assert (next((folder / "wandb").glob("offline-run-*"))).is_dir()


@pytest.mark.slow
def test_a_sweep_and_its_report(command, tmp_path):
    done = command("-m", "estimator=random,x,w,a,a_plus_minus", "logger=none", "seed=3", *SMALL)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "runs").glob("*/*-sweep")
    folders = [path for path in sweep.iterdir() if path.is_dir()]
    assert {path.name.split("-", 2)[2] for path in folders if (path / "summary.json").is_file()} == {
        "random", "x", "w", "a", "a_plus_minus",
    }  # fmt: skip
    identity = next(path for path in folders if path.name.endswith("-x"))
    assert pd.read_csv(identity / "rho.csv").rho.isna().all()
    assert "leaves no residual" in read(identity)["skipped"]["rho"]

    done = command(sweep, "--output", tmp_path / "report", module="pattern_bench.report")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "report" / "fig3.csv")
    assert len(table) == 6 * 5
    rho = pd.concat([pd.read_csv(path / "rho.csv") for path in folders], ignore_index=True)
    # Over the neurons that are live under all four that have a ρ.
    live = rho.groupby(["layer", "neuron"]).rho.transform("count") == 4
    for row in table.itertuples():
        cell = rho[(rho.layer == row.layer) & (rho.estimator == row.estimator)]
        mean = cell.rho[live.loc[cell.index]].mean()
        assert (row.mean == pytest.approx(mean)) or (math.isnan(row.mean) and row.estimator == "x")
        assert row.neurons == len(cell)
    curves = pd.read_csv(tmp_path / "report" / "fig4a.csv")
    assert curves.columns.tolist() == ["model", "data", "step", "random", "x", "w", "a", "a_plus_minus", "random order"]
    for path in folders:
        summary = read(path)
        area = next(v for k, v in summary["area_over_curve"].items() if k != "random_order")
        assert curves[summary["estimator"]].iloc[-1] == pytest.approx(area)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    figures = {f"{stem}.{end}" for stem in ("fig3", "fig4a") for end in ("csv", "md", "tex", "png")}
    assert names == {*figures, "index.html", "missing.csv", "conflicts.csv"}
    assert "\\toprule" in (tmp_path / "report" / "fig3.tex").read_text()


def test_runs_repeat_to_the_bit(run_job):
    one, two = (run_job(*SMALL) for _ in range(2))
    assert (one / "rho.csv").read_bytes() == (two / "rho.csv").read_bytes()
    assert (one / "degradation.csv").read_bytes() == (two / "degradation.csv").read_bytes()


def test_another_estimator_reuses_the_moments(run_job, monkeypatch):
    run_job(*SMALL, "estimator=a", "seed=4")

    def compute(*_):
        raise AssertionError("computed moments that were in the cache")

    monkeypatch.setattr("pattern_bench.pipeline.moments.MomentStream", compute)
    run_job(*SMALL, "estimator=w", "seed=4", "layer=features.*")
    with pytest.raises(AssertionError, match="computed moments"):
        run_job(*SMALL, "estimator=w", "seed=4", "data.limit=299")


def test_moments_from_the_cache_equal_fresh_ones(run_job, tmp_path):
    cached = run_job(*SMALL)
    fresh = run_job(*SMALL, f"cache.dir={tmp_path / 'elsewhere'}")
    assert (cached / "rho.csv").read_bytes() == (fresh / "rho.csv").read_bytes()


def test_a_damaged_cache_entry_is_computed_again(run_job, tmp_path, caplog):
    where = f"cache.dir={tmp_path / 'cache'}"
    first = run_job(*SMALL, where)
    for file in (tmp_path / "cache" / "moments").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    again = run_job(*SMALL, where)
    assert "is damaged" in caplog.text
    assert (first / "rho.csv").read_bytes() == (again / "rho.csv").read_bytes()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(run_job, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = run_job(*SMALL, f"cache.dir={tmp_path / 'file' / 'cache'}")
    assert "cannot be written" in caplog.text
    assert (folder / "summary.json").is_file()


def test_a_run_that_failed_is_not_taken_for_complete(configure, run_job, tmp_path):
    from pattern_bench.pipeline.job import run

    folder = run_job(*SMALL)
    assert (folder / "summary.json").is_file()
    with pytest.raises(UserError):
        run(configure(*SMALL, "layer=none.such"), folder)
    assert not (folder / "summary.json").exists()


def test_one_layer_is_measured_alone_and_the_network_not_explained(run_job):
    every, one = run_job(*SMALL), run_job(*SMALL, "layer=features.2")
    table = pd.read_csv(one / "rho.csv")
    assert table.layer.unique().tolist() == ["features.2"]
    assert table.layer_index.unique().tolist() == [1]
    whole = pd.read_csv(every / "rho.csv")
    pd.testing.assert_frame_equal(table, whole[whole.layer == "features.2"].reset_index(drop=True))
    assert "selects 1 of 6 layers" in read(one)["skipped"]["degrade"]
    assert pd.read_csv(one / "degradation.csv").empty


def test_the_criterion_is_named_in_the_results_and_changes_them(run_job):
    tables = {c: pd.read_csv(run_job(*SMALL, f"criterion={c}") / "rho.csv") for c in ("all", "rectified")}
    for criterion, table in tables.items():
        assert set(table.criterion) == {criterion}
    assert (tables["all"].rho - tables["rectified"].rho).abs().mean() > 0.01


@pytest.mark.slow
def test_every_method_has_its_curve_in_one_figure(run_job, tmp_path):
    """Pattern-free methods stand under estimator none; what differs from the paper's protocol is in the name."""
    few = [*SMALL, "degradation.images=4", "explanation.images=2"]
    folders = [run_job(*few, f"method={name}") for name in ("gradient", "guided_backprop", "pattern_net")]
    folders.append(run_job(*few, "method=lrp_z", "degradation.order=least", "degradation.replacement=blur"))
    table = pd.concat([pd.read_csv(folder / "degradation.csv") for folder in folders])
    assert set(zip(table.estimator, table.method, strict=True)) == {
        ("none", "gradient"), ("none", "guided_backprop"), ("a_plus_minus", "pattern_net"),
        ("none", "lrp_z, least relevant first, blur"), ("none", "random_order"), ("none", "random_order, blur"),
    }  # fmt: skip
    assert read(folders[0])["method"] == "gradient"
    for name, (low, high) in read(folders[0])["area_over_curve_interval"].items():
        assert low <= read(folders[0])["area_over_curve"][name] <= high
    report([*map(str, folders), "--output", str(tmp_path / "report")])
    table = pd.read_csv(tmp_path / "report" / "fig4a.csv", index_col="step")
    assert table.shape[1] == 2 + 6
    low, high = read(folders[0])["area_over_curve_interval"]["gradient"]
    assert table.loc["area over the curve, 95 % from", "gradient"] == pytest.approx(low)
    assert table.loc["area over the curve, 95 % to", "gradient"] == pytest.approx(high)
    assert "lrp_z, least relevant first, blur" in table.columns


def test_a_method_without_patterns_explains_with_some_layers(run_job):
    folder = run_job(*SMALL, "layer=features.0", "method=gradient")
    assert read(folder)["skipped"] == {}


@pytest.mark.slow
def test_the_toy_example_finds_the_signal(run_job):
    toy = ["data=toy", "data.samples=50000", "model.training.epochs=3"]
    angles = {name: read(run_job(*toy, f"estimator={name}"))["signal_angle_degrees"] for name in ("a", "w")}
    assert angles["a"]["pattern"] < 2
    assert angles["w"]["pattern"] == pytest.approx(45, abs=2)
    assert angles["a"]["filter"] == pytest.approx(45, abs=2)


@pytest.mark.slow
def test_photographs_through_a_torchvision_model(run_job, photographs, tmp_path):
    """A labelled folder with more classes than the model has outputs, one file cut short."""
    root = photographs(tmp_path / "images", count=30)
    for name in ("class0/0.jpg", "class0/3.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:80])
    state = models.squeezenet1_1().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    common = ["data=folder", f"data.root={root}", "data.workers=0", "layer=all", "degradation.steps=3"]
    common += ["explanation.images=2", "degradation.images=3"]
    folder = run_job(*common, "model=squeezenet1_1", f"model.weights={tmp_path / 'w.safetensors'}")
    summary = read(folder)
    assert summary["patch"] == 9
    assert summary["unreadable"] == ["class0/0.jpg", "class0/3.jpg"]
    splits = pd.read_csv(folder / "splits.csv")
    assert sorted(splits[~splits.used].name) == summary["unreadable"]
    assert "3 classes" in summary["skipped"]["accuracy"]
    # The count of unreadable images survives the cache.
    again = run_job(*common, "model=squeezenet1_1", f"model.weights={tmp_path / 'w.safetensors'}")
    assert read(again)["unreadable"] == summary["unreadable"]


@pytest.mark.slow
def test_conv_layers_alone_skip_what_needs_a_classifier(run_job, photographs, tmp_path):
    root = photographs(tmp_path / "images", classes=0)
    folder = run_job(
        "data=folder", f"data.root={root}", "data.size=32", "data.workers=0",
        "model=vgg16_features", "model.architecture=vgg11", "model.weights=null", "layer=features.0",
    )  # fmt: skip
    assert set(read(folder)["skipped"]) == {"accuracy", "explain", "degrade"}
    assert "no classifier" in read(folder)["skipped"]["explain"]


def test_a_model_of_the_users_own_runs(run_job):
    """Batch norm, residual sums and a functional ReLU, on greyscale digits."""
    own = ["model=imported", "model.path=helpers.own_network.Residual", "allow_any_target=true"]
    folder = run_job(*own, "data.limit=200", "degradation.images=4")
    summary = read(folder)
    assert summary["rho"]["all"]["neurons"] == 6 + 6 + 6 + 10
    assert summary["skipped"] == {}


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_other_loggers_get_the_same_figures(run_job, kind):
    folder = run_job(*SMALL, f"logger={kind}")
    if kind == "csv":
        metrics = pd.read_csv(folder / "csv" / "metrics.csv")
        assert metrics["rho/features.0/mean"].dropna().iloc[0] == pytest.approx(
            read(folder)["rho"]["layers"][0]["mean"]
        )
        assert metrics["degradation/pattern_attribution"].notna().sum() == 17
    else:
        assert list((folder / "tensorboard").glob("events*"))


WRONG = [
    (["estimator=b"], "Could not find 'estimator/b'"),
    (["model=vgg17"], "Could not find 'model/vgg17'"),
    (["data=mnist"], "Could not find 'data/mnist'"),
    (["colour=red"], "Could not override 'colour'"),
    (["data=folder"], "data.root has no value"),
    (["hydra.run.dir=/dev/null/x"], "cannot use /dev/null/x"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_mistakes_on_the_command_line_get_one_message(command, overrides, message):
    done = command(*overrides)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_users_mistake_inside_the_job_shows_no_traceback(command):
    done = command("layer=features.9", "logger=none")
    assert done.returncode == 1
    assert "error: layer=features.9 matches no layer of the model: did you mean features." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=folder", "data.root=/no/such"], "data.root=/no/such is not a folder"),
        (["data=folder", "data.root={empty}"], "holds no image"),
        (["degradation.patch=9"], "more than the 0 whole patches"),
        (["degradation.steps=17"], "degradation.steps=17 is more than the 16 whole patches"),
        (["degradation.images=0"], "degradation.images=0 is not possible"),
        (["data.batch_size=0"], "data.batch_size=0 is not possible"),
        (["seed=some"], "seed=some is not possible"),
        (["seed=4294967296"], "seed=4294967296 is too large"),
        (["data.limit=many"], "data.limit=many is not possible"),
        (["data.fit=half"], "data.fit=half is not possible"),
        (["moments.memory_gib=0"], "moments.memory_gib=0 is not possible"),
        (["criterion=some"], "criterion=some is unknown"),
        (["probe.regularisation=-1"], "probe.regularisation=-1 is not possible"),
        (["method=pattern_net", "estimator=x"], "method=pattern_net needs patterns, and estimator=x has none"),
        (["method=pattern_net", "method.last_layer=none"], "last_layer=none is not possible"),
        (["method=smoothgrad", "method.samples=0"], "samples=0 is not possible"),
        (["degradation.order=worst"], "degradation.order=worst is unknown"),
        (["degradation.replacement=noise"], "degradation.replacement=noise is unknown"),
        (["degradation.value=white"], "degradation.value=white is no number"),
        (["criterion=positive", "probe.neurons=0"], "probe.neurons=0 is not possible"),
        (["probe=sgd", "probe.steps=0"], "probe.steps=0 is not possible"),
        (["probe=sgd", "probe.learning_rate=fast"], "probe.learning_rate=fast is not possible"),
        (["moments.positions=2"], "moments.positions=2 is no share"),
        (["moments.positions=0"], "moments.positions=0 is not possible"),
        (["bootstrap.resamples=1"], "bootstrap.resamples=1 has no spread"),
        (["bootstrap.resamples=5", "bootstrap.chunks=1"], "bootstrap.chunks=1 is not possible"),
        (["bootstrap.resamples=5", "data.limit=50"], "bootstrap.chunks=20 is more than the 10 images"),
        (["bootstrap.resamples=5", "probe=sgd"], "bootstrap.resamples needs the closed form"),
        (["bootstrap.resamples=5", "cache.dir=/proc/none"], "cannot be written"),
        (["model=resnet18", "model.weights=null"], "model=resnet18 cannot take data=digits"),
        (["data=folder", "data.root={flat}"], "is trained on class labels"),
        (["data=folder", "data.root={bad}", "model=alexnet", "model.weights=null"], "none of the 5 images"),
        (["data=folder", "data.root={bad}", "data.strict=true", "model=alexnet", "model.weights=null"], "data.strict"),
    ],
)
def test_mistakes_are_found_before_long_work(run_job, photographs, tmp_path, overrides, message):
    (tmp_path / "empty").mkdir()
    photographs(tmp_path / "flat", classes=0)
    for file in photographs(tmp_path / "bad").rglob("*.jpg"):
        file.write_bytes(b"no image")
    places = {name: str(tmp_path / name) for name in ("empty", "flat", "bad")}
    with pytest.raises(UserError, match=message):
        run_job(*[override.format(**places) if "root" in override else override for override in overrides])


def test_report_refuses_what_is_no_run(tmp_path, capsys):
    for folder, message in ((tmp_path / "no", "is not a folder"), (tmp_path, "holds no complete run")):
        with pytest.raises(SystemExit, match=message):
            report([str(folder)])


def test_a_later_run_replaces_an_earlier_one_in_the_report(run_job, tmp_path, capsys):
    run_job(*SMALL, "layer=features.0", "seed=1")
    last = run_job(*SMALL, "layer=features.0", "seed=2")
    report([str(tmp_path), "--output", str(tmp_path / "report")])
    assert "1 cell and 0 curves of earlier runs replaced" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "report" / "fig3.csv")
    assert table["mean"].tolist() == [pytest.approx(read(last)["rho"]["all"]["mean"])]
    assert not torch.isnan(torch.tensor(table["mean"])).any()


@pytest.mark.slow
def test_images_drawn_again_give_standard_errors(run_job, tmp_path):
    """The chunks add up to the run without them; the errors are the resamples' spread, in figure and report too."""
    few = [*SMALL, "layer=features.*", "estimator=w"]
    plain, drawn = run_job(*few), run_job(*few, "bootstrap.resamples=6", "bootstrap.chunks=5")
    rho = [pd.read_csv(folder / "rho.csv").rho for folder in (plain, drawn)]
    pd.testing.assert_series_equal(*rho, rtol=0, atol=1e-5)
    assert not (plain / "bootstrap.csv").exists()
    table = pd.read_csv(drawn / "bootstrap.csv")
    assert tuple(table.columns) == BOOTSTRAP_COLUMNS
    assert table.groupby("layer").size().tolist() == [6] * 4
    for layer in read(drawn)["rho"]["layers"]:
        mine = table[table.layer == layer["layer"]]
        assert layer["standard_error"]["mean"] == pytest.approx(mine["mean"].std())
        assert layer["standard_error"]["median"] > 0
        # Around the estimate from all images, not somewhere else.
        assert abs(mine["mean"].mean() - layer["mean"]) < 4 * mine["mean"].std() + 0.02
    report([str(drawn), "--output", str(tmp_path / "report")])
    shown = pd.read_csv(tmp_path / "report" / "fig3.csv")
    assert shown["standard_error_mean"].tolist() == pytest.approx(table.groupby("layer")["mean"].std().tolist())
    # A later run without them, whose numbers are the same, keeps them; one of other numbers takes their place.
    report([str(drawn), str(run_job(*few)), "--output", str(tmp_path / "report")])
    assert pd.read_csv(tmp_path / "report" / "fig3.csv").standard_error_mean.notna().all()
    report([str(drawn), str(run_job(*few, "seed=5")), "--output", str(tmp_path / "report")])
    assert "standard_error_mean" not in pd.read_csv(tmp_path / "report" / "fig3.csv")


def test_a_resample_is_what_repeating_its_images_gives():
    """Drawn chunk by chunk from kept sums, against a pass over the images so repeated."""
    from pattern_bench.core.collector import Collector
    from pattern_bench.pipeline import bootstrap

    layer = torch.nn.Conv2d(2, 3, 3).double().requires_grad_(False)
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64)

    def sums(images):
        collector = Collector(layer, True)
        collector.add(images, layer(images))
        return collector.moments()

    drawn = bootstrap._drawn([sums(part) for part in x.split(2)], torch.Generator().manual_seed(1))
    chosen = torch.randint(4, (4,), generator=torch.Generator().manual_seed(1))
    assert len(set(chosen.tolist())) < 4
    expected = sums(torch.cat([x.split(2)[i] for i in chosen]))
    for name, value in expected.tensors().items():
        torch.testing.assert_close(getattr(drawn, name), value, rtol=1e-10, atol=1e-10)


def test_sampled_positions_are_near_the_exact_ones(run_job, monkeypatch):
    """And are another entry of the cache."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 8)
    few = [*SMALL, "layer=features.0", "estimator=a", "criterion=rectified"]
    exact, sampled, again = (
        pd.read_csv(run_job(*few, *more) / "rho.csv").rho
        for more in ([], ["moments.positions=0.5"], ["moments.positions=0.5"])
    )
    pd.testing.assert_series_equal(sampled, again)
    assert 0 < (exact - sampled).abs().mean() < 0.1


def test_a_disk_that_fills_up_costs_the_cache_entry_or_names_the_file(
    run_job, configure, tmp_path, monkeypatch, caplog
):
    """safetensors fails as on a full disk: the cache warns once, the run names the file that it cannot write."""
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("pattern_bench.storage.tensor_files.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run_job(*SMALL, f"cache.dir={tmp_path / 'cache'}")
    assert caught.value.filename.endswith("patterns.safetensors")
    # Once of the cache, and once of the state of a run that is interrupted.
    assert caplog.text.count("cannot be written") == 2
