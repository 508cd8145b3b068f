"""What a seed governs: the same one gives the same results to the bit, another one other draws."""

import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch import nn

from pattern_bench.configuration.build import build
from pattern_bench.configuration.location import CONF
from pattern_bench.data.splits import GlobalBatches, make_splits
from pattern_bench.engine.checkpoints import every_epoch
from pattern_bench.engine.probe_descent import ReaderDescent
from pattern_bench.engine.progress import StageProgress
from pattern_bench.engine.training import Learner
from pattern_bench.models import small
from pattern_bench.models.base import Training
from pattern_bench.pipeline import explain as explain_stage
from pattern_bench.pipeline import setup as setup_stage
from pattern_bench.pipeline.degrade import area_intervals, degrade
from pattern_bench.pipeline.job import check, run
from pattern_bench.pipeline.machine import Machine
from pattern_bench.pipeline.methods import build_method
from pattern_bench.pipeline.moments import all_samples, collect
from pattern_bench.pipeline.patterns import fit_pattern

SMALL = ["data.limit=200", "data.workers=0", "model.training.epochs=2", "degradation.images=6", "explanation.images=2"]


@pytest.fixture
def results(configure, tmp_path, monkeypatch):
    """Runs a job that trains its model anew; returns all that a seed may have a part in, by name.

    In an ``agitated`` run every stage begins with the generators of the process at another place, as it does in a run
    that is taken up."""

    def start(name, *overrides, agitated=False):
        folder, seen = tmp_path / name, {}
        folder.mkdir(exist_ok=True)
        explain, begin = explain_stage.explain, StageProgress.run

        def kept(*arguments):
            rows, visited = explain(*arguments)
            seen.update({name: rows[name] for name in rows if name == "images" or name.startswith("explanation/")})
            return rows, visited

        def elsewhere(*arguments):
            torch.manual_seed(random.randrange(2**32))
            random.seed(torch.initial_seed())
            np.random.seed(torch.initial_seed() % 2**32)  # noqa: NPY002
            return begin(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(explain_stage, "explain", kept)
            if agitated:
                patch.setattr(StageProgress, "run", elsewhere)
            run(configure(*SMALL, *overrides, f"cache.dir={folder / 'cache'}"), folder)
        (trained,) = (folder / "cache" / "models").glob("*.safetensors")
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".csv"}
        assert {"rho.csv", "degradation.csv", "splits.csv"} <= files.keys()
        weights = {f"model/{key}": tensor for key, tensor in load_file(trained).items()}
        return files | seen | weights | load_file(folder / "patterns.safetensors")

    return start


class Interrupted(BaseException):
    """Ends training as nothing that the package catches does."""


def differing(one, other):
    """Names of what is not the same to the bit."""
    assert one.keys() == other.keys()

    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [name for name in one if not same(one[name], other[name])]


@pytest.mark.parametrize(
    "job",
    [
        ["estimator=random", "method=smoothgrad", "method.samples=4", "data.workers=2"],
        ["moments.positions=0.5", "method=prediction_difference", "method.samples=3"],
        pytest.param(["probe=sgd", "probe.steps=25", "estimator=a", "degradation.replacement=blur"],
                     marks=pytest.mark.slow),
        ["bootstrap.resamples=3", "bootstrap.chunks=4", "method=prediction_difference", "method.sampling=conditional",
         "method.samples=2", "method.patches=200", "method.stride=2", "method.window=2"],
    ],
    ids=["random directions, SmoothGrad", "sampled positions, marginal", "descent", "bootstrap, conditional"],
)  # fmt: skip
def test_the_same_seed_gives_the_same_to_the_bit(results, job, monkeypatch):
    """Whatever else draws, and whoever decodes the images."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 8)
    one = results("one", *job, "seed=3", "data.workers=0")
    two = results("two", *job, "seed=3", agitated=True)
    assert differing(one, two) == []
    assert len(one) > 30


def test_descent_that_is_taken_up_meets_the_batches_it_would_have(results, monkeypatch):
    """Also where other processes read them ahead."""
    job = ["probe=sgd", "probe.steps=30", "data.batch_size=16", "data.workers=1", "layer=features.*"]
    one = results("one", *job)
    step = ReaderDescent.training_step

    def cut_short(self, batch, index):
        if self.global_step == 17:
            raise Interrupted
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(ReaderDescent, "training_step", cut_short)
        with pytest.raises(Interrupted):
            results("two", *job)
    assert differing(one, results("two", *job)) == []


def test_another_seed_gives_another_of_everything_that_is_drawn(results):
    """The names of images alone do not tell: what a neuron's bias is, and which images are explained, differ too."""
    one, two = (results(name, "estimator=random", f"seed={seed}") for name, seed in (("one", 0), ("two", 1)))
    same = set(one) - set(differing(one, two))
    assert all(name.endswith("/dead") for name in same)


@pytest.fixture
def prepared(configure, tmp_path):
    """Everything a stage needs, for these settings; and a bar."""
    with StageProgress().run("prepare", "prepare") as bar:

        def prepare(*overrides):
            cfg = configure(*SMALL, f"cache.dir={tmp_path / 'cache'}", "moments.positions=0.5", *overrides)
            return setup_stage.prepare(cfg, machine(cfg), bar, check)

        def machine(cfg, folder=tmp_path):
            return Machine.from_settings(cfg, folder)

        prepare.bar, prepare.machine = bar, machine
        yield prepare


def drawn(what, setup, machine, bar):
    """What is drawn for one purpose, of the splits and the network of ``setup`` and with the seed of its settings."""
    images = setup.splits["validation"].batch(range(3)).images
    if what == "random directions":
        return fit_pattern(setup, "features.2", None).positive
    if what == "sampled positions":
        return collect(setup, machine, "fit", all_samples(setup, gram=False), bar)[0]["features.0"].xg
    if what in ("smoothgrad", "prediction_difference"):
        return build_method(setup, machine.device, {}).attribute(images, torch.tensor([1, 2, 3]))
    if what == "random patch order":
        return degrade(setup, machine, {}, bar)[0]["random_order"]
    if what == "intervals":
        areas = {"a": torch.rand(50, generator=torch.Generator().manual_seed(0)).double()}
        return torch.tensor(area_intervals(setup, areas)["a"])
    return torch.tensor(setup.seed("bootstrap 0"))


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("random directions", ["estimator=random"]),
        ("sampled positions", []),
        ("smoothgrad", ["method=smoothgrad", "method.samples=4"]),
        ("prediction_difference", ["method=prediction_difference", "method.samples=3"]),
        ("random patch order", ["method=gradient"]),
        ("intervals", []),
        ("bootstrap", []),
    ],
)
def test_each_draw_has_the_jobs_seed(prepared, configure, what, settings, tmp_path, monkeypatch):
    """With the same splits and network, so that nothing else can make the difference."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 8)
    setup = prepared(*settings)

    def found(seed):
        cfg = configure(*SMALL, f"cache.dir={setup.cfg.cache.dir}", "moments.positions=0.5", *settings, f"seed={seed}")
        again = replace(setup, cfg=cfg, method=build(cfg.method))
        return drawn(what, again, prepared.machine(cfg, tmp_path / str(seed)), prepared.bar)

    one, again, other = found(5), found(5), found(6)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_splits_are_drawn_with_the_seed(configure):
    one, again, other = (
        {name: split.indices for name, split in make_splits(build(configure(*SMALL).data), seed).items()}
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_training_is_drawn_with_the_seed(prepared, monkeypatch):
    """Of the same images."""
    splits = setup_stage.make_splits
    monkeypatch.setattr(setup_stage, "make_splits", lambda source, seed: splits(source, 0))
    one, again, other = (prepared(f"seed={seed}").model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", ["config", "gallery", "sanity"])
@pytest.mark.parametrize("method", ["smoothgrad", "prediction_difference"])
def test_a_methods_seed_is_the_jobs_unless_it_has_its_own(config, method, tmp_path):
    def seed(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(config, ["logger=none", "seed=7", *overrides])
        return build(cfg.method if config == "config" else cfg.methods[method]).keywords["seed"]

    if config == "config":
        assert (seed(f"method={method}"), seed(f"method={method}", "method.seed=3")) == (7, 3)
    else:
        assert (seed(), seed(f"methods.{method}.seed=3")) == (7, 3)


def test_training_takes_batch_norms_statistics_and_drops_out(configure, tmp_path, monkeypatch):
    """And what comes after does neither."""
    norm, drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), drop, nn.ReLU(), nn.Linear(8, 10)
    )
    monkeypatch.setattr(small.VGG, "module", lambda *_: net)
    dropped = []
    drop.register_forward_hook(lambda module, given, out: dropped.append(bool((out == 0).any())))
    # 81 images in batches of 20: the last has one image.
    cfg = configure(*SMALL, "data.limit=101", "model.training.batch_size=20", f"cache.dir={tmp_path / 'cache'}")
    with StageProgress().run("prepare", "prepare") as bar:
        setup = setup_stage.prepare(cfg, Machine.from_settings(cfg, tmp_path), bar, lambda setup: None)
    assert sum(len(setup.splits[name]) for name in ("fit", "probe")) % 20 == 1
    assert int(norm.num_batches_tracked) == 2 * 4
    assert float(norm.running_mean.abs().sum()) > 0
    assert any(dropped)
    assert not net.training
    del dropped[:]
    net(setup.sample[None])
    assert dropped == [False]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_that_is_taken_up_drops_out_what_it_would_have(prepared, tmp_path, workers, monkeypatch):
    """In every epoch, whoever begins it and whatever was drawn before."""
    setup = prepared()

    def trained(name, *cuts):
        """After four epochs, of which some are begun twice."""
        folder = tmp_path / name
        for cut in (*cuts, None):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
            batches = GlobalBatches(len(setup.splits["fit"]), 20, seed=4)
            learner = Learner(model, Training(4, 0.01, 20), False, batches)
            keep, last = every_epoch(folder, "training")
            trainer = prepared.machine(setup.cfg).trainer(None, keep, max_epochs=4)
            torch.manual_seed(random.randrange(2**32))
            step = learner.training_step

            def cut_short(batch, index, cut=cut, trainer=trainer, step=step):
                if (trainer.current_epoch, index) == cut:
                    raise Interrupted
                return step(batch, index)

            monkeypatch.setattr(learner, "training_step", cut_short)
            with contextlib.suppress(Interrupted):
                trainer.fit(learner, setup.splits["fit"].shuffled(batches, workers), ckpt_path=last, weights_only=True)
        assert trainer.current_epoch == 4
        return model.state_dict()

    one, two = trained("one"), trained("two", (1, 2), (3, 0))
    assert all(torch.equal(one[name], two[name]) for name in one)
