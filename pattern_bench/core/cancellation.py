"""Batches whose sums of products would cancel: those with a large mean against their deviation."""

from __future__ import annotations

import torch
from torch import Tensor

LARGE_MEAN = 10.0
"""Where a channel's mean is above so many deviations, float32 products leave too few digits of its covariances."""
LARGE_SPREAD = 1000.0
"""Where the energy is so many times that of what varies within images, or between the nearest rows, likewise."""
SIDE = 4
"""Pixels per spatial dimension that a batch is judged by: means and deviations to a tenth need no more."""
FEW = 64
"""So few samples do not average rounding out, and float64 costs little more than adding up what comes of them."""


def cancels(x: Tensor) -> bool:
    """Whether a layer's input (B, C, spatial...) needs products in float64, whatever other batches look like."""
    if x.dtype == torch.float64:
        return False
    if x.numel() <= FEW * x.shape[1]:
        return True
    seen = x[(slice(None), slice(None), *(slice(None, None, -(-size // SIDE)) for size in x.shape[2:]))]
    seen = seen.float().reshape(*x.shape[:2], -1)
    # Written out, because torch's variances go through a value at a time.
    mean = seen.mean((0, 2))
    variance = (seen - mean[:, None]).square().mean((0, 2))
    large = (mean.square() > LARGE_MEAN**2 * variance).logical_and(mean != 0).any()
    energy = (variance + mean.square()).sum()
    if seen.shape[2] > 1:
        within = (seen - seen.mean(2, keepdim=True)).square().mean((0, 2)).sum()
    else:
        within = _nearest(seen[:, :, 0])
    return bool(large | (energy > LARGE_SPREAD * within))


def _nearest(rows: Tensor) -> Tensor:
    """Half the squared distance of a row of (n, C) to the nearest of the others, in the median: what varies within a
    cluster, however many clusters there are."""
    rows = rows[:: -(-len(rows) // 32)]
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.fill_diagonal_(torch.inf).amin(1).median().square() / 2
