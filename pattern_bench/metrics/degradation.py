"""Measure explanations by image degradation: does destroying what one calls relevant destroy the prediction?
(Kindermans et al. 2018, Fig. 4a; Samek et al. 2017.)

Non-overlapping square patches from the top left, only whole ones, are put in order by the sum of the heat map in them;
the first n are replaced by their own mean per colour channel (or by a blurred image, or by a constant). In signals
(B, C, T) patches are intervals, in volumes (B, C, D, H, W) cubes: equally long in every spatial dimension.

Shapes: B images, C channels, K outputs; a grid has one cell for each whole patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pattern_bench.core.predictions import probabilities
from pattern_bench.errors import UserError, told

REPLACEMENTS = ("mean", "blur", "constant")
"""What patches are replaced by: see :func:`replacement`."""
ORDERS = ("most", "least")
"""Which patches are replaced first: the most relevant, or the least."""


def grid_of(spatial: Sequence[int], patch: int) -> tuple[int, ...]:
    """Return the number of whole patches along each spatial dimension.

    >>> grid_of((224, 230), 9)
    (24, 25)
    """
    return tuple(size // patch for size in spatial)


def check_patches(spatial: Sequence[int], patch: int, steps: int) -> None:
    """Check that ``steps`` patches with sides of ``patch`` pixels can be replaced in images of size ``spatial``.

    Raises:
        UserError: where they cannot.

    >>> check_patches((28, 28), 9, 10)
    Traceback (most recent call last):
    pattern_bench.errors.UserError: steps=10 is not possible: images of this size (28×28) have 9 whole patches: give a \
smaller one
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


def patch_order(heat: Tensor, patch: int, first: str = "most") -> Tensor:
    """Return the place of each patch in the order of replacement, 0 for the first; ties keep the reading order.

    Args:
        heat: heat maps (B, C, spatial...), summed over channels and over each patch.
        patch: the side of a patch in pixels.
        first: ``most`` for the most relevant first, ``least`` for the least.

    Returns:
        (B, grid...) int64.

    >>> patch_order(torch.tensor([[[1.0, 1.0, 5.0, 0.0, 3.0, 4.0]]]), 2)
    tensor([[2, 1, 0]])
    """
    summed = _means(heat.sum(1, keepdim=True).double(), patch).squeeze(1)
    return _order_by(summed if first == "most" else -summed)


def random_patch_order(images: int, grid: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return the place of each patch in a random order of its own for each image, (images, grid...) int64: the baseline
    of Fig. 4a.

    >>> random_patch_order(1, (3,), torch.Generator().manual_seed(0)).sort().values
    tensor([[0, 1, 2]])
    """
    return _order_by(torch.rand(images, *grid, generator=generator, dtype=torch.float32))


def _order_by(score: Tensor) -> Tensor:
    """Return each cell's place in descending order of ``score`` (B, grid...)."""
    by_place = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(by_place.shape[1], device=by_place.device).expand_as(by_place)
    return torch.empty_like(by_place).scatter_(1, by_place, places).view_as(score)


def _means(t: Tensor, patch: int) -> Tensor:
    """Return the mean of each whole patch, (B, C, spatial...) to (B, C, grid...)."""
    pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[t.ndim - 3]
    return pool(t, patch)


def replacement(images: Tensor, patch: int, how: str = "mean", value: float = 0.0) -> Tensor:
    """Return what patches are replaced by, as images without the margin that belongs to no whole patch.

    Args:
        images: (B, C, spatial...).
        patch: the side of a patch in pixels.
        how: ``mean``, each patch's own per channel (the paper's); ``blur``, the image under a Gaussian whose standard
            deviation is the patch's side; ``constant``, ``value``.
        value: of ``constant``.

    Returns:
        (B, C, spatial...), the spatial sizes multiples of ``patch``.

    >>> replacement(torch.tensor([[[1.0, 3.0, 5.0, 7.0, 9.0]]]), 2).tolist()
    [[[2.0, 2.0, 6.0, 6.0]]]
    """
    if how == "mean":
        return _enlarge(_means(images, patch), patch)
    where = _whole(grid_of(images.shape[2:], patch), patch)
    return _blurred(images, patch)[where] if how == "blur" else torch.full_like(images[where], value)


def _whole(grid: Sequence[int], patch: int) -> tuple[slice, ...]:
    """Return the index of an image's whole patches."""
    return (slice(None), slice(None), *(slice(count * patch) for count in grid))


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Return images under a Gaussian, cut off at three deviations; the border's values go on outside."""
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
    images: Tensor, order: Tensor, patch: int, steps: int, replaced_by: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the images with the first 0, 1, ..., ``steps`` patches replaced; each is overwritten by the next.

    Args:
        images: (B, C, spatial...).
        order: (B, grid...), from :func:`patch_order` or :func:`random_patch_order`.
        patch: the side of a patch in pixels.
        steps: patches to replace.
        replaced_by: a :func:`replacement`; None for the mean per channel.

    >>> images = torch.tensor([[[1.0, 3.0, 5.0, 7.0]]])
    >>> [batch.tolist() for batch in degraded(images, torch.tensor([[1, 0]]), 2, 1)]
    [[[[1.0, 3.0, 5.0, 7.0]]], [[[1.0, 3.0, 6.0, 6.0]]]]
    """
    where = _whole(order.shape[1:], patch)
    means = replacement(images, patch) if replaced_by is None else replaced_by
    place = _enlarge(order[:, None], patch)
    current = images.clone()
    yield current
    for step in range(steps):
        inside = current[where]
        inside.copy_(torch.where(place == step, means, inside))
        yield current


def _enlarge(t: Tensor, patch: int) -> Tensor:
    for dim in range(2, t.ndim):
        t = t.repeat_interleave(patch, dim)
    return t


def degradation_curve(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    order: Tensor,
    target: Tensor,
    patch: int,
    steps: int,
    replaced_by: Tensor | None = None,
) -> Tensor:
    """Return the probability of an output after 0 to ``steps`` replaced patches, (B, steps + 1).

    Args:
        network: puts out logits (B, K); :func:`pattern_bench.core.predictions.probabilities` reads them.
        images, order, patch, steps, replaced_by: as of :func:`degraded`.
        target: the output of each image, (B,) int64.

    >>> images = torch.tensor([[[2.0, -2.0, 0.0, 0.0]]])
    >>> single_logit = lambda x: x.amax(2)
    >>> degradation_curve(single_logit, images, torch.tensor([[0, 1]]), torch.tensor([0]), 2, 1).round(decimals=2)
    tensor([[0.8800, 0.5000]])
    """
    curve = [
        probabilities(network, network(batch)).gather(1, target[:, None]).squeeze(1)
        for batch in degraded(images, order, patch, steps, replaced_by)
    ]
    return torch.stack(curve, 1)


def area_over_curve(curve: Tensor) -> Tensor:
    """Return the mean over all steps of the loss of probability against the undamaged image, (..., steps + 1) to (...)
    (the AOPC of Samek et al. 2017).

    >>> area_over_curve(torch.tensor([1.0, 0.5, 0.0])).item()
    0.5
    """
    return (curve[..., :1] - curve).mean(-1)


def mean_interval(values: Tensor, generator: torch.Generator, resamples: int = 2000) -> tuple[float, float]:
    """Return the ends of the 95 % bootstrap interval (percentiles) of the mean of ``values``, (n,), one for each image.

    >>> mean_interval(torch.tensor([3.0, 3.0]), torch.Generator())
    (3.0, 3.0)
    """
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = values.cpu().double()[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
