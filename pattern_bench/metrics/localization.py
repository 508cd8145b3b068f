"""Measure heat maps against a known truth: the pixels that hold the signal, those that only suppress a distractor, and
the signal itself.

Every measure is taken in float64, for each image, and does not depend on a heat map's scale. The distance between heat
map and truth is in ``metrics/earth_mover.py``. Shapes: B images, C channels, H×W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pattern_bench.metrics.similarity import cosine, unit_scale


def magnitude(heat: Tensor) -> Tensor:
    """Return |relevance| of each pixel, summed over channels and divided by the image's largest absolute value:
    (B, C, H, W) to (B, H, W), float64.

    >>> magnitude(torch.tensor([[[[4.0, -1.0]]]])).tolist()
    [[[1.0, 0.25]]]
    """
    return unit_scale(heat).abs().sum(1)


def precision(heat: Tensor, truth: Tensor) -> Tensor:
    """Return the share of the truth mask among the pixels with the largest :func:`magnitude`, as many as the mask has
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

    >>> truth = torch.tensor([[[True, True, False, False]]])
    >>> precision(torch.tensor([[[[9.0, -1.0, 2.0, 0.0]]]]), truth).item()
    0.5
    """
    values, mask = magnitude(heat).flatten(1), truth.flatten(1)
    places = mask.sum(1).double()
    if not places.all():
        raise ValueError("a truth mask is empty, so precision at its size is not defined")
    last = values.sort(1, descending=True).values.gather(1, places.long()[:, None] - 1)
    above, ties = values > last, values == last
    left = (places - above.sum(1)) / ties.sum(1)
    hits = ((above & mask).sum(1) + left * (ties & mask).sum(1)) / places
    return hits.masked_fill((values == 0).all(1), torch.nan)


def share(heat: Tensor, region: Tensor) -> Tensor:
    """Return the share of the :func:`magnitude` that lies in a region: 1 is best on the truth mask, 0 on suppressors.

    Args:
        heat: (B, C, H, W).
        region: (H, W) or (B, H, W) bool.

    Returns:
        (B,) float64, from 0 to 1; NaN where the heat map is zero everywhere.

    >>> share(torch.tensor([[[[3.0, -1.0]]]]), torch.tensor([[True, False]])).item()
    0.75
    """
    values = magnitude(heat)
    return (values * region).flatten(1).sum(1) / values.flatten(1).sum(1)


def angle(heat: Tensor, signal: Tensor) -> Tensor:
    """Return the angle in degrees between a heat map and the true signal as lines, whichever way each points.

    In D dimensions a random map is near 90 (78 on average at D = 16, 84 at 64). An attribution does not have a signal's
    signs; compare its magnitude with the signal's.

    Args:
        heat: (B, C, H, W).
        signal: (B, C, H, W).

    Returns:
        (B,) float64, from 0 to 90; NaN where one of the two is zero everywhere.

    >>> angle(torch.tensor([[[[-1.0, -1.0]]]]), torch.tensor([[[[1.0, 0.0]]]])).round(decimals=6).item()
    45.0
    """
    between = cosine(heat.flatten(1), signal.flatten(1)).abs().clamp(max=1)
    return torch.rad2deg(between.acos())
