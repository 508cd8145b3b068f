"""How right a heat map is where the truth is known: the pixels that hold the signal, those that only suppress a
distractor, and the signal itself.

All is computed in float64, for each image, and none of it depends on a heat map's scale. What needs optimal transport
is in ``pattern_bench.metrics.earth_mover``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pattern_bench.metrics.similarity import cosine, unit_scale


def magnitude(heat: Tensor) -> Tensor:
    """|relevance| of each pixel, summed over channels and divided by the image's largest absolute value:
    (B, C, H, W) to (B, H, W), float64."""
    return unit_scale(heat).abs().sum(1)


def precision(heat: Tensor, truth: Tensor) -> Tensor:
    """Share of the truth mask among the pixels with the largest :func:`magnitude`, as many as the mask has
    (Clark et al. 2024, "XAI-TRIS").

    Pixels that share the last places with others count with the share of places that is left for them: what a random
    choice among them would give on average. So a map of one value has the mask's share of the image.

    Args:
        heat: (B, C, H, W).
        truth: (B, H, W) bool, at least one pixel in each image.

    Returns:
        (B,), from 0 to 1; NaN where the heat map is zero everywhere.

    Raises:
        ValueError: where a mask is empty.
    """
    values, mask = magnitude(heat).flatten(1), truth.flatten(1)
    places = mask.sum(1).double()
    if not places.all():
        raise ValueError("a truth mask is empty, so precision at its size is not defined")
    last = values.sort(1, descending=True).values.gather(1, places.long()[:, None] - 1)
    above, ties = values > last, values == last
    left = (places - above.sum(1)) / ties.sum(1)
    found = ((above & mask).sum(1) + left * (ties & mask).sum(1)) / places
    return found.masked_fill((values == 0).all(1), torch.nan)


def share(heat: Tensor, region: Tensor) -> Tensor:
    """Share of the :func:`magnitude` that lies in ``region`` (H, W) or (B, H, W) bool: (B,), from 0 to 1; NaN where
    the heat map (B, C, H, W) is zero everywhere. On suppressors it should be 0, on the truth mask 1."""
    values = magnitude(heat)
    return (values * region).flatten(1).sum(1) / values.flatten(1).sum(1)


def angle(heat: Tensor, signal: Tensor) -> Tensor:
    """Degrees between a heat map and the true signal as lines, whichever way each points: (B, C, H, W) twice to (B,),
    from 0 to 90; NaN where one of them is zero everywhere. In D dimensions a random map is near 90 (78 on average at
    D = 16, 84 at 64).

    An attribution has no signal's signs; compare its magnitude with the signal's.
    """
    between = cosine(heat.flatten(1), signal.flatten(1)).abs().clamp(max=1)
    return torch.rad2deg(between.acos())
