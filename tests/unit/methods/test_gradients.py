"""Methods of gradients: against autograd, captum and zennit, by hand, and in what they must add up to."""

import warnings

import pytest
import torch
from captum import attr as captum
from helpers.small_networks import (
    images,
    seeded,
    sequential,
    varied,
)
from torch import nn
from torch.nn import functional as F

from pattern_bench.methods.gradients import DeConvNet, Gradient, GuidedBackProp, IntegratedGradients, SmoothGrad
from pattern_bench.methods.patterns import LrpZ


@pytest.mark.parametrize("make", [sequential, varied])
def test_gradients_equal_autograds(make):
    model, x = make(), images(3)
    leaf = x.clone().requires_grad_()
    model(leaf * 1)[:, 2].sum().backward()
    torch.testing.assert_close(Gradient(model).attribute(x, 2), leaf.grad)
    torch.testing.assert_close(LrpZ(model).attribute(x, 2), leaf.grad * x)


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
