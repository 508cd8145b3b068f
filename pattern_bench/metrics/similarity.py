"""How alike two heat maps are, and how far vectors have converged: the measures of sanity checks.

The pairs of heat maps come from cascading randomisation (Adebayo et al. 2018, "Sanity checks for saliency maps"), the
vectors from back-propagation (Sixt et al. 2020, "When explanations lie: why many modified BP attributions fail").
All is computed in float64, and none of it depends on a heat map's scale.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW = 7
"""Side of the window in pixels, that of scikit-image."""


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of the last dimension (B, D), ties with the mean of their ranks, float64."""
    found = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    for row, out in zip(values, found, strict=True):
        _, inverse, counts = row.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        out.copy_((last - (counts.double() - 1) / 2)[inverse])
    return found


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of two (B, D) tensors, (B,) float64; NaN where a row is constant."""
    a, b = (r - r.mean(1, keepdim=True) for r in (ranks(a), ranks(b)))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of two (B, D) tensors, (B,) float64; NaN where a row is zero."""
    a, b = unit_scale(a), unit_scale(b)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def unit_scale(values: Tensor) -> Tensor:
    """Each of (B, ...) divided by its largest absolute value, float64; zero stays zero.

    Squares of values such as 1e200, which PatternNet reaches in deep networks, would not be finite.
    """
    values = values.double()
    largest = values.flatten(1).abs().amax(1).view(-1, *[1] * (values.ndim - 1))
    return values / torch.where(largest > 0, largest, 1.0)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of heat maps (B, H, W) as pictures, x / (2 max|x|) + 1/2 from 0 to 1, (B,) float64.

    The mean over windows of 7×7 pixels (smaller, odd ones in smaller images) that lie inside the image, with equal
    weights, unbiased (co)variances, K1 = 0.01 and K2 = 0.03 (Wang et al. 2004; the defaults of scikit-image). As
    pictures, because with values of both signs two wrong factors, of the means and of the covariance, make a right one.
    """
    a, b = (unit_scale(maps)[:, None] / 2 + 0.5 for maps in (a, b))
    side = min(SSIM_WINDOW, *a.shape[2:])
    side -= 1 - side % 2
    unbiased = side**2 / max(side**2 - 1, 1)

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a = unbiased * (mean(a * a) - mean_a**2)
    var_b = unbiased * (mean(b * b) - mean_b**2)
    cov = unbiased * (mean(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similar.flatten(1).mean(1)


def similarities(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Every measure for heat maps (B, H, W), by name, (B,) float64; NaN where one of the two is zero everywhere, as
    that of an output which a ReLU has closed: there is nothing to compare."""
    flat_a, flat_b = unit_scale(a).flatten(1), unit_scale(b).flatten(1)
    empty = (flat_a == 0).all(1) | (flat_b == 0).all(1)
    found = {
        "spearman_signed": spearman(flat_a, flat_b),
        "spearman_absolute": spearman(flat_a.abs(), flat_b.abs()),
        "ssim": ssim(a, b),
        "cosine": cosine(flat_a, flat_b),
    }
    return {name: values.masked_fill(empty, torch.nan) for name, values in found.items()}


def convergence(vectors: Tensor) -> Tensor:
    """Mean absolute cosine over all pairs of (J, D) vectors, a float64 scalar: 1 where all lie on one line.

    The sign is left out since it does not tell one line from another. Vectors that are zero (all gates closed) or not
    finite have no direction and are left out; NaN where fewer than two are left.
    """
    vectors = vectors[vectors.isfinite().all(1) & (vectors != 0).any(1)]
    if len(vectors) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    left, right = zip(*itertools.combinations(range(len(vectors)), 2), strict=True)
    return cosine(vectors[list(left)], vectors[list(right)]).abs().mean()
