"""Image degradation (Kindermans et al. 2018, Fig. 4a): does destroying what an explanation calls relevant
destroy the prediction?

Non-overlapping square patches from the top left, only whole ones, are ranked by the sum of the heat map in
them; the first n are replaced by their own mean per colour channel (or by a blurred image, or by a constant).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

REPLACEMENTS = ("mean", "blur", "constant")
ORDERS = ("most", "least")


def rank_patches(heat: Tensor, patch: int, order: str = "most") -> Tensor:
    """Rank of each patch, 0 for the most relevant (or the least, by ``order``): (B, C, H, W) to (B, rows, columns),
    int64. Ties keep the reading order."""
    summed = F.avg_pool2d(heat.sum(1, keepdim=True).double(), patch).squeeze(1)
    return _ranks(summed if order == "most" else -summed)


def random_ranks(images: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Ranks in random order, (images, rows, columns)."""
    return _ranks(torch.rand(images, rows, columns, generator=generator))


def _ranks(score: Tensor) -> Tensor:
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(score)


def replacement(images: Tensor, patch: int, how: str = "mean", value: float = 0.0) -> Tensor:
    """What patches are replaced by, as images (B, C, H, W) less the margin that belongs to no whole patch.

    Args:
        how: ``mean``, each patch's own per channel (the paper's); ``blur``, the image under a Gaussian whose
            deviation is the patch's side; ``constant``, ``value``.
    """
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    if how == "mean":
        return _enlarge(F.avg_pool2d(images, patch), patch)
    if how == "blur":
        return _blurred(images, patch)[:, :, : rows * patch, : columns * patch]
    return torch.full_like(images[:, :, : rows * patch, : columns * patch], value)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Under a Gaussian, cut off at three deviations; the border's values go on outside."""
    reach = round(3 * deviation)
    x = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    bell = torch.exp(-x.square() / (2 * deviation**2))
    kernel = (bell / bell.sum()).view(1, 1, -1, 1)
    flat = images.flatten(0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), kernel)
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), kernel.mT)
    return flat.view_as(images)


def degraded(
    images: Tensor, ranks: Tensor, patch: int, steps: int, replaced_by: Tensor | None = None
) -> Iterator[Tensor]:
    """The images (B, C, H, W) with the first 0, 1, ..., ``steps`` patches replaced, by their mean per channel unless
    another :func:`replacement` is given."""
    height, width = ranks.shape[1] * patch, ranks.shape[2] * patch
    means = replacement(images, patch) if replaced_by is None else replaced_by
    rank = _enlarge(ranks[:, None], patch)
    current = images.clone()
    yield current
    for step in range(steps):
        inside = current[:, :, :height, :width]
        inside.copy_(torch.where(rank == step, means, inside))
        yield current


def _enlarge(t: Tensor, patch: int) -> Tensor:
    return t.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def degradation_curve(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    ranks: Tensor,
    target: Tensor,
    patch: int,
    steps: int,
    replaced_by: Tensor | None = None,
) -> Tensor:
    """Softmax probability of ``target`` (B,) after 0 to ``steps`` replaced patches, (B, steps + 1)."""
    curve = [
        network(batch).softmax(1).gather(1, target[:, None]).squeeze(1)
        for batch in degraded(images, ranks, patch, steps, replaced_by)
    ]
    return torch.stack(curve, 1)


def area_over_curve(curve: Tensor) -> Tensor:
    """AOPC: mean over the steps of the loss against the undamaged image, (..., steps + 1) to (...)."""
    return (curve[..., :1] - curve).mean(-1)


def mean_interval(values: Tensor, generator: torch.Generator, resamples: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval (percentiles) of the mean of ``values`` (n,), one for each image."""
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = values.cpu().double()[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
