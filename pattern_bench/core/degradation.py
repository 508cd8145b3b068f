"""Image degradation (Kindermans et al. 2018, Fig. 4a): does destroying what an explanation calls relevant
destroy the prediction?

Non-overlapping square patches from the top left, only whole ones, are ranked by the sum of the heat map in
them; the first n are replaced by their own mean per colour channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def rank_patches(heat: Tensor, patch: int) -> Tensor:
    """Rank of each patch, 0 for the most relevant: (B, C, H, W) to (B, rows, columns), int64. Ties keep the
    reading order."""
    summed = F.avg_pool2d(heat.sum(1, keepdim=True).double(), patch).squeeze(1)
    return _ranks(summed)


def random_ranks(images: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Ranks in random order, (images, rows, columns)."""
    return _ranks(torch.rand(images, rows, columns, generator=generator))


def _ranks(score: Tensor) -> Tensor:
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(score)


def degraded(images: Tensor, ranks: Tensor, patch: int, steps: int) -> Iterator[Tensor]:
    """The images (B, C, H, W) with the first 0, 1, ..., ``steps`` patches replaced by their mean per channel."""
    height, width = ranks.shape[1] * patch, ranks.shape[2] * patch
    means = _enlarge(F.avg_pool2d(images, patch), patch)
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
    network: Callable[[Tensor], Tensor], images: Tensor, ranks: Tensor, target: Tensor, patch: int, steps: int
) -> Tensor:
    """Softmax probability of ``target`` (B,) after 0 to ``steps`` replaced patches, (B, steps + 1)."""
    curve = [
        network(batch).softmax(1).gather(1, target[:, None]).squeeze(1)
        for batch in degraded(images, ranks, patch, steps)
    ]
    return torch.stack(curve, 1)


def area_over_curve(curve: Tensor) -> Tensor:
    """AOPC: mean over the steps of the loss against the undamaged image, (..., steps + 1) to (...)."""
    return (curve[..., :1] - curve).mean(-1)
