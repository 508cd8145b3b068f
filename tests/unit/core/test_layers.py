"""Patches, at every position and at positions that are drawn."""

import torch
from torch import nn

from pattern_bench.core.layers import draw_positions, geometry_of, patches, patches_at


def test_patches_at_every_position_are_all_patches(layer_and_input):
    layer, x = layer_and_input
    if isinstance(layer, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
    geometry = geometry_of(layer)
    there = patches(x, geometry).shape[1] // len(x)
    every = torch.arange(there).expand(len(x), -1)
    torch.testing.assert_close(patches_at(x, geometry, every), patches(x, geometry))


def test_positions_are_drawn_evenly_and_whatever_the_batches():
    one = draw_positions(3000, 10, 4, torch.Generator().manual_seed(0))
    assert one.min() == 0
    assert one.max() == 9
    assert (one.flatten().bincount() / 3000 - 0.4).abs().max() < 0.04
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.cat([draw_positions(n, 10, 4, generator) for n in (1, 7, 2992)]), one)
