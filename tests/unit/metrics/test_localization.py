"""Scores against a known truth, against brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from pattern_bench.metrics.earth_mover import closeness
from pattern_bench.metrics.localization import angle, magnitude, precision, share


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(images, side, pixels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, side * side, generator=generator).argsort(1)
    return (order < pixels).view(images, side, side)


def test_magnitudes_are_summed_over_channels_and_do_not_depend_on_scale():
    heat = maps(3, 2, 4, 4)
    assert torch.allclose(magnitude(heat), magnitude(-1e30 * heat.double()))
    expected = heat.double().abs().sum(1)
    assert torch.allclose(magnitude(heat) * heat.double().abs().amax((1, 2, 3))[:, None, None], expected)


def test_precision_equals_brute_force():
    heat, truth = maps(6, 2, 5, 5), masks(6, 5, 7)
    for found, values, mask in zip(precision(heat, truth), heat.abs().sum(1), truth, strict=True):
        best = sorted(itertools.product(range(5), range(5)), key=lambda at: -float(values[at]))[:7]
        assert float(found) == pytest.approx(sum(bool(mask[at]) for at in best) / 7)


def test_precision_of_a_random_map_is_the_masks_share():
    truth = masks(3000, 8, 8)
    assert float(precision(maps(3000, 1, 8, 8), truth).mean()) == pytest.approx(8 / 64, abs=0.01)
    assert torch.allclose(precision(torch.ones(3000, 1, 8, 8), truth), torch.tensor(8 / 64).double())


def test_ties_at_the_last_place_count_with_their_share():
    heat = torch.tensor([3.0, 1.0, 1.0, 1.0]).view(1, 1, 2, 2)
    truth = torch.tensor([True, True, False, False]).view(1, 2, 2)
    assert float(precision(heat, truth)) == pytest.approx((1 + 1 / 3) / 2)


def test_precision_of_the_truth_is_one_and_of_nothing_undefined():
    truth = masks(4, 8, 5)
    assert precision(truth[:, None].float(), truth).tolist() == [1.0] * 4
    assert precision(torch.zeros(4, 1, 8, 8), truth).isnan().all()
    with pytest.raises(ValueError, match="mask is empty"):
        precision(maps(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool))


def test_shares_of_a_region_and_of_the_rest_make_one():
    heat, region = maps(5, 3, 6, 6), masks(1, 6, 9)[0]
    assert torch.allclose(share(heat, region) + share(heat, ~region), torch.ones(5).double())
    expected = heat.abs().sum(1)[:, region].sum(1) / heat.abs().sum((1, 2, 3))
    assert torch.allclose(share(heat, region), expected.double())
    assert share(torch.zeros(2, 1, 6, 6), region).isnan().all()


def test_angles_are_those_of_lines():
    heat = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 1e-30]])[:, None, None]
    signal = torch.tensor([1.0, 0.0]).expand(4, 2)[:, None, None]
    assert angle(heat, signal).tolist() == pytest.approx([0, 45, 0, 90], abs=1e-4)
    assert angle(torch.zeros(1, 1, 1, 2), signal[:1]).isnan().all()


@pytest.mark.parametrize(("dimensions", "degrees"), [(16, 78), (64, 84)])
def test_the_angle_of_random_maps_is_as_documented(dimensions, degrees):
    found = angle(maps(20000, 1, 1, dimensions), maps(20000, 1, 1, dimensions, seed=1))
    assert float(found.mean()) == pytest.approx(degrees, abs=0.5)


def test_the_distance_on_a_line_is_scipys():
    """All relevance and all truth in one row: the transport is one-dimensional."""
    heat, truth = torch.zeros(20, 1, 6, 6), torch.zeros(20, 6, 6, dtype=torch.bool)
    heat[:, 0, 2] = maps(20, 6)
    truth[:, 2] = masks(20, 6, 14)[:, 0] | (torch.arange(6) == 3)
    for found, values, mask in zip(closeness(heat, truth), heat[:, 0, 2].abs(), truth[:, 2], strict=True):
        expected = wasserstein_distance(range(6), range(6), values.double().numpy(), mask.double().numpy())
        assert float(found) == pytest.approx(1 - expected / (math.sqrt(2) * 5), abs=1e-6)


def test_the_distance_equals_the_best_assignment():
    """As many points of the same weight as the mask has pixels: some permutation is the best transport."""
    where, truth = masks(8, 8, 5), masks(8, 8, 5, seed=2)
    heat = where[:, None].float() * torch.tensor([1.0, -1.0]).repeat(4)[:, None, None, None]
    for found, points, mask in zip(closeness(heat, truth), where, truth, strict=True):
        sources, targets = points.nonzero().double().numpy(), mask.nonzero().double().numpy()
        least = min(np.linalg.norm(sources - targets[list(p)], axis=1).mean() for p in itertools.permutations(range(5)))
        assert float(found) == pytest.approx(1 - least / (math.sqrt(2) * 7), abs=1e-6)


def test_relevance_on_the_truth_is_close_and_in_the_far_corner_is_not():
    truth = torch.zeros(3, 8, 8, dtype=torch.bool)
    truth[:, 0, 0] = True
    heat = torch.zeros(3, 1, 8, 8)
    heat[0, 0, 0, 0] = heat[1, 0, 7, 7] = 1
    found = closeness(heat, truth)
    assert found[:2].tolist() == pytest.approx([1, 0])
    assert found[2].isnan()


def test_larger_images_are_summed_in_cells():
    small, truth = maps(4, 1, 8, 8), masks(4, 8, 6)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    enlarged = truth.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.allclose(closeness(large, enlarged), closeness(small, truth), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"), [((8, 6), "8×6 are not square"), ((12, 12), "no multiple of 8"), ((8, 8), "mask is empty")]
)
def test_what_has_no_distance_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        closeness(maps(1, 1, *shape), torch.zeros(1, *shape, dtype=torch.bool))
