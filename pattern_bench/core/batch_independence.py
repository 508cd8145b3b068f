"""Refuse networks whose output for an image depends on the other images in its batch.

Every figure of the suite is of one image's answer, or a sum over images, so it must not matter which images are
computed together. Batch norms that take their statistics of the batch in evaluation mode are the usual reason why it
does. Shapes: B images, C channels.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pattern_bench.core.agreement import TOLERANCE
from pattern_bench.errors import UserError

BEYOND_ROUNDING = 10
"""Other images change the output by more than this many times what the size of the batch alone changes."""
_checked: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
"""Networks that passed, with the ids of the modules that they had."""


def refuse_batch_dependence_once(model: nn.Module, network: nn.Module, example: Tensor, name: str) -> None:
    """Check a network as :func:`refuse_batch_dependence` does, but only the first time that it is given with the same
    modules.

    Args:
        model: the network that is remembered.
        network: itself, or a copy in another precision, which is run.
        example: (B, C, spatial...).
        name: the network's, for errors.

    Raises:
        UserError: as :func:`refuse_batch_dependence`.

    >>> model = nn.Linear(2, 1)
    >>> refuse_batch_dependence_once(model, model, torch.ones(1, 2), "mine")
    """
    modules = [id(module) for module in model.modules()]
    if _checked.get(model) != modules:
        refuse_batch_dependence(network, example, name)
        _checked[model] = modules


def refuse_batch_dependence(network: nn.Module, example: Tensor, name: str) -> None:
    """Check that a network puts out the same for an image alone and between two others, up to rounding.

    Networks that take no batch of three, or whose outputs have no row for each image, pass.

    Args:
        network: in evaluation mode; it is run on one image and on three, and four more where these differ.
        example: (B, C, spatial...), of which the first image is taken.
        name: the network's, for errors.

    Raises:
        UserError: where the outputs differ: because of the other images, or because they are random.

    >>> refuse_batch_dependence(nn.Linear(2, 1), torch.ones(1, 2), "mine")
    >>> of_the_batch = nn.BatchNorm1d(2, track_running_stats=False).eval()
    >>> refuse_batch_dependence(of_the_batch, torch.ones(1, 2), "mine")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pattern_bench.errors.UserError: model=mine puts out something else for an image where other images are in its ...
    """
    if not example.numel():
        return
    image = example[:1].detach()
    alone, among = _row(network, image, 0), _row(network, torch.cat(_between_others(image)), 1)
    if alone is None:  # as batch norm over single values, which takes no batch of one
        alone = _row(network, _copies(image), 1)
    if alone is None or among is None or alone.shape != among.shape:
        return
    scale = max((float(t[t.isfinite()].abs().max()) for t in (alone, among) if t.isfinite().any()), default=0.0)
    change = _distance(among, alone)
    if change <= TOLERANCE * scale:
        return
    if change > BEYOND_ROUNDING * _distance(_row(network, _copies(image), 1), alone):
        by = f" (by {change / scale:.0%} of the largest output)" if scale and change < float("inf") else ""
        raise UserError(
            f"model={name} puts out something else for an image where other images are in its batch{by}, also in "
            "evaluation mode: take out what computes over the batch, as batch norm without running statistics does "
            "(track_running_stats=False, or functional with training=True)"
        )
    if _distance(_row(network, image, 0), alone) > TOLERANCE * scale:
        raise UserError(
            f"model={name} puts out something else for the same image in every pass, also in evaluation mode: take the "
            "randomness out of it"
        )


def _between_others(image: Tensor) -> list[Tensor]:
    """Return an image (1, C, spatial...) between two others: its values in another order and shifted, and noise of
    more than its range."""
    draw = torch.Generator().manual_seed(0)
    values = image.flatten().nan_to_num()
    size = values.abs().max().clamp(min=1)
    shuffled = values[torch.randperm(len(values), generator=draw).to(image.device)].view(image.shape)
    noise = torch.rand(image.shape, generator=draw, dtype=torch.float64).to(image)
    return [shuffled + size / 2, image, size * (3 * noise - 1)]


def _copies(image: Tensor) -> Tensor:
    return image.expand(3, *image.shape[1:])


def _row(network: nn.Module, images: Tensor, row: int) -> Tensor | None:
    """Return one image's outputs as a vector, in float64; None where the network has none of it."""
    try:
        with torch.no_grad():
            outputs: Any = network(images.clone(memory_format=torch.contiguous_format))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):  # such as for a batch of this size
        return None
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        return None
    if len(images) > 1:
        return outputs[row].flatten().double() if outputs.ndim and len(outputs) == len(images) else None
    return outputs.flatten().double()


def _distance(found: Tensor | None, alone: Tensor) -> float:
    """Return the largest difference; infinite where only one of two values is finite, or there are no outputs."""
    if found is None or found.shape != alone.shape:
        return float("inf")
    finite = alone.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    return float((found - alone)[finite].abs().max()) if finite.any() else 0.0
