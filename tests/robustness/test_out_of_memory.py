"""Memory that runs out, at every place: what is done in parts then has the results of a run with enough."""

import json
import os
import pkgutil
import types

import pandas as pd
import pytest
import torch
from helpers.brute_force import brute_neuron
from helpers.small_jobs import SMALL, cramped, summary_of, tables_of
from helpers.tight_networks import (
    LAYERS,
    Classifier,
    batches,
    descended,
    learned,
    moments,
    patterns_of,
    shown,
    stream_of,
)
from torch import nn
from torch.overrides import TorchFunctionMode

from pattern_bench.core.collector import Collector
from pattern_bench.core.memory import fits
from pattern_bench.core.probe_sgd import Reader
from pattern_bench.data.splits import GlobalBatches
from pattern_bench.engine import micro_batches
from pattern_bench.engine.probe_descent import ReaderDescent
from pattern_bench.engine.training import Learner
from pattern_bench.errors import UserError
from pattern_bench.models.base import Training
from pattern_bench.pipeline import descent, patterns, rho
from pattern_bench.pipeline.job import run
from pattern_bench.processes.launch import launch

EXACT = {"rtol": 1e-12, "atol": 1e-12}


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
