"""Explanations from Python leave networks as they were, and follow their changes."""

import pytest
import torch
from helpers.batches import loader
from helpers.endings import images, plain
from helpers.own_network import Residual
from torchvision import models

import pattern_bench as pb


@pytest.mark.parametrize("make", [lambda: models.resnet18(num_classes=10), lambda: Residual()])
def test_networks_with_batch_norm_and_sums_are_explained_and_left_as_they_were(make):
    torch.manual_seed(0)
    model = make().eval()
    channels = next(model.parameters()).shape[1]
    batches = loader(size=32, channels=channels)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    moments = pb.collect_moments(model, (x for x, _ in batches), gram=False)
    patterns = pb.fit_patterns(model, moments)
    x = batches[0][0][:3]
    for kind in (pb.PatternNet, pb.PatternAttribution):
        found = kind(model, patterns).attribute(x, target=3)
        assert found.shape == x.shape
        assert found.isfinite().all()
        assert found.abs().sum() > 0
        single = torch.cat([kind(model, patterns).attribute(image[None], target=3) for image in x])
        torch.testing.assert_close(found, single, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())


def test_other_weights_are_noticed(network):
    """The canonical form is kept, but not for weights that have changed since."""
    x = loader()[0][0]
    moments = pb.collect_moments(network, loader())
    before = pb.PatternNet(network, pb.fit_patterns(network, moments)).attribute(x)
    with torch.no_grad():
        network[6].weight.mul_(2)
        network[6].bias.zero_()
    again = pb.fit_patterns(network, pb.collect_moments(network, loader()))
    assert not torch.allclose(pb.PatternNet(network, again).attribute(x), before)


@pytest.mark.parametrize("kind", [pb.PatternNet, pb.PatternAttribution])
def test_an_output_that_never_fired_is_explained_by_its_own_weight_and_it_is_said(kind):
    model, x = plain(), images()
    with torch.no_grad():
        model[4].bias[2] = -1e3
    patterns = pb.fit_patterns(model, pb.collect_moments(model, [x], gram=False))
    assert patterns["4"].dead[2]
    with pytest.warns(UserWarning, match="never fired where patterns were fitted.*own weight is propagated instead"):
        found = kind(model, patterns).attribute(x, 2)
    torch.testing.assert_close(found, kind(model, patterns, last_layer="weight").attribute(x, 2))
    assert found.abs().amax() > 0
