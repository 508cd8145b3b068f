"""Tell which batches need products in float64.

Where a mean is large against the deviation, a covariance is the small difference of two large sums (E[x xᵀ] - E[x]
E[x]ᵀ), and float32 products leave few digits of it. Shapes: B images, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE_MEAN = 10.0
"""A channel whose mean is more than this many standard deviations has too few digits left in float32 covariances."""
LARGE_SPREAD = 1000.0
"""So has a batch whose mean square is more than this many times the variance within its images (or, where inputs have
no positions, between nearest rows)."""
SAMPLED_SIDE = 4
"""Pixels per spatial dimension that a batch is judged by: means and deviations to a tenth need no more."""
FEW_SAMPLES = 64
"""Up to this many samples, rounding errors do not average out, and float64 costs next to nothing."""


def cancels(x: Tensor) -> bool:
    """Return whether a layer's input (B, C, spatial...) needs products in float64, judged by this batch alone.

    False for inputs that are float64 already.

    >>> x = torch.arange(800.0).cos().view(100, 2, 4)
    >>> cancels(x), cancels(x + 1000), cancels(x[:5])
    (False, True, True)
    """
    if x.dtype == torch.float64:
        return False
    if x.numel() <= FEW_SAMPLES * x.shape[1]:
        return True
    sample = x[(slice(None), slice(None), *(slice(None, None, -(-size // SAMPLED_SIDE)) for size in x.shape[2:]))]
    sample = sample.float().reshape(*x.shape[:2], -1)
    # Written out, because torch's variances go through a value at a time.
    mean = sample.mean((0, 2))
    variance = (sample - mean[:, None]).square().mean((0, 2))
    large = (mean.square() > LARGE_MEAN**2 * variance).logical_and(mean != 0).any()
    energy = (variance + mean.square()).sum()
    if sample.shape[2] > 1:
        within = (sample - sample.mean(2, keepdim=True)).square().mean((0, 2)).sum()
    else:
        within = _nearest(sample[:, :, 0])
    return bool(large | (energy > LARGE_SPREAD * within))


def _nearest(rows: Tensor) -> Tensor:
    """Return half the squared distance between a row of (n, C) and its nearest other row, the median over at most 32
    rows: the variance within a cluster, however many clusters there are."""
    rows = rows[:: -(-len(rows) // 32)]
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.fill_diagonal_(torch.inf).amin(1).median().square() / 2
