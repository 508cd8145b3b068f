"""Layers are found in the order they run, and chosen by name."""

import pytest
import torch
from torch import nn

from pattern_bench.configuration.build import build
from pattern_bench.core.collector import Collector
from pattern_bench.core.network import collecting, layers_in_order, select_layers
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
