"""Faults during a run: the memory, numbers, disks, files and clocks fail, and what the results are then."""

import itertools
import json
import os
import pkgutil
import re
import shutil
import subprocess
import time
import types

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from helpers.brute_force import brute_neuron
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from pattern_bench.configuration.build import build
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.memory import fits
from pattern_bench.core.probe_sgd import Reader
from pattern_bench.data.base import TensorPool
from pattern_bench.data.splits import Batch, GlobalBatches, make_splits
from pattern_bench.engine import micro_batches
from pattern_bench.engine.explanation_streams import AccuracyStream, DegradationStream, ExplanationStream
from pattern_bench.engine.probe_descent import ReaderDescent
from pattern_bench.engine.statistics_streams import MomentStream, ReadingStream
from pattern_bench.engine.training import Learner
from pattern_bench.errors import UserError
from pattern_bench.models.base import Training
from pattern_bench.pipeline import descent, patterns, rho
from pattern_bench.pipeline import moments as moments_stage
from pattern_bench.pipeline.job import run
from pattern_bench.processes.launch import launch

EXACT = {"rtol": 1e-12, "atol": 1e-12}


# --- memory ---


class Tight(nn.Module):
    """Passes its input on, where the memory is large enough for so many images: for ``room`` of them."""

    def __init__(self):
        super().__init__()
        self.room = 1000

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return x


class Net(nn.Module):
    """A layer, a place where the memory may be too small, and a layer that runs on both sides of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, stride=1, padding=1)
        self.tight = Tight()
        self.last = nn.Linear(4 * 6 * 6, 5)
        self.inside = 0
        self.double().requires_grad_(False).eval()

    def forward(self, x):
        self.inside = len(x)  # images whose activations take memory
        try:
            x = self.twice(self.first(x).relu_()).relu_()
            x = self.twice(self.tight(x)).relu_()
            return self.last(x.flatten(1))
        finally:
            self.inside = 0


LAYERS = ["first", "twice", "last"]


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def images():
    return torch.randn(19, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def batches(images, size=8):
    """As a loader yields them; the last is smaller."""
    targets = torch.arange(len(images)) % 5
    for where in torch.arange(len(images)).split(size):
        yield Batch(images[where], targets[where], where, [])


def shown(stream, images, size=8):
    """The stream, after the images."""
    stream.on_predict_start()
    with torch.no_grad():
        for number, batch in enumerate(batches(images, size)):
            stream.predict_step(batch, number)
    return stream


def moments(net, images, gram=True, positions=1.0, layers=LAYERS):
    stream = MomentStream(net, list(layers), gram, 2**30, positions, dict.fromkeys(layers, 3))
    shown(stream, images)
    assert stream.seen.images == len(images)
    return {f"{name}/{key}": t for name, c in stream.watchers.items() for key, t in c.moments().tensors().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def says_so(caplog):
    return [record.args for record in caplog.records if record.name == micro_batches.__name__]


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("room", [7, 4, 1])
def test_moments_are_those_of_a_pass_with_memory_enough(net, images, gram, room, caplog):
    plain = moments(net, images, gram)
    net.tight.room = room
    assert_same(moments(net, images, gram), plain)
    # Once per halving, and no batch after it is tried whole again.
    assert [tuple(said[:2]) for said in says_so(caplog)] == [(8, 4), (4, 2), (2, 1)][: {7: 1, 4: 1, 1: 3}[room]]


def test_moments_without_memory_enough_are_those_of_brute_force(net, images):
    net.tight.room = 3
    found = moments(net, images)
    inputs = {name: [] for name in LAYERS}
    for name in LAYERS:
        net.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].clone()))
    net.tight.room = 1000
    with torch.no_grad():
        net(images)
    for name in LAYERS:
        layer = net.get_submodule(name)
        x = torch.cat(inputs[name])
        for neuron in range(2):
            patch, u, gate = brute_neuron(layer, x, neuron)
            expected = {
                "n": len(patch), "x": patch.sum(0)[None], "g": gate.sum(), "ug": (u * gate).sum(),
                "uun": (u * u * ~gate).sum(), "xg": gate @ patch, "xug": (u * gate) @ patch,
                "xun": (u * ~gate) @ patch, "gram": (patch.T @ patch)[None],
            }  # fmt: skip
            for key, value in expected.items():
                mine = found[f"{name}/{key}"]
                mine = mine if key in ("n", "x", "gram") else mine[neuron]
                torch.testing.assert_close(mine, torch.as_tensor(value).double(), rtol=1e-11, atol=1e-9)


def test_sampled_positions_are_those_of_a_pass_with_memory_enough(net, images, monkeypatch):
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    layers = ["first", "last"]  # a layer that runs twice draws in the order of its calls
    plain = moments(net, images, positions=0.3, layers=layers)
    assert plain["first/n"] == 19 * 36
    net.tight.room = 3
    assert_same(moments(net, images, positions=0.3, layers=layers), plain)


PLACES = [
    "pattern_bench.core.layer_sums.cross_sum",
    "pattern_bench.core.layer_sums.patch_sum",
    "pattern_bench.core.layer_sums.patches",
    "pattern_bench.core.layer_sums.patches_at",
    "pattern_bench.core.layer_sums.pad",
    "pattern_bench.core.gram.cross_sum",
    "pattern_bench.core.layers.Scratch.like",
    "torch.matmul",
]


@pytest.fixture
def failing(monkeypatch):
    """Makes whatever a collector allocates with run out of memory where ``out(images)`` says so."""

    def install(out, places=PLACES):
        def wrap(function):
            def attempt(*arguments, **settings):
                tensor = next(a for a in arguments if isinstance(a, torch.Tensor))
                if out(len(tensor)):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return function(*arguments, **settings)

            return attempt

        for place in places:
            monkeypatch.setattr(place, wrap(pkgutil.resolve_name(place)))

    return install


class AtCall(TorchFunctionMode):
    """Within, memory runs out in one of torch's functions, counted from 1. Those in place take none."""

    def __init__(self, at):
        super().__init__()
        self.calls, self.at = 0, at

    def __torch_function__(self, function, types, arguments=(), settings=None):
        name = getattr(function, "__name__", "")
        in_place = name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))
        if not in_place:
            self.calls += 1
            if self.calls == self.at:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(*arguments, **settings or {})


@pytest.fixture
def at_call(monkeypatch):
    """Lets the attempts of ``place`` run out at one call, counted over all of them; returns what counts."""

    def install(place, at):
        mode = AtCall(at)

        def in_mode(attempt):
            def within():
                with mode:
                    attempt()

            return fits(within)

        monkeypatch.setattr(place, in_mode)
        return mode

    return install


def sums(layer, x, gram, positions, memory=2**30):
    """Of two batches, by a collector; one that has no memory left for an image goes on once it has."""
    collector = Collector(layer, gram, memory, positions, seed=5)
    for part in x.split(-(-len(x) // 2)):
        try:
            collector.add(part, layer(part))
        except torch.OutOfMemoryError:
            collector.finish()
    return collector.moments().tensors()


@pytest.mark.parametrize(
    ("gram", "positions", "small"), [(True, 1.0, 128), (True, 1.0, 1), (False, 1.0, 1), (True, 0.5, 1), (False, 0.5, 1)]
)
def test_a_collector_may_run_out_at_every_call(layer_and_input, gram, positions, small, at_call, monkeypatch):
    """In each sum in turn: in every third of torch's functions, of the many that large patches take every 31st."""
    monkeypatch.setattr("pattern_bench.core.gram.SMALL_PATCH", small)
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    layer, x = layer_and_input
    step = 3 if small > 1 else 31
    plain, mode = sums(layer, x, gram, positions), AtCall(layer.weight.numel() % step - step + 1)
    while mode.at <= mode.calls:
        mode = at_call("pattern_bench.core.collector.fits", mode.at + step)
        assert_same(sums(layer, x, gram, positions), plain)
    assert mode.at > 50


@pytest.mark.parametrize("place", PLACES[:6])
def test_a_collector_halves_until_it_fits(place, failing, monkeypatch):
    """Where only two images have room, in any one of the sums."""
    monkeypatch.setattr("pattern_bench.core.gram.SMALL_PATCH", 4)
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    layer = nn.Conv2d(4, 3, 3, padding=1).double().requires_grad_(False)
    strided = nn.Conv2d(4, 3, 3, padding=1, stride=2, padding_mode="circular").double().requires_grad_(False)
    x = torch.randn(14, 4, 8, 8, dtype=torch.float64) + 0.5
    cases = [(layer, True, 1.0), (strided, True, 1.0), (layer, False, 0.5)]
    plain = [sums(*(case[0], x, *case[1:])) for case in cases]
    met = []

    def out(images):
        met.append(images)
        return images > 2

    failing(out, [place])
    for case, expected in zip(cases, plain, strict=True):
        assert_same(sums(case[0], x, *case[1:]), expected)
    assert max(met) == 7
    assert min(met) <= 2


def test_a_gram_matrix_in_rows_may_run_out_between_them(at_call, monkeypatch):
    """As of a wide dense layer: what its first rows have, they do not get again."""
    monkeypatch.setattr("pattern_bench.core.gram.SMALL_PATCH", 4)
    layer = nn.Linear(40, 2).double().requires_grad_(False)
    x = torch.randn(16, 40, dtype=torch.float64)
    plain, mode = sums(layer, x, True, 1.0, memory=5000), AtCall(0)
    while mode.at <= mode.calls:
        mode = at_call("pattern_bench.core.collector.fits", mode.at + 1)
        assert_same(sums(layer, x, True, 1.0, memory=5000), plain)  # 4 times 4 rows in parts of 4 images
    assert mode.at > 50


@pytest.mark.parametrize(("positions", "layers"), [(1.0, LAYERS), (0.5, ["first", "last"])])
def test_sums_that_fit_only_beside_a_smaller_batch(net, images, failing, positions, layers, monkeypatch, caplog):
    """What a sum takes whatever the images are: a collector halves down to one of them in vain. It finishes once the
    batch's activations are gone, and no image counts twice."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    plain = moments(net, images, positions=positions, layers=layers)
    failing(lambda _: net.inside > 2, PLACES[:1])
    assert_same(moments(net, images, positions=positions, layers=layers), plain)
    assert [tuple(said[:2]) for said in says_so(caplog)] == [(8, 4), (4, 2)]


@pytest.mark.parametrize("place", [None, *(place for place in PLACES if not place.endswith(("pad", "patches_at")))])
def test_a_single_image_that_has_no_room_is_one_error(net, images, failing, place, monkeypatch, caplog):
    monkeypatch.setattr("pattern_bench.core.gram.SMALL_PATCH", 4)
    if place is None:
        net.tight.room = 0
    else:
        failing(lambda _: True, [place])
    with pytest.raises(UserError, match=r"too small for a single image: select fewer layers \(layer\)"):
        moments(net, images)
    assert len(says_so(caplog)) <= 3


def test_the_computers_own_memory_counts_too():
    """For torch's real error on a CPU, which has no type of its own; other errors are passed on."""
    assert not fits(lambda: torch.empty(1 << 58))
    assert fits(lambda: torch.empty(1))
    with pytest.raises(RuntimeError, match="shape"):
        fits(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def patterns_of(net):
    weights = {name: net.get_submodule(name).weight.flatten(1).clone() for name in LAYERS}
    return {name: Pattern(w, w, torch.zeros(len(w), dtype=torch.bool)) for name, w in weights.items()}


def readers_of(net, images, criterion="all"):
    """Calibrated readers with some v."""
    readers = {name: Reader(net.get_submodule(name), p, criterion, 1e-3) for name, p in patterns_of(net).items()}
    module = ReaderDescent(net, readers, 0.01, 10, GlobalBatches(19, 8, 0))
    module.calibrate(images, torch.arange(len(images)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for reader in readers.values():
            reader.coordinates.copy_(torch.randn(reader.coordinates.shape, generator=generator))
    return readers


class Gradient:
    """An explanation; needs autograd, as most do."""

    def __init__(self, net):
        self.net = net

    def attribute(self, inputs, target):
        with torch.enable_grad():
            x = inputs.clone().requires_grad_()
            return torch.autograd.grad(self.net(x).gather(1, target[:, None]).sum(), x)[0]


def stream_of(kind, net, images):
    if kind == "reading":
        return ReadingStream(net, readers_of(net, images[:8]))
    if kind == "accuracy":
        return AccuracyStream(net)
    if kind == "explanation":
        return ExplanationStream(net, len(images), {"gradient": Gradient(net)})
    order = torch.rand(len(images), 3, 3, generator=torch.Generator().manual_seed(4)).flatten(1).argsort(1)
    return DegradationStream(net, {"gradient": Gradient(net)}, 2, 9, order.view(-1, 3, 3))


STREAMS = ["reading", "accuracy", "explanation", "degradation"]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("room", [3, 1])
def test_every_stream_goes_on_with_what_fits(net, images, kind, room, caplog):
    plain = shown(stream_of(kind, net, images), images)
    stream = stream_of(kind, net, images)
    net.tight.room = room
    shown(stream, images)
    assert_same(stream.state(), plain.state())
    assert [tuple(said) for said in says_so(caplog)] == [
        (8, 4, "data.batch_size"), (4, 2, "data.batch_size"), (2, 1, "data.batch_size"),
    ][: 2 if room == 3 else 3]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("reading", "pattern_bench.engine.streams.fits"),
        *((kind, "pattern_bench.engine.micro_batches.fits") for kind in STREAMS[1:]),
    ],
)
def test_every_stream_may_run_out_at_any_call(net, images, kind, place, at_call):
    plain = shown(stream_of(kind, net, images), images, size=10)
    mode = at_call(place, 0)
    shown(stream_of(kind, net, images), images, size=10)
    for at in range(1, mode.calls + 1, 1 + mode.calls // 12):
        stream = stream_of(kind, net, images)
        at_call(place, at)
        assert_same(shown(stream, images, size=10).state(), plain.state())
        assert stream.most in (5, 4)  # of 10 or of the last 9


@pytest.mark.parametrize("kind", STREAMS)
def test_every_stream_says_what_helps_a_single_image(net, images, kind):
    stream = stream_of(kind, net, images)
    net.tight.room = 0
    with pytest.raises(UserError, match=r"too small for a single image: .*, or use a device with more"):
        shown(stream, images)


def fitted(module, images):
    """The module after three epochs."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(batches(images)), batch_size=None, collate_fn=lambda batch: batch))
    return module


class Classifier(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.tight = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), Tight()
        self.last, self.unused = nn.Linear(64, 5), nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return self.last(self.tight(self.norm(self.first(x)).relu()).flatten(1))


def test_a_step_may_run_out_at_every_call(images, at_call):
    """On the way there, on the way back, and where gradients are added up."""
    targets, mode, plain = torch.arange(18) % 5, AtCall(0), None
    while mode.at <= mode.calls:
        mode = at_call("pattern_bench.engine.micro_batches.fits", mode.at + 1)
        model = Classifier(False)
        model.tight.room = 10

        def loss(part, model=model):
            return nn.functional.cross_entropy(model(images[part]), targets[part], reduction="sum")

        Learner(model, Training(1, 0.1, 18), False, GlobalBatches(18, 18, 0)).descend(18, loss).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        plain = plain or found
        assert_same(found, plain)
    assert mode.at > 20


@pytest.mark.parametrize("room", [1000, 5, 1])
def test_the_gradients_of_parts_are_those_of_the_batch(images, room):
    """Times whatever Lightning multiplies the loss by; a parameter without one gets none."""
    model, targets = Classifier(False), torch.arange(19) % 5
    loss = nn.functional.cross_entropy(model(images), targets, reduction="sum")
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    model.tight.room = room
    learner = Learner(model, Training(1, 0.1, 19), False, GlobalBatches(19, 19, 0))
    total = learner.descend(
        19, lambda part: nn.functional.cross_entropy(model(images[part]), targets[part], reduction="sum")
    )
    assert float(total) == pytest.approx(float(loss))
    (3 * total).backward()
    assert model.unused.weight.grad is None
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, 3 * gradient)


def learned(images, room, norm=False):
    """Weights after epochs in which so many images have room."""
    model = Classifier(norm)
    model.tight.room = room
    return fitted(Learner(model, Training(3, 0.05, 8), False, GlobalBatches(19, 8, 0)), images).model.state_dict()


def test_training_in_parts_learns_what_whole_batches_teach(images, caplog):
    """The parts' gradients add up."""
    plain = learned(images, 1000)
    assert not torch.equal(plain["first.weight"], Classifier(False).first.weight)
    found = learned(images, 3)
    assert all(torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-9) for name, tensor in plain.items())
    setting = "model.training.batch_size"
    assert [tuple(said) for said in says_so(caplog)] == [(8, 4, setting), (4, 2, setting)]


def test_batch_norm_is_not_trained_in_parts(images):
    learned(images, 8, norm=True)
    with pytest.raises(
        UserError, match=r"model.training.batch_size=8: out of memory with 8 images .*batch norm \(norm"
    ):
        learned(images, 7, norm=True)


def descended(net, images, room):
    """Readers after epochs in which so many images have room; and the last one's loss."""
    readers = {name: Reader(net.get_submodule(name), p, "all", 1e-3) for name, p in patterns_of(net).items()}
    module = ReaderDescent(net, readers, 0.02, 9, GlobalBatches(19, 8, 0))
    module.calibrate(images[:8], torch.arange(8))
    net.tight.room = room
    fitted(module, images)
    return {name: reader.v.detach() for name, reader in readers.items()}, float(module.trainer.callback_metrics["loss"])


def test_descent_in_parts_takes_the_steps_of_whole_batches(net, images, caplog):
    plain, loss = descended(net, images, 1000)
    found, loss_of_parts = descended(net, images, 3)
    assert all(v.abs().max() > 1e-3 for v in plain.values())
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    for name, v in plain.items():
        torch.testing.assert_close(found[name], v, rtol=1e-8, atol=1e-8)
    assert [tuple(said[:2]) for said in says_so(caplog)] == [(8, 4), (4, 2)]


def test_readers_are_calibrated_on_what_fits(net, images, caplog):
    """Fewer images change the way to the solution, not the solution."""
    setup = types.SimpleNamespace(splits={"probe": _Loads(images)}, loader=lambda split, _: split)
    readers = {"last": Reader(net.last, patterns_of(net)["last"], "all", 1e-3)}
    module = ReaderDescent(net, readers, 0.02, 9, GlobalBatches(19, 8, 0))
    net.tight.room = 3
    descent._calibrate(setup, types.SimpleNamespace(device="cpu"), module)
    again = Reader(net.last, patterns_of(net)["last"], "all", 1e-3)
    ReaderDescent(net, {"last": again}, 0.02, 9, GlobalBatches(19, 8, 0)).calibrate(images[:2], torch.arange(2))
    assert torch.equal(readers["last"].across_channels, again.across_channels)
    assert again.across_channels.any()
    assert module.most == 2
    assert [tuple(said[:2]) for said in says_so(caplog)] == [(8, 4), (4, 2)]


class _Loads(list):
    def __init__(self, images):
        super().__init__(batches(images))

    def share(self, _):
        return None


def test_rho_is_computed_on_the_cpu_where_the_device_has_no_room(monkeypatch, caplog):
    def compute(device, *_):
        if device != torch.device("cpu"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.ones(3), 1e-4

    monkeypatch.setattr(rho, "_layer_rho_on", compute)
    moments = types.SimpleNamespace(x=torch.zeros(1, 25088))
    assert rho.layer_rho(None, torch.device("meta"), "fc6", None, moments, moments) == (
        pytest.approx(torch.ones(3)),
        1e-4,
    )
    assert "out of memory with ρ of layer fc6 on meta" in caplog.text
    monkeypatch.setattr(rho, "_layer_rho_on", lambda *_: torch.empty(1 << 58))
    with pytest.raises(UserError, match=r"ρ of layer fc6, whose Gram matrix has 25088 columns: leave it out \(layer\)"):
        rho.layer_rho(None, torch.device("meta"), "fc6", None, moments, moments)


SMALL = [
    "data.limit=200", "data.batch_size=16", "data.workers=0", "model.training.epochs=2", "degradation.images=6",
    "explanation.images=2", "estimator=w", "probe.regularisation=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    """A complete run without faults, and its cache."""
    folder, cache = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("cache")
    run(configure(*SMALL, f"cache.dir={cache}"), folder)
    return folder, cache


@pytest.fixture
def own_cache(trained, tmp_path):
    """A cache with the trained model, and nothing else."""
    shutil.copytree(trained[1] / "models", tmp_path / "cache" / "models")
    return f"cache.dir={tmp_path / 'cache'}"


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def tables_of(folder):
    return pd.read_csv(folder / "rho.csv"), pd.read_csv(folder / "degradation.csv")


def cramped(forward):
    """A module's forward, with room for five images."""

    def attempt(self, x):
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, x)

    return attempt


def test_a_job_without_memory_enough_is_complete_and_equal(trained, run_job, own_cache, tmp_path, monkeypatch, caplog):
    """Training too; what it takes from there starts from the same weights."""
    monkeypatch.setattr(nn.MaxPool2d, "forward", cramped(nn.MaxPool2d.forward))
    folder = run_job(*SMALL, own_cache)
    for mine, plain in zip(tables_of(folder), tables_of(trained[0]), strict=True):
        pd.testing.assert_frame_equal(mine, plain, rtol=1e-6, atol=1e-6)
    assert json.loads((folder / "accuracy.json").read_text()) == json.loads((trained[0] / "accuracy.json").read_text())
    # Each pass begins with the batch that was asked for: accuracy, three of moments, degradation by the method's
    # order and by the random one.
    assert [said[0] for said in says_so(caplog)] == [16, 8] * 4 + [6] * 2
    caplog.clear()
    folder = run_job(*SMALL, f"cache.dir={tmp_path / 'other'}", "probe=sgd", "probe.steps=20", "layer=features.*")
    assert summary_of(folder)["accuracy"] == pytest.approx(summary_of(trained[0])["accuracy"], abs=0.1)
    assert tables_of(folder)[0].rho.notna().any()
    training = [said for said in says_so(caplog) if said[2] == "model.training.batch_size"]
    assert [tuple(said[:2]) for said in training] == [(64, 32), (32, 16), (16, 8), (8, 4)]


# --- numbers ---


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("Unable to allocate")])
def test_memory_that_runs_out_where_nothing_has_parts_is_one_error(run_job, own_cache, monkeypatch, error):
    def runs_out(*_):
        raise error

    monkeypatch.setattr(patterns, "fit_patterns", runs_out)
    with pytest.raises(UserError, match=r"out of memory \((CUDA|Unable).*resume=DIR"):
        run_job(*SMALL, own_cache)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused_before_anything(run_job, trained, tmp_path, value, monkeypatch):
    (file,) = (trained[1] / "models").glob("*.safetensors")
    weights = load_file(file)
    weights["features.5.weight"][3, 2, 1, :2] = float(value)
    save_file(weights, tmp_path / "weights.safetensors")
    monkeypatch.setattr("pattern_bench.pipeline.job.run_prepared", None)
    expected = r"layer features.5 has NaN or Inf in 2 of 4608 values of its weight: give other weights"
    with pytest.raises(UserError, match=expected):
        run_job(*SMALL, f"model.weights={tmp_path / 'weights.safetensors'}")


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("positions", [1.0, 0.1])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_image_that_is_no_number_is_named_by_its_batch(net, images, gram, positions, value, monkeypatch):
    """A single pixel of the last image; sampling may leave out all that it reaches."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    images[18, 1, 2, 3] = float(value)
    message = r"layer first: NaN or Inf in its input or output, for the batch of images 16 to 18 of the split"
    with pytest.raises(UserError, match=message):
        moments(net, images, gram, positions)
    layers = ["twice", "last"]
    with pytest.raises(UserError, match="layer twice: NaN or Inf"):
        moments(net, images, gram, positions, layers)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("positions", [1.0, 0.1])
@pytest.mark.parametrize("where", ["first", "twice", "last", "closed"])
def test_an_activation_that_overflows_is_named_by_its_layer(net, images, gram, positions, where, monkeypatch):
    """``closed``: to -Inf, of which the ReLU behind leaves no trace."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    layer = "twice" if where == "closed" else where
    net.get_submodule(layer).bias[1] = -1e308 if where == "closed" else 1e308
    net.get_submodule(layer).weight[1] = -1e308 if where == "closed" else 1e308
    net.first.bias.fill_(5.0)
    with pytest.raises(UserError, match=rf"layer {layer}: NaN or Inf .* images 0 to 7 of the split"):
        moments(net, images, gram, positions)
    if where == "closed":
        with torch.no_grad():
            assert net(images).isfinite().all()


@pytest.mark.parametrize("criterion_name", ["all", "rectified", "positive"])
@pytest.mark.parametrize("where", ["image", "overflow", "closed"])
def test_readers_neither_learn_from_nor_are_scored_on_what_is_no_number(net, images, criterion_name, where):
    readers = readers_of(net, images[:8], criterion_name)
    module = ReaderDescent(net, readers, 0.02, 9, GlobalBatches(19, 8, 0))
    if where == "image":
        images[17, 0, 0, 0] = torch.nan
    else:  # in the third batch alone
        net.last.weight[1] = -1e308 if where == "closed" else 1e308
        images[:16], images[16:] = 0, images[16:] * 1e3
        net.first.bias.zero_()
        net.twice.bias.zero_()
    message = rf"layer {'first' if where == 'image' else 'last'}: NaN or Inf .* images 16 to 18 of the split"
    with pytest.raises(UserError, match=message):
        shown(ReadingStream(net, readers), images)
    with pytest.raises(UserError, match=message):
        fitted(module, images)
    with pytest.raises(UserError, match=message):
        module.calibrate(images[16:], torch.arange(16, 19))


def test_a_descent_that_diverges_names_its_learning_rate(net, images):
    readers = readers_of(net, images[:8])
    with pytest.raises(UserError, match=r"probe.learning_rate=1e\+200: the loss of v is NaN or infinite in step 1"):
        fitted(ReaderDescent(net, readers, 1e200, 9, GlobalBatches(19, 8, 0)), images)


@pytest.mark.parametrize("kind", ["accuracy", "explanation", "degradation"])
def test_answers_that_are_no_numbers_are_neither_counted_nor_explained(net, images, kind):
    """Under estimator=x nothing else looks at the activations."""
    stream = stream_of(kind, net, images)
    images[17, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layer first: NaN or Inf .* images 16 to 18 of the split"):
        shown(stream, images)
    assert stream.seen.images == 16


def test_an_explanation_that_is_no_number_is_refused(net, images):
    method = types.SimpleNamespace(attribute=lambda inputs, target: inputs / 0)
    with pytest.raises(UserError, match=r"explanation/mine: NaN or Inf for images 0 to 7 of the split: choose another"):
        shown(ExplanationStream(net, len(images), {"mine": method}), images)


def test_training_that_diverges_names_its_learning_rate(images):
    model = Classifier(False)
    images[9] = torch.inf
    with pytest.raises(UserError, match=r"model.training.learning_rate=0.1: the loss is NaN or infinite in epoch 0"):
        fitted(Learner(model, Training(3, 0.1, 8), False, GlobalBatches(19, 8, 0)), images)


def spoilt(image, broken):
    """A pool's ``image``, which is NaN for one of them."""
    return lambda self, index: image(self, index) * torch.nan if index == broken else image(self, index)


@pytest.mark.parametrize("probe", [["probe=closed_form"], ["probe=sgd", "probe.steps=9"]])
def test_what_was_finished_before_an_image_that_is_no_number_is_kept(
    trained, configure, own_cache, tmp_path, probe, monkeypatch
):
    """An image of the probe split: patterns are there and the fit moments in the cache, for the run with it mended."""
    splits = pd.read_csv(trained[0] / "splits.csv")
    broken = int(splits[splits.split == "probe"]["index"].iloc[37])
    (weights,) = (tmp_path / "cache" / "models").glob("*.safetensors")
    job = [*SMALL, own_cache, f"model.weights={weights}", *probe]
    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(TensorPool, "image", spoilt(TensorPool.image, broken))
        message = r"layer features.0: NaN or Inf in its input or output, for the batch of images .* of the split: mend"
        with pytest.raises(UserError, match=message):
            run(configure(*job), folder)
    assert not (folder / "summary.json").exists()
    assert load_file(folder / "patterns.safetensors")["features.0/positive"].isfinite().all()
    assert json.loads((folder / "accuracy.json").read_text())["images"] == 40
    passes, over = [], moments_stage.stream_over
    monkeypatch.setattr(moments_stage, "stream_over", lambda *given, **more: passes.append(1) or over(*given, **more))
    run(configure(*job), folder)
    assert len(passes) == (2 if len(probe) == 1 else 0)  # the probe and validation splits, not the fit split again
    if len(probe) == 1:
        for mine, plain in zip(tables_of(folder), tables_of(trained[0]), strict=True):
            pd.testing.assert_frame_equal(mine, plain)


# --- disks ---


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB, filled but for so many KiB."""
    mounted = []

    def full(folder, free):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a disk of its own: {done.stderr.strip()}")
        mounted.append(folder)
        (folder / "filling").write_bytes(bytes((1024 - free) * 1024))
        return folder

    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("only root can mount a disk of its own")
    yield full
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_run_folder_on_a_full_disk_is_one_error_and_can_be_taken_up(
    trained, command, configure, small_disk, tmp_path
):
    disk = small_disk(tmp_path / "disk", free=100)
    folder, same_cache = disk / "run", f"cache.dir={trained[1]}"
    done = command(*SMALL, "logger=none", same_cache, f"hydra.run.dir={folder}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: cannot use {folder / 'patterns.safetensors'} (")
    assert error.endswith("): free space, or choose another hydra.run.dir")
    assert "o space left on device" in error
    assert not [file for file in folder.iterdir() if file.name.startswith(".") and file.name != ".hydra"]
    (disk / "filling").unlink()
    run(configure(*SMALL, same_cache), folder)
    for name in ("rho.csv", "degradation.csv", "accuracy.json", "splits.csv"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()


def test_a_cache_on_a_full_disk_is_said_once(trained, run_job, small_disk, tmp_path, caplog):
    disk = small_disk(tmp_path / "disk", free=300)
    shutil.copytree(trained[1] / "models", disk / "models")  # 100 KiB; the moments take 900
    folder = run_job(*SMALL, f"cache.dir={disk}")
    assert caplog.text.count("cannot be written") == 1
    assert "No space left on device" in caplog.text
    assert 0 < len(list((disk / "moments").glob("*.safetensors"))) < 18
    assert not list((disk / "moments").glob(".*"))
    for name in ("rho.csv", "degradation.csv"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()
    (disk / "filling").unlink()
    again = run_job(*SMALL, f"cache.dir={disk}")
    assert (again / "rho.csv").read_bytes() == (trained[0] / "rho.csv").read_bytes()


@pytest.mark.parametrize("seconds", [0, 10])
def test_unfinished_state_on_a_full_disk_is_said_once(trained, configure, small_disk, tmp_path, seconds, caplog):
    """Whether after every batch, or at a stage's end."""
    folder = tmp_path / "run"
    small_disk(folder / "partial", free=0)
    run(configure(*SMALL, f"cache.dir={trained[1]}", "criterion=rectified", f"checkpoint.seconds={seconds}"), folder)
    assert caplog.text.count("cannot be written") == 1
    assert "accuracy-0-of-1.safetensors cannot be written" in caplog.text
    assert summary_of(folder)["accuracy"] == summary_of(trained[0])["accuracy"]
    assert (folder / "degradation.csv").read_bytes() == (trained[0] / "degradation.csv").read_bytes()


def test_checkpoints_on_a_full_disk_are_said_once_and_training_goes_on(
    configure, run_job, small_disk, own_cache, tmp_path, caplog
):
    job = ["data.limit=100", "model.training.epochs=3", "estimator=w", "degradation.images=4", own_cache]
    folder = tmp_path / "run"
    small_disk(folder / "partial", free=20)
    run(configure(*job), folder)
    assert caplog.text.count(".ckpt cannot be written (No space left on device): going on without it") == 1
    plain = run_job(*job[:-1], f"cache.dir={tmp_path / 'other'}")
    assert (folder / "rho.csv").read_bytes() == (plain / "rho.csv").read_bytes()


@pytest.mark.slow
def test_a_log_file_without_room_is_no_traceback(trained, command, small_disk, tmp_path):
    disk = small_disk(tmp_path / "disk", free=24)  # enough for Hydra's files
    (tmp_path / "cache" / "models").mkdir(parents=True)
    for file in (trained[1] / "models").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "cache" / "models")
    done = command(
        *SMALL, "logger=none", f"cache.dir={tmp_path / 'cache'}", f"hydra.run.dir={disk}", "checkpoint.seconds=0"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


# --- files and clocks ---


@pytest.fixture
def folder_job(photographs, configure, run_job, tmp_path):
    """A job on 40 photographs, and their names by split."""
    root = photographs(tmp_path / "photographs", count=40)
    job = [
        "data=folder", f"data.root={root}", "data.size=16", "model=small_vgg", "model.width=2", "data.batch_size=8",
        "model.training.epochs=1", "model.training.batch_size=8", "estimator=a", "explanation.images=3",
        "degradation.images=null", f"cache.dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    setup = make_splits(build(configure(*job).data), 0)
    names = {name: [split.name(position) for position in range(len(split))] for name, split in setup.items()}
    return job, root, names


def before(monkeypatch, place, act, wanted=lambda *_: True):
    """Lets ``act`` happen before the first call of ``place`` whose arguments are ``wanted``."""
    function, done = pkgutil.resolve_name(place), []

    def first(*arguments, **settings):
        if not done and wanted(*arguments):
            done.append(act())
        return function(*arguments, **settings)

    monkeypatch.setattr(place, first)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_or_are_spoilt_during_a_run_are_left_out_and_named(
    folder_job, run_job, monkeypatch, workers, capsys
):
    job, root, names = folder_job
    gone = [names["fit"][0], names["fit"][5], names["probe"][-1]]
    spoilt = [names["probe"][2], names["validation"][1]]
    later = names["validation"][2:5]

    def spoil():
        for name in gone:
            (root / name).unlink()
        for name in spoilt:
            (root / name).write_bytes(b"\xff\xd8\xff no JPEG after all")

    before(monkeypatch, "pattern_bench.pipeline.job.run_prepared", spoil)
    before(
        monkeypatch, "pattern_bench.pipeline.moments.collect", lambda: [(root / name).unlink() for name in later],
        lambda setup, machine, split, *_: split == "validation",
    )  # fmt: skip
    folder = run_job(*job, f"data.workers={workers}")
    expected = sorted(gone + spoilt + later)
    assert summary_of(folder)["unreadable"] == expected
    splits = pd.read_csv(folder / "splits.csv")
    assert sorted(splits.name[~splits.used]) == expected
    rho, degradation = tables_of(folder)
    assert rho.rho.isna().equals(rho.dead)
    assert set(degradation.n) == {8 - 4}
    said = capsys.readouterr().err
    assert re.findall(r"(\d+ images?) cannot be read and", said) == ["1 image", "2 images", "2 images", "3 images"]
    assert "Traceback" not in said


def test_files_that_only_the_networks_answers_need_are_named_too(folder_job, run_job):
    """An estimator without patterns visits the validation images alone."""
    job, root, names = folder_job
    spoilt = [names["validation"][1], names["validation"][6]]
    for name in spoilt:
        (root / name).write_bytes(b"no image")
    folder = run_job(*job, "estimator=x")
    assert summary_of(folder)["unreadable"] == sorted(spoilt)
    assert json.loads((folder / "accuracy.json").read_text())["images"] == 8 - 2
    splits = pd.read_csv(folder / "splits.csv")
    assert sorted(splits.name[~splits.used]) == sorted(spoilt)


def test_no_accuracy_is_told_of_no_readable_image(folder_job, run_job, tmp_path):
    job, root, names = folder_job
    for name in names["validation"]:
        (root / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the first validation images can be read"):
        run_job(*job, "estimator=x")
    accuracy = json.loads((tmp_path / "run0" / "accuracy.json").read_text())
    assert accuracy["skipped"] == "none of the 8 validation images can be read"
    assert "top1" not in accuracy


@pytest.mark.parametrize(
    ("probe", "place", "expected"),
    [
        ("closed_form", "pattern_bench.pipeline.setup._sample", "none of the 16 images of the fit split can be read"),
        (
            "closed_form",
            "pattern_bench.pipeline.patterns.collect",
            "only 0 of the 16 images of the fit split can be read",
        ),
        ("sgd", "pattern_bench.pipeline.descent.descend", "none of the 16 images of the probe split can be read: mend"),
    ],
)
def test_files_that_all_vanish_are_one_error(folder_job, run_job, monkeypatch, probe, place, expected):
    job, root, _ = folder_job
    before(monkeypatch, place, lambda: shutil.rmtree(root))
    with pytest.raises(UserError, match=expected):
        run_job(*job, f"probe={probe}", "data.workers=0")


def test_a_clock_that_jumps_changes_nothing(trained, run_job, own_cache, monkeypatch):
    """By a year, either way, at every look at it."""
    start, jumps = time.time(), itertools.cycle([0, 3e7, -3e7, 5.0, -1e9])
    monkeypatch.setattr(time, "time", lambda: start + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (start + next(jumps))))
    folder = run_job(*SMALL, own_cache, "checkpoint.seconds=0.01", "logger=csv")
    for name in ("rho.csv", "degradation.csv", "accuracy.json", "splits.csv"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()
    assert all(0 <= seconds < 600 for seconds in summary_of(folder)["seconds"].values())


# --- several processes ---


def with_little_memory(cfg, folder):
    """The job, whose second process has room for five images."""
    if os.environ["RANK"] == "1":
        nn.MaxPool2d.forward = cramped(nn.MaxPool2d.forward)
    run(cfg, folder)


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_does_not_hold_up_the_others(configure, own_cache, tmp_path, monkeypatch):
    """Its part of each step is taken in parts, and the step is that of one process without memory enough."""
    folders = [tmp_path / name for name in ("two", "one")]
    for folder in folders:
        folder.mkdir()
    job = [*SMALL, "probe=both", "probe.steps=20", own_cache]
    launch(with_little_memory, configure(*job, "trainer=ddp_cpu"), folders[0])
    monkeypatch.setattr(nn.MaxPool2d, "forward", cramped(nn.MaxPool2d.forward))
    run(configure(*job), folders[1])
    two, one = map(tables_of, folders)
    assert set(two[0].probe) == {"closed_form", "sgd"}
    for mine, expected in zip(two, one, strict=True):
        pd.testing.assert_frame_equal(mine, expected, rtol=1e-4, atol=1e-4)
