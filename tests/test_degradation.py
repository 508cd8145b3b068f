import torch

from pattern_bench.core.degradation import (
    area_over_curve,
    degradation_curve,
    degraded,
    random_ranks,
    rank_patches,
)


def test_a_case_computed_by_hand():
    """A 5×4 image with 2×2 patches: the last row belongs to no whole patch and stays."""
    image = torch.arange(20.0).view(1, 1, 5, 4)
    heat = torch.zeros(1, 1, 5, 4)
    heat[0, 0, 2, 2] = 3.0  # lower right patch first
    heat[0, 0, 0, 0], heat[0, 0, 1, 1] = 5.0, -4.0  # upper left next: 5 - 4 = 1
    heat[0, 0, 0, 2] = -1.0  # upper right last
    heat[0, 0, 4, :] = 100.0  # outside every patch
    ranks = rank_patches(heat, 2)
    assert ranks.tolist() == [[[1, 3], [2, 0]]]
    images = [step.clone()[0, 0] for step in degraded(image, ranks, 2, 2)]
    assert torch.equal(images[0], image[0, 0])
    first = image[0, 0].clone()
    first[2:4, 2:4] = (10 + 11 + 14 + 15) / 4
    assert torch.equal(images[1], first)
    first[0:2, 0:2] = (0 + 1 + 4 + 5) / 4
    assert torch.equal(images[2], first)

    def network(x):
        """Logits (sum of the lower right patch's first pixel, 0)."""
        return torch.stack([x[:, 0, 2, 2], torch.zeros(len(x))], 1) / 10

    curve = degradation_curve(network, image, ranks, torch.tensor([0]), 2, 2)
    expected = torch.tensor([[10.0, 12.5, 12.5]]).div(10).sigmoid()
    torch.testing.assert_close(curve, expected)
    torch.testing.assert_close(area_over_curve(curve), (expected[:, 0] - expected.mean(1)))


def test_patches_are_replaced_by_their_mean_per_channel_and_the_input_is_kept():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 6)
    before = images.clone()
    ranks = rank_patches(torch.randn(2, 3, 6, 6), 3)
    *_, last = degraded(images, ranks, 3, 4)
    for row, column in ((0, 0), (0, 3), (3, 0), (3, 3)):
        mean = images[:, :, row : row + 3, column : column + 3].mean((2, 3), keepdim=True)
        torch.testing.assert_close(last[:, :, row : row + 3, column : column + 3], mean.expand(2, 3, 3, 3))
    assert torch.equal(images, before)


def test_random_ranks_are_permutations_that_follow_the_seed():
    first, again, other = (random_ranks(3, 4, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.flatten(1).sort(1).values, torch.arange(20).expand(3, 20))
