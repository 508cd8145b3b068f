"""Layers are found in the order they run, and chosen by name."""

import pytest
import torch
from torch import nn

from pattern_bench.configuration.build import build
from pattern_bench.core.collector import Collector
from pattern_bench.core.network import (
    collecting,
    layers_in_order,
    refuse_without_weights,
    refusing_other_layers,
    select_layers,
)
from pattern_bench.errors import UserError

PHOTO, DIGIT = torch.rand(3, 64, 64), torch.rand(1, 8, 8)
PHOTO, DIGIT = torch.rand(3, 64, 64), torch.rand(1, 8, 8)


def built(configure, *overrides, sample=PHOTO, classes=10):
    return build(configure(*overrides).model).build(sample, classes)


def test_layers_are_chosen_by_name_list_or_glob(configure):
    names = layers_in_order(built(configure, "model=small_vgg", sample=DIGIT), DIGIT[None])
    assert names == ["features.0", "features.2", "features.5", "features.7", "classifier.1", "classifier.3"]
    assert select_layers(names, "all") == names
    assert select_layers(names, "features.2") == ["features.2"]
    assert select_layers(names, "features.*") == names[:4]
    assert select_layers(names, ["classifier.3", "features.[02]"]) == ["features.0", "features.2", "classifier.3"]
    with pytest.raises(UserError, match=r"layer=feature.0 matches no layer.*did you mean features.0"):
        select_layers(names, "feature.0")
    with pytest.raises(UserError, match="selects no layer"):
        select_layers(names, [])


def test_hooks_count_every_call_and_leave_nothing_behind():
    """A shared layer followed by an in-place ReLU: expectations run over both calls, on pre-activations."""
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.ReLU(inplace=True), shared, nn.ReLU(inplace=True)).requires_grad_(False)
    x = torch.randn(50, 3, dtype=torch.float64)
    collectors = {"0": Collector(shared, True)}
    with collecting(model, collectors):
        model(x)
    assert not shared._forward_hooks
    both = torch.cat([x, shared(x).relu()])
    moments = collectors["0"].moments()
    torch.testing.assert_close(moments.gram[0], both.T @ both)
    torch.testing.assert_close(moments.g, (shared(both) > 0).double().sum(0))
    with pytest.raises(RuntimeError), collecting(model, collectors):
        model(torch.zeros(1, 4, dtype=torch.float64))
    assert not shared._forward_hooks


class Branches(nn.Module):
    """Each image goes through one of two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dark, self.light, self.fc = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.cat([(self.light if image.mean() > 0.3 else self.dark)(image[None]) for image in x]))


def test_layers_that_an_example_did_not_run_are_refused_where_they_are_wanted():
    model, dark = Branches(), torch.zeros(2, 3)
    light = dark + 1
    known = layers_in_order(model, dark[:1])
    assert known == ["dark", "fc"]
    for wanted in ("all", "light", "l*", ["fc", "light"]):
        with refusing_other_layers(model, known, wanted):
            model(dark)
            with pytest.raises(UserError, match="layer light runs for some images, and not for the first one"):
                model(light)
    with refusing_other_layers(model, known, ["fc", "dark"]):
        model(light)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_without_layers_has_none_to_choose():
    with pytest.raises(UserError, match="runs no Conv1d, Conv2d, Conv3d or Linear layer, so there is nothing to"):
        select_layers([], "all")


def test_weights_on_the_device_meta_have_no_values():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).eval()
    refuse_without_weights(model)
    model[1].running_var = model[1].running_var.to("meta")
    with pytest.raises(UserError, match=r"model=Sequential: 1.running_var has no values, since it is on the device"):
        refuse_without_weights(model)
