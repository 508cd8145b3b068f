"""What is asked of a network before it is used: its device, its canonical form, its answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pattern_bench.core.batch_independence import refuse_batch_dependence
from pattern_bench.core.canonical import canonical
from pattern_bench.core.half_precision import images_for, is_wide, own_precision
from pattern_bench.core.memory import is_out_of_memory
from pattern_bench.core.network import layers_in_order, refuse_training, refuse_without_weights
from pattern_bench.core.outputs import as_logits
from pattern_bench.core.predictions import first_broken_layer
from pattern_bench.core.snapshot import Snapshot
from pattern_bench.errors import UserError, told

P = ParamSpec("P")
R = TypeVar("R")
_canonical: WeakKeyDictionary[nn.Module, tuple[Snapshot, nn.Module]] = WeakKeyDictionary()


def in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Keep the caller's autocast and inference mode out of ``function``, whose first argument is a model.

    >>> @in_own_precision
    ... def product(model, x):
    ...     return model(x).dtype
    >>> with torch.autocast("cpu"):
    ...     product(torch.nn.Linear(2, 1), torch.ones(1, 2))
    torch.float32
    """

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        with own_precision(device_of(model)):
            return function(*args, **kwargs)

    return inside


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's first parameter; the CPU where it has none.

    >>> device_of(torch.nn.ReLU())
    device(type='cpu')

    Raises:
        UserError: where ``model`` is no network.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model={told(model)} is no network: give a torch.nn.Module")
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def canonical_form(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the network in canonical form (``core.canonical``): layers and ReLUs as modules, batch norm folded away.

    It is kept for networks whose every change can be noticed (``core.snapshot``) until one is, or the images have
    another shape.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).eval()
    >>> network = canonical_form(model, torch.ones(1, 1, 2, 2))
    >>> network is canonical_form(model, torch.ones(3, 1, 2, 2))
    True

    Args:
        model: any network in evaluation mode; it is not changed.
        example: (B, C, spatial...), images that it can take.

    Raises:
        UserError: where the network is in training mode, or has no canonical form.
    """
    refuse_training(model)
    example = images_for(model, example[:1])
    if (kept := kept_form(model, example)) is not None:
        return kept
    network = canonical(model, example)
    if is_wide(model):
        with suppress(ValueError):
            _canonical[model] = Snapshot(model, example, network.state_dict()), network
    return network


def kept_form(model: nn.Module, example: Tensor) -> nn.Module | None:
    """Return the canonical form that is kept and still the network's, for images of the shape of ``example``; or None.

    >>> kept_form(torch.nn.Linear(2, 1).eval(), torch.ones(1, 2)) is None
    True
    """
    if model not in _canonical:
        return None
    remembered, network = _canonical[model]
    if remembered.example.shape[1:] == example.shape[1:] and remembered.matches(model):
        return network
    _canonical.pop(model, None)
    return None


def not_finite(layer: str, where: str) -> UserError:
    """Return the error for a layer that meets NaN or infinite values.

    >>> not_finite("0", "image 3")
    UserError('layer 0: NaN or Inf in its input or output, for image 3: mend the weights of the network or the images')
    """
    return UserError(
        f"layer {layer}: NaN or Inf in its input or output, for {where}: mend the weights of the network or the images"
    )


def cannot_take(model: nn.Module, images: Tensor, error: Exception) -> UserError:
    """Return the error for images that a network raised ``error`` (one of REFUSALS) for.

    >>> str(cannot_take(torch.nn.ReLU(), torch.ones(1, 2), ValueError("too small"))).partition(":")[0]
    'model=ReLU cannot take images of shape (1, 2) in torch.float32 (too small)'
    """
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"model={type(model).__name__} cannot take images of shape {tuple(images.shape)} in {images.dtype} ({why}): "
        "give images of the size and channels that it is made for, and where it casts to half precision by itself a "
        "model in float32"
    )


REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What networks raise for images of a shape that they are not made for."""


def answers(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the network that puts out logits (``core.outputs``), and those for the images, (B, K).

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Softmax(1)).eval()
    >>> network, logits = answers(model, torch.ones(1, 2))
    >>> torch.allclose(logits, model[0](torch.ones(1, 2)))  # before the softmax
    True

    Raises:
        UserError: where it cannot take the images, or has no row of logits for each; naming a layer, where images or
            outputs are NaN or infinite; where the logits for an image are random or depend on the other images.
    """
    where = f"the batch of images 0 to {len(images) - 1}"
    refuse_without_weights(model)
    with torch.no_grad():
        try:
            if not images.isfinite().all():
                raise not_finite(next(iter(layers_in_order(model, images.clone())), "none"), where)
            network = as_logits(model, images[:1].clone())
            logits: Tensor = network(images.clone())
            if logits.ndim != 2 or len(logits) != len(images):
                raise UserError(
                    f"model={type(model).__name__} makes outputs of shape {tuple(logits.shape)} from images of shape "
                    f"{tuple(images.shape)}: give a network with one row of outputs for each image"
                )
            if (layer := first_broken_layer(network, images.clone(), logits)) is not None:
                raise not_finite(layer, where)
            refuse_batch_dependence(network, images, type(model).__name__)
        except REFUSALS as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise cannot_take(model, images, error) from error
    return network, logits
