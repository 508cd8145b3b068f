"""Sum over the patches of a layer whose patches are small, in float64.

Some images and groups are unfolded at a time, so that their patches stay in the processor's cache. Shapes: B images, C
input channels, G groups, D values of a patch, N neurons.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pattern_bench.core.layers import Geometry, Scratch, patch_sum

CACHE = 2**23
"""Bytes of one piece's temporaries on a CPU, so that they stay in its cache."""
LONG = 1024
"""Positions of a product's rows up to which images are taken together: products of long rows are faster."""


@dataclass(frozen=True)
class Sums:
    """Sums over the patches of a batch, with the gate g = 1[y > 0] and u = wᵀx; all float64.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> Sums(x=one, g=one[0], xg=one, xug=one, xun=one, gram=None).g.item()
    1.0
    """

    x: Tensor
    """Σ x, (G, D)."""
    g: Tensor
    """Σ g, (N,)."""
    xg: Tensor
    """Σ x g, (N, D)."""
    xug: Tensor
    """Σ x u g, (N, D)."""
    xun: Tensor
    """Σ x u (1-g), (N, D)."""
    gram: Tensor | None
    """Σ x xᵀ, (G, D, D), or None."""


def sums_of(
    x: Tensor, y: Tensor, weight: Tensor, geometry: Geometry, gram: bool, scratch: Scratch, memory: int
) -> Sums:
    """Return the sums over all patches of a batch; the gate g is that of ``y``, and u = wᵀx is computed in float64.

    Args:
        x: (B, C, spatial...), padded already; (B, C) for a Linear layer.
        y: (B, N, output spatial...), the layer's output.
        weight: (N, D), float64.
        geometry: of the layer, without its padding.
        gram: whether to sum Σ x xᵀ.
        scratch: memory for temporaries.
        memory: bytes that the largest temporary may take.

    >>> from torch import nn
    >>> from pattern_bench.core.layers import geometry_of
    >>> layer, x = nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 4.0]]])  # patches (1, 2), (2, 4)
    >>> weight, y = torch.tensor([[-1.0, 1.0]]).double(), torch.tensor([[[-1.0, 2.0]]])  # u = 1, 2; g = 0, 1
    >>> sums = sums_of(x, y, weight, geometry_of(layer), True, Scratch(), 2**20)
    >>> sums.x.tolist(), sums.g.tolist(), sums.xug.tolist(), sums.gram.tolist()
    ([[3.0, 6.0]], [1.0], [[4.0, 8.0]], [[[5.0, 10.0], [10.0, 20.0]]])
    """
    (n, d), groups = weight.shape, geometry.groups
    per_group = n // groups
    filters = weight.view(groups, per_group, d)
    g, sums = weight.new_zeros(groups, per_group), weight.new_zeros(groups, 3, per_group, d)
    xx = weight.new_zeros(groups, d, d) if gram else None
    positions = y[0, 0].numel()
    room = min(memory, CACHE) if x.device.type == "cpu" else memory
    for images, some in _pieces(len(x), positions, groups, 8 * (d + 4 * per_group) * positions, room):
        p = _unfolded(x[images], some, geometry, scratch, weight)
        u = torch.bmm(filters[some], p, out=scratch.like("u", weight, (len(p), per_group, p.shape[2])))
        maps = scratch.like("maps", weight, (len(p), 3, per_group, p.shape[2]))
        gate, fired, rested = maps.unbind(1)
        seen = y[images, some.start * per_group : some.stop * per_group].transpose(0, 1).unflatten(0, gate.shape[:2])
        gate.view(seen.shape).copy_(seen)
        gate.gt_(0)
        torch.mul(u, gate, out=fired)
        torch.sub(u, fired, out=rested)
        g[some] += gate.sum(2)
        sums[some] += torch.bmm(maps.flatten(1, 2), p.mT).unflatten(1, maps.shape[1:3])
        if xx is not None:
            xx[some] += torch.bmm(p, p.mT)
    xs = patch_sum(x.double(), geometry) if geometry.kernel else x.sum(0, keepdim=True, dtype=torch.float64)
    xg, xug, xun = (t.flatten(0, 1) for t in sums.unbind(1))
    return Sums(xs, g.flatten(), xg, xug, xun, xx)


def _pieces(images: int, positions: int, groups: int, size: int, room: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of images and groups whose temporaries, ``size`` bytes for each group of each image, fit ``room``;
    at least one group of one image. Images of few positions are taken together first."""
    at_once = max(1, room // size)
    step = min(images, max(1, at_once // groups, min(at_once, LONG // positions)))
    pieces = min(groups, -(-groups * step // at_once))
    for image in range(0, images, step):
        for piece in range(pieces):
            yield slice(image, image + step), slice(piece * groups // pieces, (piece + 1) * groups // pieces)


def _unfolded(x: Tensor, groups: slice, geometry: Geometry, scratch: Scratch, like: Tensor) -> Tensor:
    """Return the patches of some groups, (G', D, positions): a row for each value, so that a copy is of whole rows."""
    channels = x.shape[1] // geometry.groups
    here = groups.stop - groups.start
    x = x[:, groups.start * channels : groups.stop * channels].transpose(0, 1)
    out = geometry.output_size(tuple(x.shape[2:]))
    if math.prod(geometry.kernel) > 1 and set(geometry.stride) == {1}:
        # Taps overlap, so that widening and turning it about once is cheaper.
        x = scratch.like("padded", like, tuple(x.shape)).copy_(x)
    p = scratch.like("patches", like, (here * channels, math.prod(geometry.kernel), x.shape[1], *out))
    for tap, offsets in enumerate(itertools.product(*(range(k) for k in geometry.kernel))):
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(offsets, geometry.dilation, out, geometry.stride, strict=True)
        )
        p[:, tap].copy_(x[(slice(None), slice(None), *window)])
    return p.view(here, channels * p.shape[1], -1)
