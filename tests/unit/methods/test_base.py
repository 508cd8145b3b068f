"""Every explanation method: what it must equal, what it leaves alone, and what it refuses."""

import math
import warnings

import pytest
import torch
from helpers.small_networks import (
    METHOD_FILES,
    METHODS,
    images,
    method,
    of_file,
    patterns,
    sequential,
    state,
    varied,
)
from hydra.utils import instantiate
from torch import nn
from torchvision import models

from pattern_bench.configuration.location import CONF
from pattern_bench.core.backward import replaced_weights
from pattern_bench.core.canonical import canonical
from pattern_bench.errors import UserError
from pattern_bench.methods.base import Method, create
from pattern_bench.methods.gradients import DeConvNet, Gradient, GuidedBackProp, IntegratedGradients, SmoothGrad
from pattern_bench.methods.patterns import DtdW2, LrpZ, PatternAttribution, PatternNet
from pattern_bench.methods.perturbation import Occlusion, PredictionDifference

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
    explanation = method(name, model)
    explanation.attribute(images(2))  # the first time, the network is tried with other batches
    calls.clear()
    explanation.attribute(images(2))
    assert len(calls) == 1


# --- the last layer ---


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


def test_out_of_memory_is_not_mistaken_for_a_wrong_size():
    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        Gradient(Full().eval()).attribute(images(2))
