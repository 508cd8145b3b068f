"""Scores against a known truth, against brute force and closed forms."""

import itertools

import pytest
import torch

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
