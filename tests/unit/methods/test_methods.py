"""Every explanation method: what it must equal, what it leaves alone, and what it refuses."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from captum import attr as captum
from helpers.small_networks import (
    METHOD_FILES,
    METHODS,
    filters,
    images,
    layers,
    method,
    of_file,
    pattern,
    patterns,
    seeded,
    sequential,
    state,
    varied,
)
from hydra.utils import instantiate
from torch import nn
from torch.nn import functional as F
from torchvision import models

from pattern_bench.configuration.location import CONF
from pattern_bench.core.backward import replaced_weights
from pattern_bench.core.canonical import canonical
from pattern_bench.core.estimators import Pattern
from pattern_bench.core.layers import LAYER_TYPES
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method, create
from pattern_bench.methods.gradients import DeConvNet, Gradient, GuidedBackProp, IntegratedGradients, SmoothGrad
from pattern_bench.methods.patterns import DtdW2, LrpZ, PatternAttribution, PatternNet
from pattern_bench.methods.perturbation import Occlusion, PredictionDifference


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- all methods ---


def test_every_method_has_its_file_and_says_what_it_is():
    assert {file.stem for file in METHOD_FILES} == METHODS
    for file in METHOD_FILES:
        kind = instantiate(of_file(file)).func
        assert issubclass(kind, Method)
        assert kind.name == file.stem
        assert kind.kind == (
            "function" if kind is Gradient else "signal" if kind in (DeConvNet, GuidedBackProp, PatternNet) else
            "attribution"
        )  # fmt: skip
        assert kind.needs_patterns == (kind in (PatternNet, PatternAttribution))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("make", [sequential, varied])
def test_what_holds_for_every_method(name, make):
    """Shape, targets, batches, callers without gradients; and the network, its input and torch are left alone."""
    model, x = make(), images(3)
    explain = method(name, model)
    before, random, given = state(model), torch.random.get_rng_state(), x.clone()
    found = explain.attribute(x)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert found.isfinite().all()
    assert all(image.abs().max() > 0 for image in found)
    assert not found.requires_grad

    predicted = model(x).argmax(1)
    close = {"rtol": 1e-5, "atol": 1e-6}  # captum computes parts in float32
    torch.testing.assert_close(explain.attribute(x, predicted), found)
    singles = [explain.attribute(image[None]) for image in x]
    torch.testing.assert_close(torch.cat(singles), found, **close)
    torch.testing.assert_close(explain.attribute(x, 1), explain.attribute(x, torch.tensor([1, 1, 1])))
    assert not torch.allclose(explain.attribute(x, 1), explain.attribute(x, 2))

    with torch.no_grad():
        torch.testing.assert_close(explain.attribute(x), found)
    with torch.inference_mode():
        torch.testing.assert_close(explain.attribute(x.clone(), predicted.clone()), found)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(explain.attribute(x), found)

    assert torch.equal(x, given)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert state(model) == before
    with pytest.raises(UserError):
        explain.attribute(x[:, :1])
    with pytest.raises(UserError):
        explain.attribute(x, 3)
    assert state(model) == before


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_second_derivative_is_silently_wrong(name):
    """The input may require a gradient; asking for the explanation's own is an error."""
    explain, x = method(name, sequential()), images(2).requires_grad_()
    found = explain.attribute(x)
    torch.testing.assert_close(found.detach(), explain.attribute(x.detach()))
    assert x.grad is None
    with pytest.raises(UserError, match=r"cannot be differentiated.*inputs.detach\(\)"):
        (x.sum() + found.sum()).backward()


def test_parameters_that_require_gradients_get_none():
    model, x = sequential().requires_grad_(), images(2)
    expected = method("pattern_attribution", sequential()).attribute(x)
    torch.testing.assert_close(method("pattern_attribution", model).attribute(x), expected)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_replaced_weights_refuse_a_second_derivative():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 1)), torch.randn(2, 3, requires_grad=True)
    with replaced_weights(model, {"0": torch.randn(3, 3)}):
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_a_forward_of_the_users_own_survives():
    """One that was put on the module, as some libraries do, is called and put back."""
    model, x = sequential(), images(2)
    expected = method("lrp_z", model).attribute(x)
    calls, original = [], model[3].forward

    def forward(y):
        calls.append(1)
        return original(y)

    model[3].forward = forward
    torch.testing.assert_close(method("lrp_z", model).attribute(x), expected)
    assert model[3].forward is forward
    assert calls


@pytest.mark.parametrize("name", ["pattern_net", "pattern_attribution", "lrp_z", "dtd_w2", "gradient"])
def test_one_forward_pass_and_no_copy(name):
    model, calls = sequential(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    method(name, model).attribute(images(2))
    assert len(calls) == 1


# --- equalities ---


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


@pytest.mark.parametrize("make", [sequential, varied])
def test_gradients_equal_autograds(make):
    model, x = make(), images(3)
    leaf = x.clone().requires_grad_()
    model(leaf * 1)[:, 2].sum().backward()
    torch.testing.assert_close(Gradient(model).attribute(x, 2), leaf.grad)
    torch.testing.assert_close(LrpZ(model).attribute(x, 2), leaf.grad * x)


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


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(torch.cat([F.relu(self.b(x) + x), x], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(GuidedBackProp, captum.GuidedBackprop), (DeConvNet, captum.Deconvolution)]
)
def test_modified_relus_equal_captums_on_relu_modules(ours, theirs):
    x = images(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(sequential()).attribute(x.clone(), target=1)
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours(sequential()).attribute(x, 1), expected)
    torch.testing.assert_close(ours(sequential(inplace=True)).attribute(x, 1), expected)


class ResidualModules(nn.Module):
    """A ReLU module whose input has another reader, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        x = self.relu(x) + x
        return self.head(self.relu(self.b(x)))


@pytest.mark.parametrize(("ours", "theirs"), [(GuidedBackProp, "GuidedBackprop"), (DeConvNet, "DeconvNet")])
def test_modified_relus_equal_zennits_on_relu_modules(ours, theirs):
    attribution = pytest.importorskip("zennit.attribution")
    composites = pytest.importorskip("zennit.composites")
    for model, x in ((sequential(), images(3)), (seeded(ResidualModules()), torch.randn(3, 6).double())):
        found = ours(model).attribute(x, 1)
        with attribution.Gradient(model, getattr(composites, theirs)()) as their:
            _, expected = their(x.clone(), torch.eye(3).double()[[1] * 3])
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [GuidedBackProp, DeConvNet])
def test_modified_relus_do_not_depend_on_how_they_are_written(kind):
    x = images(3)
    torch.testing.assert_close(kind(varied(True)).attribute(x), kind(varied(False)).attribute(x))

    class Written(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.net, self.relu = sequential(), relu

        def forward(self, x):
            for module in self.net:
                x = self.relu(x) if isinstance(module, nn.ReLU) else module(x)
            return x

    expected = kind(sequential()).attribute(x)
    shared = nn.ReLU(inplace=True)
    for relu in (
        F.relu, torch.relu, torch.relu_, torch.Tensor.relu, shared, lambda x: F.relu(x, True), lambda x: x.clamp(min=0),
        lambda x: x.clamp_(0), lambda x: F.relu(input=x, inplace=True), lambda x: torch.clamp_min(x, 0),
        nn.Hardtanh(0, 1e9, inplace=True), lambda x: (F.relu_(x), x)[1],
    ):  # fmt: skip
        torch.testing.assert_close(kind(Written(relu).eval()).attribute(x), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_modified_relus_by_hand(gated):
    class Net(nn.Module):
        def forward(self, x):
            return F.relu6(x * x.new_tensor([1, -2, 1, 1])) * x.new_tensor([3, 3, -3, 1])

    x = torch.tensor([[1.0, 2.0, 1.0, 7.0]])  # open, closed, open with a negative gradient, saturated
    model = nn.Sequential(Net(), nn.Linear(4, 2)).eval().requires_grad_(False)
    model[1].weight.data.fill_(1.0)
    found = (GuidedBackProp if gated else DeConvNet)(model).attribute(x, 0)
    assert found.tolist() == [[3.0, 0.0, 0.0, 0.0] if gated else [3.0, -6.0, 0.0, 1.0]]


def test_the_gradient_of_a_network_with_relu6_at_its_ends():
    x = torch.tensor([[-1.0, 0.0, 3.0, 6.0, 7.0]])
    model = nn.Sequential(nn.ReLU6(), nn.Linear(5, 2)).eval()
    model[1].weight.data.fill_(1.0)
    assert GuidedBackProp(model).attribute(x, 0).tolist()[0][:3] == [0.0, 0.0, 1.0]
    assert GuidedBackProp(model).attribute(x, 0).tolist()[0][4] == 0.0


def test_integrated_gradients_are_complete_and_exact_where_linear():
    model, x = sequential(), images(2)
    found = IntegratedGradients(model, steps=100).attribute(x, 1)
    torch.testing.assert_close(
        found.sum((1, 2, 3)), model(x)[:, 1] - model(torch.zeros_like(x))[:, 1], rtol=1e-2, atol=1e-2
    )
    line = nn.Sequential(nn.Flatten(), nn.Linear(128, 2).double()).eval()
    w = line[1].weight.detach()[0].view(1, 2, 8, 8)
    torch.testing.assert_close(
        IntegratedGradients(line, steps=3, baseline=0.5).attribute(x, 0), (x - 0.5) * w, rtol=1e-6, atol=1e-6
    )


def test_smoothgrad():
    model, x = sequential(), images(2)
    torch.testing.assert_close(SmoothGrad(model, 3, noise=0.0).attribute(x), Gradient(model).attribute(x))
    found = SmoothGrad(model, 5, seed=1).attribute(x)
    assert torch.equal(SmoothGrad(model, 5, seed=1).attribute(x), found)
    assert not torch.allclose(SmoothGrad(model, 5, seed=2).attribute(x), found)
    torch.testing.assert_close(SmoothGrad(model, 5, seed=1, batch_size=2).attribute(x), found)
    drawn = torch.Generator().manual_seed(1)
    noise = torch.randn(5, 2, 8, 8, generator=drawn) * 0.15 * float(x[0].max() - x[0].min())
    expected = Gradient(model).attribute(x[:1] + noise, int(model(x[:1]).argmax())).mean(0)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def windows(size, side, stride):
    return [*range(0, size - side, stride), size - side]


def test_occlusion_by_brute_force():
    model, x = sequential(), images(2)
    total, count = torch.zeros(2, 1, 8, 8).double(), torch.zeros(8, 8)
    for i, j in itertools.product(windows(8, 4, 2), repeat=2):
        covered = x.clone()
        covered[..., i : i + 4, j : j + 4] = 0.3
        total[..., i : i + 4, j : j + 4] += (model(x) - model(covered))[:, 1].view(2, 1, 1, 1)
        count[i : i + 4, j : j + 4] += 1
    found = Occlusion(model, window=4, baseline=0.3, batch_size=5).attribute(x, 1)
    torch.testing.assert_close(found, (total / count).expand_as(x), rtol=1e-5, atol=1e-6)


def test_prediction_difference_by_brute_force():
    """Marginal sampling from a single image leaves no chance: every draw is that image's window."""
    model, x, other = sequential(), images(2), images(1, seed=5)

    def evidence(logits):
        p = (logits.softmax(1)[:, 1] * 1000 + 1) / (1000 + 3)
        return torch.log2(p / (1 - p))

    total, count = torch.zeros(2, 1, 8, 8).double(), torch.zeros(8, 8)
    for i, j in itertools.product(windows(8, 3, 2), repeat=2):
        changed = x.clone()
        changed[..., i : i + 3, j : j + 3] = other[..., i : i + 3, j : j + 3]
        total[..., i : i + 3, j : j + 3] += (evidence(model(x)) - evidence(model(changed))).view(2, 1, 1, 1)
        count[i : i + 3, j : j + 3] += 1
    settings = {"window": 3, "stride": 2, "samples": 2, "training_images": 1000, "batch_size": 7}
    found = PredictionDifference(model, other, **settings).attribute(x, 1)
    torch.testing.assert_close(found, (total / count).expand_as(x))
    among = PredictionDifference(model, **settings).attribute(torch.cat([x[:1], other]), 1)
    torch.testing.assert_close(among[0], found[0])  # the only other image of the batch


@pytest.mark.parametrize("sampling", ["marginal", "conditional"])
def test_prediction_differences_draws(sampling):
    model, x, reference = sequential(), images(2), images(4, seed=3)
    settings = {"sampling": sampling, "window": 3, "stride": 3, "samples": 3, "patches": 300}
    found = PredictionDifference(model, reference, seed=1, **settings).attribute(x)
    again = PredictionDifference(model, reference, seed=1, batch_size=4, **settings).attribute(x)
    torch.testing.assert_close(again, found)
    assert not torch.allclose(PredictionDifference(model, reference, seed=2, **settings).attribute(x), found)
    assert PredictionDifference(model, **settings).attribute(x).isfinite().all()


def test_conditional_sampling_finds_the_conditional_gaussian():
    """Of pixels x₂ = x₁ + noise, given x₁: mean x₁ and the noise's deviation; and no spread where there is no noise."""
    from pattern_bench.methods.perturbation import _Conditional

    draw = torch.Generator().manual_seed(0)
    base = torch.randn(20000, 1, 1, generator=draw).double()
    others = torch.cat([base, base + 0.5 * torch.randn(base.shape, generator=draw).double()], 2)
    content = _Conditional(others, side=1, margin=1, patches=20000, seed=0)
    image = torch.tensor([[1.0, 99.0]]).double()
    drawn = content.draw(image, (slice(None), slice(1, 2)), 4000, draw)
    assert drawn.shape == (4000, 1, 1)
    assert abs(float(drawn.mean()) - 1) < 0.05
    assert abs(float(drawn.std()) - 0.5) < 0.05


def test_features_without_space_have_windows_too():
    model, x = seeded(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))), torch.randn(3, 6).double()
    expected = torch.stack([(model(x) - model(x.index_fill(1, torch.tensor(i), 0.0)))[:, 1] for i in range(6)], 1)
    torch.testing.assert_close(Occlusion(model).attribute(x, 1), expected, rtol=1e-5, atol=1e-6)
    for sampling in ("marginal", "conditional"):
        assert PredictionDifference(model, sampling=sampling).attribute(x).shape == x.shape


# --- the last layer ---


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


@pytest.mark.parametrize("architecture", ["googlenet", "mobilenet_v2"])
def test_known_networks(architecture):
    """Functional ReLUs, concatenation and auxiliary heads that do not run; depthwise layers, residuals and ReLU6."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    settings = (
        {"init_weights": True, "aux_logits": True, "transform_input": True} if architecture == "googlenet" else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = canonical(getattr(models, architecture)(num_classes=7, **settings).eval(), x)
    used = {name: pattern for name, pattern in patterns(model).items() if not name.startswith("aux")}
    for kind in (Gradient, DeConvNet, GuidedBackProp, LrpZ, DtdW2):
        assert kind(model).attribute(x).abs().max() > 0, kind
    for last in ("positive", "weight"):
        found = PatternNet(model, used, last_layer=last).attribute(x)
        assert found.isfinite().all()
        assert found.abs().max() > 0


# --- bad input ---


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        (images(2), 3, r"target=3 is out of range: the network has 3 outputs, so give 0 to 2"),
        (images(2), torch.tensor([0, -1]), "target=-1 is out of range"),
        (images(2), torch.tensor([0, 1, 2]), r"target=torch.int64 of shape \(3,\) is not possible: .*tensor of 2"),
        (images(2), torch.tensor([0.0, 1.0]), r"target=torch.float32 of shape \(2,\) is not possible"),
        (images(2), "cat", "target='cat' is not possible: give one whole number"),
        (images(2), True, "target=True is not possible"),
        (images(2, size=6), None, r"Sequential cannot take inputs of shape \(2, 2, 6, 8\).*size"),
        (images(2)[0], None, r"cannot take inputs of shape \(2, 8, 8\)|from inputs of shape \(2, 8, 8\)"),
        (images(2)[:0], None, r"inputs has shape \(0, 2, 8, 8\): give a batch of at least one"),
        (images(2).float(), None, r"dtype torch.float32, and Sequential computes in torch.float64: give inputs.to"),
        (images(2).long(), None, "dtype torch.int64"),
        (images(2).index_fill(0, torch.tensor(1), math.nan), None, "image 1 of inputs holds NaN"),
        (images(2).index_fill(0, torch.tensor(0), math.inf), None, "image 0 of inputs holds an infinite value"),
        ([1, 2], None, "inputs is a list: give a tensor"),
        (images(2).to("meta"), None, "inputs is on meta and the network on cpu: give inputs.to"),
    ],
)
def test_bad_inputs(name, inputs, target, message):
    model = sequential()
    before = state(model)
    with pytest.raises(UserError, match=f"{name}: .*(?:{message})"):
        method(name, model).attribute(inputs, target)
    assert state(model) == before


@pytest.mark.parametrize("name", sorted(METHODS))
def test_bad_models(name):
    model, x = sequential(), images(2)
    explain = method(name, model)
    model[1].train()
    with pytest.raises(UserError, match=rf"{name}: Sequential is in training mode \(module 1\): call model.eval"):
        explain.attribute(x)
    assert model[1].training
    kind = instantiate(of_file(CONF / "method" / f"{name}.yaml"))
    with pytest.raises(UserError, match="model is a function: give a torch"):
        create(kind, lambda x: x, patterns(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(sequential(), x)
    with pytest.raises(UserError, match="compiled by TorchScript"):
        create(kind, traced, patterns(model))
    with torch.inference_mode():
        other = sequential()
    with pytest.raises(UserError, match=r"made inside torch\.inference_mode"):
        create(kind, other, patterns(model)).attribute(x)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = sequential()

    def forward(self, x):
        return self.net(x).detach()


class Several(Detached):
    def forward(self, x):
        return self.net(x), x


class Flat(Detached):
    def forward(self, x):
        return self.net(x).sum(1)


@pytest.mark.parametrize("kind", [Gradient, LrpZ, GuidedBackProp])
def test_bad_outputs(kind):
    for network, message in (
        (Detached, "has no gradient with respect to its input"),
        (Several, "returns a tuple"),
        (Flat, r"outputs of shape \(2,\)"),
    ):
        with pytest.raises(UserError, match=message):
            kind(network().eval()).attribute(images(2))


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


@pytest.mark.parametrize("kind", [LrpZ, DtdW2, PatternNet, PatternAttribution])
def test_unsupported_modules(kind):
    more = (patterns(sequential()),) if kind.needs_patterns else ()
    for module in (nn.ConvTranspose2d(2, 2, 1), nn.LSTM(8, 8), nn.MultiheadAttention(8, 2), nn.Bilinear(2, 2, 2)):
        model = nn.Sequential(module, sequential()).eval()
        with pytest.raises(UserError, match=rf"{kind.name}: module 0 \({type(module).__name__}\).*rewrite"):
            kind(model, *more)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(UserError, match="computes its weight: bring the network into canonical form"):
        kind(model, *more)


@pytest.mark.parametrize("kind", [DeConvNet, GuidedBackProp])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(inplace=True), nn.LeakyReLU(), nn.Hardswish(), nn.PReLU()])
def test_other_rectifiers_are_refused(kind, activation):
    model = nn.Sequential(nn.Linear(3, 3), activation, nn.Linear(3, 2)).eval()
    with pytest.raises(
        UserError, match=rf"{kind.name} is defined for networks with ReLU or ReLU6.*computes \w+: choose"
    ):
        kind(model).attribute(torch.randn(2, 3))
    Gradient(model).attribute(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (IntegratedGradients, {"steps": 0}, "integrated_gradients: steps=0 .*at least 1"),
        (IntegratedGradients, {"baseline": "black"}, "baseline=black"),
        (SmoothGrad, {"noise": -1}, "noise=-1"),
        (SmoothGrad, {"samples": 1.5}, "samples=1.5"),
        (SmoothGrad, {"seed": -1}, "seed=-1"),
        (Occlusion, {"window": 0}, "window=0"),
        (Occlusion, {"window": 9}, "window=9 does not fit into images of 8×8"),
        (Occlusion, {"window": 2, "stride": 3}, "stride=3 leaves pixels"),
        (PredictionDifference, {"sampling": "joint"}, "sampling=joint .*marginal or conditional"),
        (PredictionDifference, {"window": 2, "stride": 3}, "stride=3 leaves pixels"),
        (PredictionDifference, {"samples": 0}, "samples=0"),
        (PredictionDifference, {"reference": images(2)[:, :, :4]}, r"reference has shape \(2, 2, 4, 8\) and inputs"),
        (PredictionDifference, {"reference": images(2) * math.nan}, "reference must be .*finite"),
    ],
)
def test_bad_settings(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(sequential(), **settings).attribute(images(2))


def test_prediction_difference_needs_other_images_and_classes():
    with pytest.raises(UserError, match="one image and no reference"):
        PredictionDifference(sequential()).attribute(images(1))
    one = nn.Sequential(nn.Flatten(), nn.Linear(128, 1).double()).eval()
    with pytest.raises(UserError, match="has one output"):
        PredictionDifference(one).attribute(images(2))


def test_out_of_memory_is_not_mistaken_for_a_wrong_size():
    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        Gradient(Full().eval()).attribute(images(2))


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
