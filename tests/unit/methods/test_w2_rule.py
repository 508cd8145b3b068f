"""The w²-rule at padded borders: against zennit, by hand, by its sum, and beside PatternAttribution with S_w."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pattern_bench.core.backward import replaced_weights
from pattern_bench.core.estimators import Filter
from pattern_bench.core.layers import PaddedConv2d
from pattern_bench.methods.patterns import DtdW2, PatternAttribution

NETWORKS = {
    "padded": lambda: ([nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=2)], (3, 10, 9)),
    "strided": lambda: (
        [nn.Conv2d(3, 6, (5, 4), stride=(3, 2), padding=(2, 3)), nn.Conv2d(6, 4, 3, 2, 1)], (3, 13, 12),
    ),
    "grouped and dilated": lambda: (
        [nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), nn.Conv2d(6, 12, 3, padding=1, groups=6)], (4, 9, 8),
    ),
    "margins": lambda: (
        [PaddedConv2d(3, 6, 3, stride=2, margins=((0, 1), (1, 2))), nn.AvgPool2d(2), nn.Conv2d(6, 4, 2, padding=1)],
        (3, 9, 8),
    ),
    "one dimension": lambda: ([nn.Conv1d(3, 6, 5, padding=3), nn.Conv1d(6, 4, 4, padding="same")], (3, 11)),
    "three dimensions": lambda: ([nn.Conv3d(2, 5, 3, stride=2, padding=(1, 0, 2))], (2, 5, 6, 4)),
    "padding alone in some patches": lambda: ([nn.Conv2d(2, 5, 3, padding=4)], (2, 4, 4)),
    "reflected": lambda: ([nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")], (3, 7, 6)),
    "circular and replicated": lambda: (
        [
            nn.Conv2d(3, 6, 3, padding=(1, 2), padding_mode="circular"),
            nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"),
        ],
        (3, 7, 6),
    ),
    "not padded": lambda: ([nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 4, 2)], (3, 11, 9)),
}  # fmt: skip
WHOLE = ("reflected", "circular and replicated", "not padded")


def network(name, positive=False):
    """Without biases; weights of many sizes, and a neuron that has none. ``positive``: all ReLUs are open."""
    torch.manual_seed(len(name))
    convolutions, shape = NETWORKS[name]()
    parts = [part for layer in convolutions for part in ((layer, nn.ReLU()) if hasattr(layer, "weight") else (layer,))]
    features = nn.Sequential(*parts, nn.Flatten())
    size = features(torch.zeros(1, *shape)).shape[1]
    model = nn.Sequential(*features, nn.Linear(size, 9), nn.ReLU(), nn.Linear(9, 3)).double().eval()
    for module in model.modules():
        if hasattr(module, "weight"):
            weight = torch.randn_like(module.weight) * torch.rand_like(module.weight[:, :1]) ** 4
            module.weight.data, module.bias.data = weight.abs() if positive else weight, torch.zeros_like(module.bias)
    if not positive:
        model[0].weight.data[0] = 0
    x = torch.randn(2, *shape, dtype=torch.float64)
    return model.requires_grad_(False), x.abs() if positive else x


def s_w(model):
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    return {name: Filter().fit(layer.weight.flatten(1), None, None) for name, layer in layers.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_equals_zennits(name):
    rules, composites = pytest.importorskip("zennit.rules"), pytest.importorskip("zennit.composites")
    attribution = pytest.importorskip("zennit.attribution")
    model, x = network(name)
    rule = composites.LayerMapComposite([((_ConvNd, nn.Linear), rules.WSquare(stabilizer=1e-200))])
    with attribution.Gradient(model, rule) as theirs:
        y, expected = theirs(x.clone(), lambda output: output * torch.eye(3).double()[1])
    assert y[:, 1].abs().min() > 0
    torch.testing.assert_close(DtdW2(model).attribute(x, 1), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"padding alone in some patches"}))
def test_it_conserves_relevance(name):
    """Where all ReLUs are open, and every patch has an input, the map sums to the output."""
    model, x = network(name, positive=True)
    torch.testing.assert_close(DtdW2(model).attribute(x, 2).flatten(1).sum(1), model(x)[:, 2], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_layer_by_hand(name):
    """One neuron and position after the other: what it is given, by the squares' shares of those on inputs."""
    model, x = network(name)
    layer, relevance, squared = model[0], torch.zeros_like(x), copy.deepcopy(model[0])
    squared.weight.data.square_()
    given = torch.randn_like(layer(x))
    for image, place in itertools.product(range(len(x)), itertools.product(*map(range, given.shape[1:]))):
        ones = torch.ones_like(x[:1]).requires_grad_()
        shares = torch.autograd.grad(squared(ones)[(0, *place)], ones)[0][0]
        if shares.sum() > 0:
            relevance[image] += shares / shares.sum() * given[(image, *place)]
    x.requires_grad_()
    with replaced_weights(layer, {"": squared.weight}, conserving=True):
        found = torch.autograd.grad(layer(x), x, given)[0]
    torch.testing.assert_close(found, relevance)


@pytest.mark.parametrize("name", NETWORKS)
def test_pattern_attribution_with_s_w_loses_what_falls_on_zeros(name):
    model, x = network(name)
    if name in WHOLE:
        found = PatternAttribution(model, s_w(model)).attribute(x, 1)
        torch.testing.assert_close(found, DtdW2(model).attribute(x, 1))
    model, x = network(name, positive=True)
    kept = PatternAttribution(model, s_w(model)).attribute(x, 1).flatten(1).sum(1) / model(x)[:, 1]
    if name in WHOLE:
        torch.testing.assert_close(kept, torch.ones_like(kept))
    else:
        assert ((kept > 0) & (kept < 0.99)).all()


def test_squares_of_small_weights_do_not_vanish():
    """In float32 1e-25 squared is 0: the rule asks for ratios alone."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).eval().requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[1e-25, 2e-25, 0.0]]))
    x = torch.ones(1, 3)
    found = DtdW2(model).attribute(x, 0) / model(x)
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.8, 0.0]]))
