"""Find a softmax or sigmoid between a network's last layers and its outputs, after which they are no logits.

One forward pass is watched below Python, so it does not matter what a softmax is called or what lies around it. Which
of them reach the outputs without a layer in between is noted on the way. Whether one runs over the classes, as those in
attention or in a mixture of experts do not, is tried: half of its results are made NaN, and where some outputs become
NaN and others do not, it runs over them. A softmax that is written out shows in that the same constant added to all
outputs of the last layers changes nothing. Shapes: B images, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pattern_bench.core.layers import LAYER_TYPES

_SOFTMAX = ("_softmax", "_log_softmax", "_safe_softmax")
_SIGMOID = ("sigmoid", "log_sigmoid_forward", "hardsigmoid")


class Past(NamedTuple):
    """The way from the outputs of the last layers to a tensor.

    >>> Past(plain=True).activations
    frozenset()
    """

    plain: bool = False
    """Whether it depends on their outputs, or on the image, without a softmax or sigmoid in between."""
    activations: frozenset[int] = frozenset()
    """The softmaxes and sigmoids in between, by number."""
    layers: frozenset[nn.Module] = frozenset()
    """The last layers."""


class ActivationWatch(TorchDispatchMode):
    """Watch a forward pass for softmaxes and sigmoids; a context manager.

    Args:
        network: whose layers count.
        image: (B, C, spatial...), or None where only ``spoiled`` is of interest.
        spoiled: the number of a softmax, half of whose results become NaN.

    >>> model, image = nn.Sequential(nn.Linear(2, 3), nn.Softmax(1)), torch.ones(1, 2)
    >>> with torch.no_grad(), ActivationWatch(model, image) as watch:
    ...     y = model(image)
    >>> watch.calls, watch.past(y).plain, sorted(watch.past(y).activations)
    ([3], False, [0])
    """

    def __init__(self, network: nn.Module, image: Tensor | None, spoiled: int | None = None) -> None:
        super().__init__()
        self.network, self.spoiled = network, spoiled
        self.pasts: dict[int, tuple[Any, Past]] = {}  # by storage; kept, so that no other takes its place
        self.calls: list[int] = []
        """The number of values that each softmax normalises, in the order of the calls; 0 for a sigmoid."""
        self.outputs: dict[nn.Module, Tensor] = {}
        self.exits = ExitStack()
        if image is not None:
            self._write(image, Past(plain=True))

    def __enter__(self) -> ActivationWatch:
        for module in self.network.modules():
            if isinstance(module, LAYER_TYPES):
                self.exits.callback(module.register_forward_hook(self._leave).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.exits.close()
        super().__exit__(*error)

    def past(self, t: Tensor) -> Past:
        """Return how a tensor was made."""
        return self.pasts.get(t.untyped_storage()._cdata, (None, Past()))[1]

    def _write(self, t: Tensor, past: Past) -> None:
        storage = t.untyped_storage()
        self.pasts[storage._cdata] = storage, past

    def _leave(self, layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.outputs[layer] = output
            self._write(output, Past(True, layers=frozenset([layer])))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pasts = [self.past(t) for t in tree_leaves((args, kwargs)) if _strided(t)]
        output = func(*args, **(kwargs or {}))
        past = Past(
            any(p.plain for p in pasts),
            frozenset().union(*(p.activations for p in pasts)),
            frozenset().union(*(p.layers for p in pasts)),
        )
        name = func._schema.name.partition("::")[2].removesuffix("_")
        if name in _SOFTMAX or name in _SIGMOID:
            if past.plain or past.activations:
                past = Past(False, past.activations | {len(self.calls)}, past.layers)
            if len(self.calls) == self.spoiled and name in _SOFTMAX and output.ndim:
                output.narrow(args[1], 0, (output.shape[args[1]] + 1) // 2).fill_(torch.nan)
            self.calls.append(0 if name in _SIGMOID else output.shape[args[1]] if output.ndim else 1)
        empty = name.startswith("new_") or name.endswith("_like")
        for t in tree_leaves(output):
            if _strided(t):
                if t.numel() * t.element_size() < t.untyped_storage().nbytes():  # in place, of a part
                    past = past._replace(plain=past.plain or self.past(t).plain)
                self._write(t, past if t.is_floating_point() and not empty else Past())  # a mask is no evidence
        return output


def _strided(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout is torch.strided


def output_activation(seen: ActivationWatch, past: Past, y: Tensor, again: Callable[[], Tensor]) -> str | None:
    """Return in words the softmax or sigmoid that outputs went through after the last layers; None where they are
    logits.

    A sigmoid counts where the outputs depend on the image through nothing else, so that gates do not.

    Args:
        seen: the watch of a forward pass.
        past: that of ``y``.
        y: the pass's outputs, (B, K).
        again: repeats the pass and returns its outputs.

    >>> model, image = nn.Sequential(nn.Linear(2, 3), nn.Softmax(1)), torch.ones(1, 2)
    >>> with torch.no_grad(), ActivationWatch(model, image) as watch:
    ...     y = model(image)
    >>> output_activation(watch, watch.past(y), y, lambda: model(image))
    'a softmax over its classes'
    """
    for number in sorted(past.activations, reverse=True):
        values = seen.calls[number]
        if values > 1:
            with ActivationWatch(seen.network, None, number):
                try:
                    spoiled = again().isnan() & ~y.isnan()
                except (RuntimeError, ValueError, IndexError, AssertionError):  # it does not go on with NaN
                    continue
            if spoiled.any() and not spoiled.all():
                return "a softmax over its classes"
        elif not past.plain:
            return "a softmax over a single value" if values else "a sigmoid"
    if past.layers and y.shape[1] > 1 and _is_normalised(seen, past.layers, y, again):
        return "a softmax over its classes, or something like it,"
    return None


def _is_normalised(seen: ActivationWatch, layers: Iterable[nn.Module], y: Tensor, again: Callable[[], Tensor]) -> bool:
    """Return whether a constant that is added to all outputs of ``layers`` leaves ``y`` (B, K) as it is, though one
    added to half of their neurons does not; and neither because ``y`` is linear in them (as minus their mean) nor
    because of a norm (which takes their scale away too)."""
    size = 1 + 20 * max(float(seen.outputs[layer].abs().max()) for layer in layers)

    def change(of: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """Return how ``y`` changes where the layers put out something else."""
        handles = [layer.register_forward_hook(lambda m, _, z: of(m, z)) for layer in layers]
        try:
            return again() - y
        finally:
            for handle in handles:
                handle.remove()

    def noise(z: Tensor) -> Tensor:
        return size * torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z)

    def half(layer: nn.Module, z: Tensor) -> Tensor:
        dim = z.ndim - 1 if isinstance(layer, nn.Linear) else 1
        alternate = (torch.arange(z.shape[dim], device=z.device) % 2).to(z)
        return size * alternate.view(-1, *[1] * (z.ndim - 1 - dim))

    by_constant = change(lambda _, z: z + size)
    if by_constant.abs().max() > 0.1 * y.abs().max():  # nearly always
        return False
    one_way, other_way = change(lambda _, z: z + noise(z)), change(lambda _, z: z - noise(z))
    allowed = 1e-3 * float(torch.maximum(one_way.abs(), other_way.abs()).max())

    def nothing(difference: Tensor) -> bool:
        return bool((difference.abs() < allowed).all())

    return (
        nothing(by_constant)
        and not nothing(change(lambda layer, z: z + half(layer, z)))
        and not nothing(one_way + other_way)
        and not nothing(change(lambda _, z: 2 * z))
    )
