"""Moments are of the layers that every image runs; others are refused by name."""

import pytest
import torch
from torch import nn

import pattern_bench as pb
from pattern_bench.api import LayerMoments
from pattern_bench.core.collector import Collector
from pattern_bench.errors import UserError


class Branches(nn.Module):
    """Each image goes through one of two layers, or, ``whole``, the batch does."""

    def __init__(self, whole=False):
        super().__init__()
        torch.manual_seed(0)
        self.dark, self.light, self.fc = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.whole = whole

    def forward(self, x):
        parts = [x] if self.whole else x.split(1)
        return self.fc(torch.cat([(self.light if part.mean() > 100 else self.dark)(part) for part in parts]))


DARK = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LIGHT = DARK + 1000


def test_a_layer_that_only_later_images_run_is_refused_by_name():
    model = Branches().eval()
    for batches in ([DARK, LIGHT], [torch.cat([DARK, LIGHT])]):
        with pytest.raises(UserError, match=r"^layer light runs for some images, and not for the first one"):
            pb.collect_moments(model, batches)
    moments = pb.collect_moments(model, [DARK, LIGHT], layers=["dark", "fc"])
    assert [moments[name].n.item() for name in ("dark", "fc")] == [6, 12]


def test_a_layer_that_no_batch_runs_is_refused_by_name():
    model = Branches(whole=True).eval()
    batches = [torch.cat([DARK[:1], LIGHT])]
    with pytest.raises(UserError, match="layer light runs for some images"):
        pb.collect_moments(model, batches)
    with pytest.raises(UserError, match="layer dark runs for none of the batches of loader, though for their first im"):
        pb.collect_moments(model, batches, layers=["dark", "fc"])


def test_moments_of_no_patch_are_refused_by_argument_and_layer():
    model = Branches().eval()
    moments = pb.collect_moments(model, [DARK])
    patterns = pb.fit_patterns(model, moments)
    empty = LayerMoments(moments | {"dark": Collector(model.dark, True).moments()}, moments.example)
    for argument, use in (
        ("moments", lambda: pb.fit_patterns(model, empty)),
        ("probe", lambda: pb.evaluate(model, patterns, empty, moments)),
        ("test", lambda: pb.evaluate(model, patterns, moments, empty)),
    ):
        with pytest.raises(UserError, match=f"{argument}: the moments of layer dark are of no patch"):
            use()


def test_a_ridge_that_leaves_nothing_is_refused(network):
    moments = pb.collect_moments(network, [torch.rand(6, 3, 12, 12)])
    patterns = pb.fit_patterns(network, moments, "w")
    for ridge in (1.1e4, 1e300):
        with pytest.raises(UserError, match=r"regularisation=.* is not possible: give a number from 0 to 10000"):
            pb.evaluate(network, patterns, moments, moments, regularisation=ridge)
    pb.evaluate(network, patterns, moments, moments, regularisation=1e4)
