"""Methods of patterns and relevance: in one layer, in what they add up to, and at their last layer; and the w²-rule at
padded borders: against zennit, by hand, by its sum, and beside PatternAttribution with S_w."""

import copy
import itertools
import math

import pytest
import torch
from helpers.small_networks import (
    Residual,
    filters,
    images,
    layers,
    pattern,
    patterns,
    seeded,
    sequential,
    state,
    varied,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from pattern_bench.core.backward import replaced_weights
from pattern_bench.core.canonical import canonical
from pattern_bench.core.estimators import Filter, Pattern
from pattern_bench.core.layers import LAYER_TYPES, PaddedConv2d
from pattern_bench.errors import UserError
from pattern_bench.methods.gradients import Gradient
from pattern_bench.methods.patterns import DtdW2, LrpZ, PatternAttribution, PatternNet

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


def test_one_linear_layer():
    """PatternNet gives a·y, PatternAttribution w ⊙ a·y, the w²-rule w²/‖w‖²·y, the z-rule x ⊙ w."""
    model = nn.Sequential(nn.Linear(4, 3)).double().eval()
    a, x, target = torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 1, 0])
    y, w = model(x).detach().gather(1, target[:, None]), model[0].weight.detach()[target]
    patterns = {"0": pattern(a)}
    torch.testing.assert_close(PatternNet(model, patterns).attribute(x, target), a[target] * y)
    torch.testing.assert_close(PatternAttribution(model, patterns).attribute(x, target), w * a[target] * y)
    torch.testing.assert_close(DtdW2(model).attribute(x, target), w**2 / (w**2).sum(1, keepdim=True) * y)
    torch.testing.assert_close(LrpZ(model).attribute(x, target), x * w)
    for kind in (PatternNet, PatternAttribution):
        plain = kind(model, patterns, last_layer="weight")
        torch.testing.assert_close(plain.attribute(x, target), w * y)


@pytest.mark.parametrize("make", [sequential, varied])
def test_filters_as_patterns(make):
    """a = w: the gradient times the output. S_w: the gradient of the network with normalised weights."""
    model, x = make(), images(3)
    y = model(x).max(1).values.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        PatternNet(model, patterns(model, lambda w: w)).attribute(x), Gradient(model).attribute(x) * y
    )
    if make is sequential:
        leaf = x.clone().requires_grad_()
        values, gates = leaf, []
        for module in model:  # gates are those of the true network, weights are normalised
            if isinstance(module, LAYER_TYPES):
                norm = module.weight.flatten(1).square().sum(1).view(-1, *[1] * (module.weight.ndim - 1))
                true = module(values)
                plain = copy.deepcopy(module)
                plain.weight = nn.Parameter(module.weight / norm, requires_grad=False)
                other = plain(values)
                values = other + (true - other).detach()
            else:
                gates.append(module)
                values = module(values)
        output = values.max(1).values
        (expected,) = torch.autograd.grad(output, leaf, output.detach())
        torch.testing.assert_close(PatternNet(model, filters(model)).attribute(x), expected)


def test_the_z_rule_without_biases_conserves_relevance():
    model, x = sequential(bias=False), images(3)
    relevance = LrpZ(model).attribute(x, 1)
    torch.testing.assert_close(relevance.sum((1, 2, 3)), model(x)[:, 1])
    torch.testing.assert_close(relevance, _z_rule(model, x, 1))
    residual = canonical(seeded(Residual()), x)
    torch.testing.assert_close(LrpZ(residual).attribute(x, 1).sum((1, 2, 3)), residual(x)[:, 1])


def test_the_z_rule_with_biases_lets_their_share_go_nowhere():
    model, x = sequential(bias=True), images(3)
    torch.testing.assert_close(LrpZ(model).attribute(x, 1), _z_rule(model, x, 1))


def _z_rule(model, x, target):
    """Bach et al.'s Eq. 56 with its divisions: R_i = x_i Σ_j w_ij R_j / y_j."""
    values = [x]
    for module in model:
        values.append(module(values[-1]))
    relevance = F.one_hot(torch.full((len(x),), target), 3) * values[-1]
    for module, below, above in reversed(list(zip(model, values, values[1:], strict=False))):
        if isinstance(module, nn.ReLU):
            continue  # passes relevance on unchanged
        leaf = below.clone().requires_grad_()
        share = torch.where(above == 0, 0.0, relevance / torch.where(above == 0, 1.0, above))
        relevance = below * torch.autograd.grad(module(leaf), leaf, share)[0]
    return relevance


class TwoHeads(nn.Module):
    """A sum of two output layers of different depth."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x))) + F.relu(self.c(x))


class ConvHead(nn.Module):
    """Ends as SqueezeNet does: convolution, ReLU, average pool."""

    def __init__(self):
        super().__init__()
        self.a, self.unused, self.b = nn.Conv2d(2, 4, 3), nn.Linear(2, 2), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return F.adaptive_avg_pool2d(F.relu(self.b(F.relu(self.a(x)))), 1).flatten(1)


@pytest.mark.parametrize(
    ("make", "last", "shape"),
    [
        (sequential, ("9",), (2, 2, 8, 8)),
        (varied, ("head",), (2, 2, 8, 8)),
        (lambda: seeded(TwoHeads()), ("b", "c"), (2, 6)),
        (lambda: seeded(ConvHead()), ("b",), (2, 2, 8, 8)),
    ],
)
@pytest.mark.parametrize("kind", [PatternNet, PatternAttribution])
def test_the_last_layer_may_use_its_weight(make, last, shape, kind):
    model, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    fitted = patterns(model)
    weight = {name: layer.weight for name, layer in layers(model).items()}
    as_weight = {n: pattern(weight[n] if kind is PatternNet else torch.ones_like(weight[n])) for n in last}
    expected = kind(model, {**fitted, **as_weight}).attribute(x)
    found = kind(model, fitted, last_layer="weight").attribute(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, kind(model, fitted).attribute(x))


def test_dead_neurons_and_neurons_without_weights_pass_nothing_on():
    model, x = sequential(), images(2)
    model[0].weight.data[1] = 0
    assert DtdW2(model).attribute(x).isfinite().all()
    nothing = {**patterns(model), "0": pattern(torch.zeros_like(model[0].weight))}
    assert PatternNet(model, nothing).attribute(x).abs().max() == 0


@pytest.mark.parametrize("kind", [PatternNet, PatternAttribution])
def test_bad_patterns(kind):
    model, x = sequential(), images(2)
    fitted = patterns(model)
    for nothing in (None, {}):
        with pytest.raises(UserError, match=f"{kind.name} needs patterns, and there are none: fit an estimator"):
            kind(model, nothing)
    lacking = {name: fitted[name] for name in ("0", "7", "9")}
    before = state(model)
    with pytest.raises(UserError, match=r"layer 3 \(Conv2d\) runs and has no pattern.*layer=all"):
        kind(model, lacking).attribute(x)
    assert state(model) == before
    with pytest.raises(UserError, match="the patterns' layer 33 is no layer of the network: did you mean"):
        kind(model, {**fitted, "33": fitted["3"]})
    with pytest.raises(UserError, match=r"pattern of layer 3 has shape \(4, 2, 3, 3\) and its weight \(6, 4, 3, 3\)"):
        kind(model, {**fitted, "3": fitted["0"]})
    with pytest.raises(UserError, match="pattern of layer 3 is not finite"):
        kind(model, {**fitted, "3": pattern(fitted["3"].positive * math.nan)})
    with pytest.raises(UserError, match="last_layer=negative is not possible: give positive or weight"):
        kind(model, fitted, last_layer="negative")


def test_what_is_far_below_the_output_is_not_lost():
    """As float32 holds it, down to 10^-30 of the output."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1e-15]])
    pattern = Pattern(layer.weight.data, layer.weight.data, torch.tensor([False]))
    found = PatternAttribution(layer.eval(), {"": pattern}).attribute(torch.tensor([[3.0, 2.0]]), torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([[3.0, 3e-30]]), rtol=1e-6, atol=0)


def test_what_outgrows_float32_is_scaled_and_the_rest_is_not():
    """Patterns of 5e4 in ten layers: 1e45. The direction is float64's; an image that fits is not touched."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(10)]).eval().requires_grad_(False)
    a = {str(i): torch.rand(3, 3) * 5e4 for i in range(10)}
    dead = torch.zeros(3, dtype=torch.bool)
    patterns = {name: Pattern(tensor, tensor, dead) for name, tensor in a.items()}
    x = torch.randn(2, 3)
    x[1] *= 1e-30
    found = PatternNet(model, patterns).attribute(x, 0)
    exact = PatternNet(
        copy.deepcopy(model).double(), {n: Pattern(t.double(), t.double(), dead) for n, t in a.items()}
    ).attribute(x.double(), 0)
    assert exact[0].abs().max() > 1e39
    ratio = (exact[0] / found[0].double()).log2()
    torch.testing.assert_close(ratio, ratio.mean().round().expand(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=0)
