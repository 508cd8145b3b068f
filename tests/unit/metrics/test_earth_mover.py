"""How near relevance lies to the truth: against scipy, the best assignment, and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from pattern_bench.metrics.earth_mover import closeness


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(images, side, pixels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, side * side, generator=generator).argsort(1)
    return (order < pixels).view(images, side, side)


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
