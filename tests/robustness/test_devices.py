"""Everything computes on another device what it computes on the host, and mixes the two nowhere."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import tarfile
from functools import partial

import pandas as pd
import pytest
import torch
from helpers.brute_force import GEOMETRIES
from helpers.pretend_device import MixedDevicesError, Pretend, pretending, run_there
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch import nn

import pattern_bench as pb
import pattern_bench.api
import pattern_bench.data
import pattern_bench.methods
from pattern_bench.configuration.location import CONF
from pattern_bench.core.active_moments import FiringCollector, firing_rho
from pattern_bench.core.canonical import canonical
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Estimator
from pattern_bench.core.probe_closed_form import Probe, Target, rho
from pattern_bench.core.probe_sgd import Correlation, Reader
from pattern_bench.data.base import Source
from pattern_bench.methods.base import Method, create
from pattern_bench.pipeline.gallery import run as run_gallery
from pattern_bench.pipeline.sanity import run as run_sanity
from pattern_bench.processes.launch import launch

# --- the device itself ---


def test_what_is_moved_there_is_there_and_what_comes_back_is_here():
    with pretending() as device:
        x = torch.arange(6.0).view(2, 3).to(device)
        assert isinstance(x, Pretend)
        assert x.device == device
        assert (x + x).device == device
        assert type((x * 2).cpu()) is torch.Tensor
        assert x.cpu().numpy().sum() == 15
        assert float(x.sum()) == 15
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert torch.zeros(2, device=device).is_meta
        assert torch.equal((x[:, 1] + torch.tensor(1.0)).cpu(), torch.tensor([2.0, 5.0]))  # a number may come along
        x[0] = 7
        assert torch.equal(x.cpu()[0], torch.full((3,), 7.0))
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten()).to(device)
        net(torch.randn(2, 1, 5, 5).to(device)).sum().backward()
        assert net[0].weight.grad.device == device
        assert isinstance(net[0].weight, nn.Parameter)
        assert type(net.cpu()[0].weight.data) is torch.Tensor


MIXTURES = {
    "a sum": lambda x: x + torch.ones(3),
    "an index": lambda x: x[torch.tensor([0])],
    "a sum in place": lambda x: torch.ones(3).add_(x),
    "a convolution": lambda x: nn.Conv1d(1, 1, 1)(x.view(1, 1, 3)),
    "a list": lambda x: torch.cat([x, torch.ones(3)]),
    "a generator": lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
    "a generator in place": lambda x: x.normal_(generator=torch.Generator()),
    "a permutation": lambda x: torch.randperm(3, generator=torch.Generator(), device=x.device),
    "numpy": lambda x: x.numpy(),
    "numpy's array": lambda x: __import__("numpy").asarray(x),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_what_mixes_the_device_with_the_host_is_an_error(mixture):
    with pretending() as device, pytest.raises(MixedDevicesError):
        MIXTURES[mixture](torch.ones(3).to(device))


def test_weights_moved_back_while_sums_stay_are_an_error(pretend_device):
    """As Lightning moves a module when a loop ends."""
    layer, x = nn.Linear(3, 2).to(pretend_device), torch.ones(4, 3).to(pretend_device)
    total = layer(x).sum(0)
    layer.cpu()
    with pytest.raises(MixedDevicesError):
        layer.bias + total


# --- the engine ---


def here(value):
    """The same on the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: here(item) for key, item in value.items()}
    return value if value is None or isinstance(value, int | float | str) else [here(item) for item in value]


def agree(one, other):
    one, other = here(one), here(other)
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict | list):
        assert len(one) == len(other)
        for key in one if isinstance(one, dict) else range(len(one)):
            agree(one[key], other[key])
    else:
        assert one == other or one != one


def on_both(compute):
    """``compute(device)`` on the host and on the pretend device, which must be equal; the host's is returned."""
    torch.manual_seed(0)
    expected = here(compute(torch.device("cpu")))
    with pretending() as device:
        torch.manual_seed(0)
        found = compute(device)
        agree(found, expected)
    return expected


def drawn(geometry, offset=0.0):
    torch.manual_seed(len(geometry))
    layer, shape = GEOMETRIES[geometry]()
    x = torch.randn(shape)
    return layer.requires_grad_(False), x.relu() + 0.3 * x + 0.2 + offset


@pytest.mark.parametrize("after", ["on the device", "back on the host"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("positions", [1.0, 1e-9])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_moments(geometry, positions, offset, after, monkeypatch):
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 4)
    monkeypatch.setattr("pattern_bench.core.gram.SMALL_PATCH", 1)

    def compute(device):
        layer, x = drawn(geometry, offset)
        layer, x = layer.to(device), x.to(device)
        results = []
        for gram in (True, False):
            first, second = (Collector(layer, gram, positions=positions, seed=3) for _ in range(2))
            y = layer(x)
            first.add(x, y)
            # As a run that was interrupted: the state comes from a file, which is on the host.
            second.restore({name: tensor.cpu() for name, tensor in first.state().items()})
            second.add(x.flip(0), layer(x.flip(0)))
            assert second.finite.device == second.sums.x.device == device
            if after == "back on the host":
                layer.cpu()
            moments = second.moments()
            assert moments.xg.device == device
            results.append(moments.tensors())
            layer.to(device)
        return results

    on_both(compute)


@pytest.mark.parametrize("after", ["on the device", "back on the host"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patterns_rho_and_readers(geometry, after):
    def compute(device):
        layer, x = drawn(geometry)
        weight, bias = layer.weight.flatten(1).double().to(device), layer.bias
        layer, x = layer.to(device), x.to(device)
        y = layer(x)
        collector = Collector(layer, gram=True)
        collector.add(x, y)
        firing = FiringCollector(layer, torch.tensor([0, len(weight) - 1]), seed=1)
        firing.add(x, y)
        moments = collector.moments()
        found = []
        for name, kind in pb.api.ESTIMATORS.items():
            if not kind.has_pattern:
                continue
            pattern = kind().fit(weight, moments, torch.Generator().manual_seed(0))
            assert pattern.positive.device == pattern.dead.device == device
            for criterion in ("all", "rectified"):
                target = Target(criterion, None if bias is None else bias.double().to(device))
                found.append(rho(Probe(moments, 1e-3).direction(pattern, target), moments, pattern, target))
            reader = Reader(layer, pattern, "all", 1e-4).to(device)
            reader.calibrate(x, y)
            reader.loss(x, y).sum().backward()
            correlation = Correlation(reader)
            correlation.add(x, y)
            found += [reader.coordinates.grad, correlation.sums]
            if after == "back on the host":
                reader.cpu(), layer.cpu()
            found.append(correlation.rho())
            layer.to(device)
            if name == "a":
                some = type(pattern)(*(t[[0, -1]] for t in vars(pattern).values()))
                gathered = firing.moments()
                found.append(firing_rho(gathered, gathered, weight[[0, -1]], some, 1e-3)[0])
        return found

    on_both(compute)


# --- every estimator, method and data set that there is ---


def subclasses(base, package):
    """Every class below ``base`` that the modules of ``package`` define, also those that are written tomorrow."""
    modules = [package]
    if hasattr(package, "__path__"):
        modules += [
            importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        ]
    found = [kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)
             if issubclass(kind, base) and kind is not base and kind.__module__ == module.__name__]  # fmt: skip
    return {f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}": kind for kind in found}


ESTIMATORS = subclasses(Estimator, importlib.import_module("pattern_bench.core.estimators"))
METHODS = {
    name: kind
    for package in (pattern_bench.methods, pattern_bench.api)
    for name, kind in subclasses(Method, package).items()
    if not kind.__name__.startswith("_")
}
SOURCES = subclasses(Source, pattern_bench.data)
FEW = {"samples": 3, "steps": 4, "patches": 20, "window": 4, "batch_size": 4}
"""Settings that make a method quick, for those that have them."""


def small_network():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    return net.eval()


def small_images(count=6):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator(name):
    kind = ESTIMATORS[name]
    unset = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
    assert not unset, f"estimator {name} needs {unset}: say in this test what to make it with"

    def compute(device):
        layer, x = drawn("conv2d")
        layer, x = layer.to(device), x.to(device)
        collector = Collector(layer, gram=True)
        collector.add(x, layer(x))
        pattern = kind().fit(layer.weight.flatten(1).double(), collector.moments(), torch.Generator().manual_seed(4))
        assert {t.device for t in vars(pattern).values() if isinstance(t, torch.Tensor)} == {device}
        return {name: t for name, t in vars(pattern).items() if isinstance(t, torch.Tensor)}

    if kind.has_pattern:
        on_both(compute)


@pytest.mark.parametrize("patterns_on", ["the host", "the device"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, patterns_on):
    kind = METHODS[name]
    settings = {s: v for s, v in FEW.items() if s in inspect.signature(kind).parameters}
    more = [{"sampling": "conditional"}] if "sampling" in inspect.signature(kind).parameters else []

    def compute(device):
        net = canonical(small_network(), small_images()[:1]).to(device)
        images = small_images().to(device)
        moments = pb.collect_moments(net, [images], gram=False)
        patterns = dict(pb.fit_patterns(net, moments))
        if patterns_on == "the host":
            patterns = {k: type(p)(*(t.cpu() for t in vars(p).values())) for k, p in patterns.items()}
        found = []
        for extra in ({}, *more):
            method = create(partial(kind, **settings, **extra), net, patterns, images[:4])
            for target in (None, 2, torch.arange(3)):
                found.append(method.attribute(images[:3], target))
                assert found[-1].device == device
        return found

    on_both(compute)


def cifar_files(root, photographs):
    from helpers.cifar_files import write_binary

    return [f"data.root={write_binary(root)}", "data.validation=4"]


def folder_files(root, photographs):
    return [f"data.root={photographs(root)}", "data.size=16"]


def imagenet_files(root, photographs):
    wnids = ("n01440764", "n01443537")
    for part in ("train", "val"):
        for wnid in wnids:
            photographs(root / part / wnid, count=6, classes=0, size=20)
    torch.save(({wnid: (wnid,) for wnid in wnids}, list(wnids)), root / "meta.bin")
    return [f"data.root={root}", "data.size=16"]


def shard_files(root, photographs):
    photographs(root / "images")
    with tarfile.open(root / "all.tar", "w") as shard:
        for file in sorted((root / "images").rglob("*.jpg")):
            shard.add(file, f"{file.stem}.jpg")
            label = tarfile.TarInfo(f"{file.stem}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(file.parent.name[-1:].encode()))
    return [f"data.root={root / 'all.tar'}", "data.size=16"]


RECIPES = {
    "cifar.Cifar10": ("cifar10", cifar_files),
    "digits.Digits": ("digits", lambda *_: ["data.limit=60"]),
    "folder.Folder": ("folder", folder_files),
    "known_signal.Known": ("known_signal", lambda *_: ["data.samples=120"]),
    "shards.Shards": ("shards", shard_files),
    "toy.Toy": ("toy", lambda *_: ["data.samples=120"]),
    "imagenet.ImageNet": ("imagenet", imagenet_files),
}
"""Each data set's name, and what makes its files and returns the settings of a job on them."""


@pytest.mark.parametrize("name", SOURCES)
def test_every_data_set(name, run_job, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("pattern_bench.data.cifar.RECORDS", 4)  # in a file, instead of 10,000
    assert name in RECIPES, f"data set {name} has no recipe: say in RECIPES how a job on it is asked for"
    data, files = RECIPES[name]
    (tmp_path / "data").mkdir()
    settings = [f"data={data}", *files(tmp_path / "data", photographs), "data.workers=0"]
    few = ["model=linear", "quiet=true", "model.training.epochs=1", "degradation.images=2", "explanation.images=1"]
    expected = results_of(run_job(*settings, *few, f"cache.dir={tmp_path / 'host'}"))
    with pretending():
        found = results_of(run_job(*settings, *few, f"cache.dir={tmp_path / 'device'}"))
    equal_results(found, expected)


# --- from Python ---


def test_the_api(tmp_path):
    def compute(device):
        net = small_network().to(device)
        batches = [small_images(24)[i : i + 8].to(device) for i in range(0, 24, 8)]
        fit, probe, test = ([batch, batch + 0.1] for batch in batches)
        a, b, c = (pb.collect_moments(net, split) for split in (fit, probe, test))
        sampled = pb.collect_moments(net, fit, positions=0.5)
        patterns = pb.fit_patterns(net, a)
        patterns.save(tmp_path / "patterns.safetensors")
        loaded = pb.load_patterns(tmp_path / "patterns.safetensors", net)
        found = [pb.evaluate(net, loaded, b, c, criterion=criterion) for criterion in ("all", "rectified")]
        methods = {
            "attribution": pb.PatternAttribution(net, patterns), "signal": pb.PatternNet(net, loaded),
            "function": lambda model, inputs, targets: inputs.cpu().numpy(),
        }  # fmt: skip
        for order, how in (("most", "mean"), ("least", "blur"), ("most", "constant")):
            found.append(pb.degradation(net, batches[0], methods, patch=2, steps=5, order=order, replacement=how))
        pb.draw_gallery(net, batches[0][:2], methods, tmp_path / f"{device}.png")
        return [{k: dict(vars(p)) for k, p in patterns.items()}, {k: m.tensors() for k, m in sampled.items()}, *found]

    on_both(compute)
    assert (tmp_path / "cpu.png").read_bytes() == (tmp_path / "meta.png").read_bytes()


# --- jobs ---

SMALL = ("data.limit=60", "degradation.images=4", "explanation.images=1", "quiet=true", "model.training.epochs=1")
JOBS = {
    "closed form": [],
    "both probes": ["probe=both", "probe.steps=6", "layer=features.*"],
    "where they fire": ["criterion=positive", "probe.neurons=3"],
    "sampled positions": ["moments.positions=0.5"],
    "bootstrap": ["bootstrap.resamples=2", "bootstrap.chunks=2", "layer=features.*"],
    "batch norm": ["model.batch_norm=true", "layer=features.*"],
}


def results_of(folder):
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("rho", "degradation", "areas", "splits")}
    return tables, load_file(folder / "patterns.safetensors")


def equal_results(found, expected):
    for name, table in expected[0].items():
        pd.testing.assert_frame_equal(table, found[0][name], check_exact=True, obj=name)
    agree(found[1], expected[1])


@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=() if job == "closed form" else pytest.mark.slow) for job in JOBS]
)
def test_a_job_through_lightning(job, run_job, tmp_path):
    more = [*SMALL, *JOBS[job]]
    expected = results_of(run_job(*more, f"cache.dir={tmp_path / 'host'}"))
    with pretending():
        found = results_of(run_job(*more, f"cache.dir={tmp_path / 'device'}"))
    equal_results(found, expected)


@pytest.mark.parametrize("command", ["gallery", pytest.param("sanity", marks=pytest.mark.slow)])
def test_gallery_and_sanity_checks_through_lightning(command, cache_dir, tmp_path):
    own = {
        "gallery": ("images=2", "show=[gradient,smoothgrad,pattern_net,pattern_attribution,lrp_z,occlusion]"),
        "sanity": ("images=2", "refit=20", "directions=3", "show=[gradient,pattern_attribution,lrp_z]"),
    }[command]
    run = {"gallery": run_gallery, "sanity": run_sanity}[command]
    found = []
    for place in (contextlib.nullcontext, pretending):
        folder = tmp_path / place.__name__
        folder.mkdir()
        settings = [f"cache.dir={folder / 'cache'}", "logger=none", "quiet=true", "data.limit=120"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(command, [*settings, "model.training.epochs=1", *own])
        with place():
            run(cfg, folder)
        if command == "gallery":
            found.append(load_file(folder / "gallery.safetensors"))
        else:
            found.append({"sanity": torch.from_numpy(pd.read_csv(folder / "sanity.csv")[["mean", "std"]].to_numpy())})
    agree(*found)


@pytest.mark.slow
def test_two_processes(configure, run_job, tmp_path):
    """Each with a device of its own, which no process of theirs can reach but through the host."""
    more = [*SMALL, f"cache.dir={tmp_path / 'host'}", "data.batch_size=32"]
    expected = results_of(run_job(*more))
    more = [*more, f"cache.dir={tmp_path / 'device'}", "trainer=ddp_cpu"]
    (tmp_path / "two").mkdir()
    launch(run_there, configure(*more), tmp_path / "two")
    found = results_of(tmp_path / "two")
    for name in ("rho", "degradation", "areas"):
        pd.testing.assert_frame_equal(expected[0][name], found[0][name], rtol=1e-6, atol=1e-7, obj=name)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, msg=name)
