"""Measure how alike two heat maps are, and how far vectors have converged, for sanity checks.

The pairs of heat maps come from cascading randomisation (Adebayo et al. 2018, "Sanity checks for saliency maps"), the
vectors from back-propagation (Sixt et al. 2020, "When explanations lie: why many modified BP attributions fail").
Every measure is taken in float64, and does not depend on a heat map's scale. Shapes: B images, D values, H×W pixels.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from pattern_bench.metrics.base import Similarity, similarity_measures

SSIM_WINDOW = 7
"""Side of the window in pixels, that of scikit-image."""


def rank_data(values: Tensor) -> Tensor:
    """Return the rank of each value in its row, (B, D) to (B, D) float64: from 1, ties with the mean of their ranks.

    >>> rank_data(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist()
    [[3.5, 1.0, 3.5, 2.0]]
    """
    ranks = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    for row, out in zip(values, ranks, strict=True):
        _, inverse, counts = row.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        out.copy_((last - (counts.double() - 1) / 2)[inverse])
    return ranks


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation of each row of two (B, D) tensors, (B,) float64; NaN where a row is constant.

    >>> spearman(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[-1.0, -2.0, -3.0]])).round(decimals=6).item()
    -1.0
    """
    a, b = (r - r.mean(1, keepdim=True) for r in (rank_data(a), rank_data(b)))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each row of two (B, D) tensors, (B,) float64; NaN where a row is zero.

    >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[-7.0, 0.0]])).item()
    -1.0
    """
    a, b = unit_scale(a), unit_scale(b)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def unit_scale(values: Tensor) -> Tensor:
    """Divide each of (B, ...) by its largest absolute value, in float64; zero stays zero.

    Squares of values such as 1e200, which PatternNet reaches in deep networks, would not be finite.

    >>> unit_scale(torch.tensor([[1.0, -4.0], [0.0, 0.0]])).tolist()
    [[0.25, -1.0], [0.0, 0.0]]
    """
    values = values.double()
    largest = values.flatten(1).abs().amax(1).view(-1, *[1] * (values.ndim - 1))
    return values / torch.where(largest > 0, largest, 1.0)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of heat maps (B, H, W) as pictures, x / (2 max|x|) + 1/2 from 0 to 1, (B,)
    float64.

    The mean over windows of 7×7 pixels (smaller, odd ones in smaller images) that lie inside the image, with equal
    weights, unbiased (co)variances, K1 = 0.01 and K2 = 0.03 (Wang et al. 2004; the defaults of scikit-image). As
    pictures, because with values of both signs two wrong factors, of the means and of the covariance, make a right one.

    >>> maps = torch.arange(64.0).view(1, 8, 8)
    >>> ssim(maps, 2 * maps).item()
    1.0
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
    """Return every :class:`~pattern_bench.metrics.base.Similarity` of heat maps (B, H, W), by name, each (B,) float64.

    NaN where one of the two maps is zero everywhere, as that of an output whose ReLU does not fire: there is nothing to
    compare.

    >>> maps = torch.tensor([[[1.0, -2.0], [3.0, 0.5]]])
    >>> {name: round(value.item(), 6) for name, value in similarities(maps, 3 * maps).items()}
    {'spearman_signed': 1.0, 'spearman_absolute': 1.0, 'ssim': 1.0, 'cosine': 1.0}
    """
    flat_a, flat_b = _rows(a, b)
    empty = (flat_a == 0).all(1) | (flat_b == 0).all(1)
    return {
        name: measure().compare(a, b).masked_fill(empty, torch.nan) for name, measure in similarity_measures().items()
    }


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return unit_scale(a).flatten(1), unit_scale(b).flatten(1)


class SpearmanSigned(Similarity):
    """:func:`spearman` of two heat maps.

    >>> SpearmanSigned().compare(torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[-1.0, 2.0]]])).round().item()
    -1.0
    """

    name = "spearman_signed"
    title = "Spearman's ρ of heat maps"
    place = 1

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the rank correlation of each pair of (B, H, W), (B,) float64."""
        return spearman(*_rows(a, b))


class SpearmanAbsolute(Similarity):
    """:func:`spearman` of two heat maps without their signs.

    >>> SpearmanAbsolute().compare(torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[-1.0, 2.0]]])).round().item()
    1.0
    """

    name = "spearman_absolute"
    title = "Spearman's ρ of |heat maps|"
    place = 2

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the rank correlation of each pair of (B, H, W), (B,) float64."""
        a, b = _rows(a, b)
        return spearman(a.abs(), b.abs())


class StructuralSimilarity(Similarity):
    """:func:`ssim` of two heat maps.

    >>> StructuralSimilarity().compare(torch.ones(1, 3, 3), torch.ones(1, 3, 3)).item()
    1.0
    """

    name = "ssim"
    title = "SSIM of heat maps"
    place = 3

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the structural similarity of each pair of (B, H, W), (B,) float64."""
        return ssim(a, b)


class Cosine(Similarity):
    """:func:`cosine` of two heat maps.

    >>> Cosine().compare(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])).item()
    0.0
    """

    name = "cosine"
    title = "cosine of heat maps"
    place = 4

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the cosine of each pair of (B, H, W), (B,) float64."""
        return cosine(*_rows(a, b))


def convergence(vectors: Tensor) -> Tensor:
    """Return the mean absolute cosine over all pairs of (J, D) vectors, a float64 scalar: 1 where all lie on one line.

    The sign is left out since it does not tell one line from another. Vectors that are zero (all gates closed) or not
    finite have no direction and are left out; NaN where fewer than two are left.

    >>> convergence(torch.tensor([[1.0, 1.0], [-2.0, -2.0], [0.0, 0.0]])).round(decimals=6).item()
    1.0
    """
    vectors = vectors[vectors.isfinite().all(1) & (vectors != 0).any(1)]
    if len(vectors) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    left, right = zip(*itertools.combinations(range(len(vectors)), 2), strict=True)
    return cosine(vectors[list(left)], vectors[list(right)]).abs().mean()
