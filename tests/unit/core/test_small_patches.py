"""Sums over small patches, taken in pieces, are those over all patches at once."""

import pytest
import torch
from torch import nn

from pattern_bench.core import small_patches
from pattern_bench.core.layers import Scratch, geometry_of, pad, patches

LAYERS = {
    "dense": (lambda: nn.Linear(7, 5), (7,)),
    "1×1": (lambda: nn.Conv2d(6, 4, 1), (6, 5, 4)),
    "1×1, strided": (lambda: nn.Conv2d(6, 4, 1, stride=2), (6, 5, 4)),
    "3×3": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 7, 8)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2), (3, 8, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), (6, 5, 5)),
    "grouped, strided": (lambda: nn.Conv2d(6, 9, 3, groups=3, stride=(2, 1)), (6, 7, 5)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 5, groups=2, stride=2), (4, 12)),
    "three dimensions": (lambda: nn.Conv3d(2, 4, (1, 3, 2), groups=2), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("cache", "long"), [(2**22, 1024), (1, 1), (3000, 40), (1500, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_in_pieces_are_brute_force(monkeypatch, name, cache, long, layout):
    monkeypatch.setattr(small_patches, "CACHE", cache)
    monkeypatch.setattr(small_patches, "LONG", long)
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().requires_grad_(False), torch.randn(7, *shape)
    if x.ndim == 4:
        x = x.contiguous(memory_format=layout)
    geometry, y = geometry_of(layer), layer(x)
    weight = layer.weight.flatten(1).double()
    found = small_patches.sums_of(
        pad(x, geometry), y, weight, geometry.unpadded(), gram=True, scratch=Scratch(), memory=2**30
    )
    groups = geometry.groups
    p = patches(x.double(), geometry) if geometry.kernel else x.double()[None]  # (G, samples, D)
    g = (y > 0).double().transpose(0, 1).flatten(1).view(groups, -1, p.shape[1])  # (G, N/G, samples)
    u = weight.view(groups, -1, p.shape[2]) @ p.mT
    expected = {
        "x": p.sum(1),
        "g": g.sum(2).flatten(),
        "xg": (g @ p).flatten(0, 1),
        "xug": (u * g @ p).flatten(0, 1),
        "xun": (u * (1 - g) @ p).flatten(0, 1),
        "gram": p.mT @ p,
    }
    for key, value in expected.items():
        torch.testing.assert_close(getattr(found, key), value, rtol=1e-12, atol=1e-12, msg=key)
