"""Image degradation (Kindermans et al. 2018, Fig. 4a): does destroying what an explanation calls relevant
destroy the prediction?

Non-overlapping square patches from the top left, only whole ones, are ranked by the sum of the heat map in
them; the first n are replaced by their own mean per colour channel (or by a blurred image, or by a constant).
Of signals (B, C, T) patches are stretches, of volumes (B, C, D, H, W) cubes: as long along every spatial dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pattern_bench.core.outputs import probabilities
from pattern_bench.errors import UserError, told

REPLACEMENTS = ("mean", "blur", "constant")
ORDERS = ("most", "least")


def grid_of(spatial: Sequence[int], patch: int) -> tuple[int, ...]:
    """How many whole patches there are along each spatial dimension."""
    return tuple(size // patch for size in spatial)


def check_patches(spatial: Sequence[int], patch: int, steps: int) -> None:
    """
    Raises:
        UserError: where ``steps`` patches with sides of ``patch`` are not possible in images of this size.
    """
    if not 1 <= len(spatial) <= 3:
        raise UserError(
            f"images have {len(spatial)} spatial dimensions: give signals, images or volumes, (B, C, spatial...)"
        )
    for setting, value in (("patch", patch), ("steps", steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{setting}={told(value)} is not possible: give a whole number of at least 1")
    size, count = "×".join(map(str, spatial)), math.prod(grid_of(spatial, patch))
    if count < steps:
        setting = f"patch={patch}" if not count else f"steps={steps}"
        raise UserError(
            f"{setting} is not possible: images of this size ({size}) have {count} whole patches: give a smaller one"
        )


def rank_patches(heat: Tensor, patch: int, order: str = "most") -> Tensor:
    """Rank of each patch, 0 for the most relevant (or the least, by ``order``): (B, C, spatial...) to (B, grid...),
    int64. Ties keep the reading order."""
    summed = _means(heat.sum(1, keepdim=True).double(), patch).squeeze(1)
    return _ranks(summed if order == "most" else -summed)


def random_ranks(images: int, grid: Sequence[int], generator: torch.Generator) -> Tensor:
    """Ranks in random order, (images, grid...)."""
    return _ranks(torch.rand(images, *grid, generator=generator, dtype=torch.float32))


def _ranks(score: Tensor) -> Tensor:
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(score)


def _means(t: Tensor, patch: int) -> Tensor:
    """The mean of each whole patch, (B, C, spatial...) to (B, C, grid...)."""
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[t.ndim - 3]
    return pool(t, patch)


def replacement(images: Tensor, patch: int, how: str = "mean", value: float = 0.0) -> Tensor:
    """What patches are replaced by, as images (B, C, spatial...) less the margin that belongs to no whole patch.

    Args:
        how: ``mean``, each patch's own per channel (the paper's); ``blur``, the image under a Gaussian whose
            deviation is the patch's side; ``constant``, ``value``.
    """
    if how == "mean":
        return _enlarge(_means(images, patch), patch)
    where = _whole(grid_of(images.shape[2:], patch), patch)
    return _blurred(images, patch)[where] if how == "blur" else torch.full_like(images[where], value)


def _whole(grid: Sequence[int], patch: int) -> tuple[slice, ...]:
    """Where an image's whole patches lie."""
    return (slice(None), slice(None), *(slice(count * patch) for count in grid))


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Under a Gaussian, cut off at three deviations; the border's values go on outside."""
    reach = round(3 * deviation)
    x = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    bell = torch.exp(-x.square() / (2 * deviation**2))
    kernel = (bell / bell.sum()).view(1, 1, -1)
    for dim in range(2, images.ndim):
        lines = images.movedim(dim, -1)
        flat = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="replicate")
        images = F.conv1d(flat, kernel).view(lines.shape).movedim(-1, dim)
    return images


def degraded(
    images: Tensor, ranks: Tensor, patch: int, steps: int, replaced_by: Tensor | None = None
) -> Iterator[Tensor]:
    """The images (B, C, spatial...) with the first 0, 1, ..., ``steps`` patches replaced, by their mean per channel
    unless another :func:`replacement` is given."""
    where = _whole(ranks.shape[1:], patch)
    means = replacement(images, patch) if replaced_by is None else replaced_by
    rank = _enlarge(ranks[:, None], patch)
    current = images.clone()
    yield current
    for step in range(steps):
        inside = current[where]
        inside.copy_(torch.where(rank == step, means, inside))
        yield current


def _enlarge(t: Tensor, patch: int) -> Tensor:
    for dim in range(2, t.ndim):
        t = t.repeat_interleave(patch, dim)
    return t


def degradation_curve(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    ranks: Tensor,
    target: Tensor,
    patch: int,
    steps: int,
    replaced_by: Tensor | None = None,
) -> Tensor:
    """Probability (``core.outputs``) of output ``target`` (B,) after 0 to ``steps`` replaced patches, (B, steps + 1).

    ``network`` puts out logits (B, K).
    """
    curve = [
        probabilities(network, network(batch)).gather(1, target[:, None]).squeeze(1)
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
