import pytest
import torch
from helpers.brute_force import GEOMETRIES
from torch import nn

from pattern_bench.core.backward import replaced_weights
from pattern_bench.core.estimators import Pattern
from pattern_bench.errors import UserError
from pattern_bench.methods.gradients import Gradient
from pattern_bench.methods.patterns import LrpZ, PatternAttribution, PatternNet


def network():
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="circular"), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(6 * 9, 3),
        )
        .double().eval().requires_grad_(False)
    )  # fmt: skip


def pattern(tensor):
    return Pattern(tensor, tensor, torch.zeros(len(tensor), dtype=torch.bool))


LAYERS = ("0", "3", "6")


@pytest.mark.parametrize("name", [n for n in GEOMETRIES if n != "linear_on_sequences"])
def test_the_layers_own_weight_gives_the_gradient(name):
    """For every geometry: back-propagation through a replaced weight is the gradient of a layer that has it."""
    torch.manual_seed(0)
    layer, shape = GEOMETRIES[name]()
    model = nn.Sequential(layer.double())
    other = torch.randn_like(layer.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with replaced_weights(model, {"0": other}):
        y = model(x)
        grad = torch.randn_like(y)
        (ours,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(y, layer(x))
    layer.weight.data = other
    (expected,) = torch.autograd.grad(layer(x), x, grad)
    torch.testing.assert_close(ours, expected)


def test_one_linear_layer_by_hand():
    """PatternNet gives a·y, PatternAttribution w ⊙ a·y."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double().eval()
    a, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 1, 0])
    y = model(x).gather(1, target[:, None])
    w = model[0].weight.detach()
    torch.testing.assert_close(PatternNet(model, {"0": pattern(a)}).attribute(x, target), a[target] * y)
    expected = w[target] * a[target] * y
    torch.testing.assert_close(PatternAttribution(model, {"0": pattern(a)}).attribute(x, target), expected)


def test_with_filters_as_patterns_patternnet_is_the_gradient():
    model, x = network(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    filters = {name: pattern(model.get_submodule(name).weight) for name in LAYERS}
    scale = model(x).max(1).values.view(-1, 1, 1, 1)
    torch.testing.assert_close(PatternNet(model, filters).attribute(x), Gradient(model).attribute(x) * scale)


def test_gradient_and_its_product_with_the_input_equal_autograd():
    model, x = network(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    model(leaf)[:, 1].sum().backward()
    target = torch.tensor([1, 1])
    torch.testing.assert_close(Gradient(model).attribute(x, target), leaf.grad)
    torch.testing.assert_close(LrpZ(model).attribute(x, target), leaf.grad * x)


def test_the_network_is_left_as_it_was_even_after_an_error():
    model, x = network(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    before = model(x)
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    method = PatternNet(model, {name: pattern(model.get_submodule(name).weight * 2) for name in LAYERS})
    with torch.no_grad():
        method.attribute(x)
    with pytest.raises(UserError, match="cannot take inputs"):
        method.attribute(x[:, :1])
    assert all(dict(module.__dict__) == state[name] for name, module in model.named_modules())
    assert torch.equal(model(x), before)


def test_a_batch_equals_single_images():
    model, x = network(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    method = PatternAttribution(model, {n: pattern(model.get_submodule(n).weight.abs()) for n in LAYERS})
    torch.testing.assert_close(method.attribute(x), torch.cat([method.attribute(image[None]) for image in x]))
