"""Methods that cover parts of an image: by brute force, and in what they draw."""

import itertools

import pytest
import torch
from helpers.small_networks import (
    images,
    seeded,
    sequential,
)
from torch import nn

from pattern_bench.errors import UserError
from pattern_bench.methods.perturbation import Occlusion, PredictionDifference


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


def test_prediction_difference_needs_other_images_and_classes():
    with pytest.raises(UserError, match="one image and no reference"):
        PredictionDifference(sequential()).attribute(images(1))
    one = nn.Sequential(nn.Flatten(), nn.Linear(128, 1).double()).eval()
    with pytest.raises(UserError, match="has one output"):
        PredictionDifference(one).attribute(images(2))
