"""Weights that are drawn again, layer by layer."""

import torch
from torch import nn

from pattern_bench.pipeline.randomisation import randomise


def test_randomised_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    before, state = first.weight.clone(), torch.random.get_rng_state()
    randomise(first, 5)
    randomise(second, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, before)
    randomise(second, 6)
    assert not torch.equal(first.weight, second.weight)
