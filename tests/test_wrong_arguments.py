"""Wrong arguments from Python: each is one error that names the argument, its value and what to give."""

import pytest
import torch
from torch import nn

import pattern_bench as pb
from pattern_bench.core.quality import Probe
from pattern_bench.errors import UserError


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    images = torch.randn(6, 3, 8, 8)
    moments = pb.collect_moments(network.eval(), [images])
    return network, images, moments, pb.fit_patterns(network, moments)


def test_wrong_arguments_are_named(given):
    network, images, moments, patterns = given
    for argument, value in [
        ("positions", 0), ("positions", 1.5), ("positions", -1), ("positions", "a"), ("positions", torch.nan),
        ("memory", 0), ("memory", "1"), ("seed", None), ("seed", 1.5), ("layers", 3), ("layers", [3]),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"^{argument}=.* is not possible: give "):
            pb.collect_moments(network, [images], **{argument: value})
    for loader in (None, 3):
        with pytest.raises(UserError, match=rf"^loader={loader} yields nothing: give"):
            pb.collect_moments(network, loader)
    for batch in ((), images.to("meta"), images.to_sparse()):
        with pytest.raises(UserError, match=r"^loader yields .* where images should be: give"):
            pb.collect_moments(network, [batch])
    for model in (None, network.state_dict(), nn.Conv2d):
        with pytest.raises(UserError, match=r"^model=.* is no network: give"):
            pb.collect_moments(model, [images])
    for estimator in (None, 3, ["a"]):
        with pytest.raises(UserError, match=r"^estimator=.* is none: give"):
            pb.fit_patterns(network, moments, estimator)
    for wrong in (None, {}, dict(moments), patterns):
        with pytest.raises(UserError, match=r"^moments=.* is no moments: give"):
            pb.fit_patterns(network, wrong)
    for value in (-1, "a", torch.nan, torch.inf):
        with pytest.raises(UserError, match=r"^regularisation=.* is not possible: give"):
            pb.evaluate(network, patterns, moments, moments, regularisation=value)
    for wrong in ({"0": images}, images, moments):
        with pytest.raises(UserError, match=r"^patterns=.* is no patterns by layer: give"):
            pb.PatternAttribution(network, wrong)
    own = pb.PatternAttribution(network, patterns)
    for methods in (None, [own], own, {"own": 3}, {3: own}, {"own": pb.PatternAttribution}):
        with pytest.raises(UserError, match=r"^methods.* is not possible: give"):
            pb.degradation(network, images, methods, patch=4, steps=2)
        with pytest.raises(UserError, match=r"^methods.* is not possible: give"):
            pb.draw_gallery(network, images, methods, "never.png")
    for argument, value in [("seed", "a"), ("seed", 2**70), ("value", "a"), ("value", 1e39), ("value", [1, 2, 3])]:
        with pytest.raises(UserError, match=rf"^{argument}=.* is not possible: give"):
            pb.degradation(network, images, {}, patch=4, steps=2, replacement="constant", **{argument: value})


def test_a_singular_covariance_without_regularisation_ends(given):
    _, images, _, _ = given
    layer = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()  # 6 images cannot span 192 dimensions
    moments = pb.collect_moments(layer, [images])["1"]
    assert 0 < Probe(moments, 0.0).regularisation <= 1e-3


class Squeezing(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)[:, :, None, None].softmax(1).squeeze()


def test_a_softmax_whose_squeeze_also_removes_the_batch_is_taken_once(given):
    network, images, _, _ = given
    curves = pb.degradation(Squeezing(network).eval(), images, {}, patch=4, steps=2)
    torch.testing.assert_close(curves["random_order"][:, 0], network(images).softmax(1).max(1).values.detach())


class Choosing(Squeezing):
    def forward(self, x):
        return self.body(x).argmax(1)


def test_outputs_that_are_no_logits_are_refused(given):
    network, images, _, _ = given
    with pytest.raises(UserError, match=r"puts out torch.int64: explanations start from logits"):
        pb.collect_moments(Choosing(network).eval(), [images])
    with pytest.raises(UserError, match=r"the function that chooses its logits failed .KeyError"):
        pb.collect_moments(pb.Logits(network, lambda outputs: {}["logits"]), [images])
