"""Write out layers that compute something else than the convolution that their weight and settings declare.

Weight standardisation and weight norm convolve with another weight than ``weight``, and some layers pad their input on
their own. What such a layer did is read off one forward pass, and put into a plain layer. Shapes: B images, C channels,
N neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pattern_bench.core.agreement import agree
from pattern_bench.core.function_calls import CONVOLUTIONS, name_of
from pattern_bench.core.layers import LAYER_TYPES, Layer, PaddedConv2d, convolved, geometry_of
from pattern_bench.errors import UserError


def rewritten(network: nn.Module, example: Tensor, model: str) -> dict[Any, Layer]:
    """Return plain layers for those that do not compute the convolution that they declare.

    Args:
        network: in evaluation mode; it is run once, and not changed.
        example: (B, C, spatial...).
        model: the network's name, for errors.

    Returns:
        Such layers, each with the plain one that computes the same outputs for inputs of any size that it can take.

    Raises:
        UserError: where a layer is called without a batch dimension or with several inputs, or where what it computes
            is not one convolution or dense layer.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False)).requires_grad_(False)
    >>> (plain,) = rewritten(nn.Sequential(layer), torch.ones(1, 2), "mine").values()
    >>> plain, torch.equal(plain.weight, layer.weight)
    (Linear(in_features=2, out_features=1, bias=False), True)
    """
    plain_layers: dict[Any, Layer] = {}

    def check(name: str, layer: Layer, inputs: tuple[Any, ...], output: Any) -> None:
        def refuse(why: str) -> UserError:
            return UserError(
                f"model={model}: layer {name} ({type(layer).__module__}.{type(layer).__qualname__}) {why}: "
                f"replace it by a plain nn.{_base(layer).__name__}"
            )

        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise refuse(f"is called with {len(inputs)} positional inputs instead of one tensor")
        x = inputs[0]
        if x.ndim < 2 + len(geometry_of(layer).kernel):
            raise refuse("is called without a batch dimension")
        if layer not in plain_layers:
            hooked = layer._forward_pre_hooks or "weight" not in layer._parameters
            if not hooked and _declares(layer, x, output) and _declares_at_other_sizes(layer, layer, x):
                return
            plain = _written_out(layer, x)
            if plain is None:
                raise refuse("computes something else than one convolution or dense layer")
            plain_layers[layer] = plain
        if not _declares(plain_layers[layer], x, output):
            raise refuse("computes another function than the convolution that its weight, bias and settings declare")

    handles = [
        layer.register_forward_hook(lambda layer, x, y, name=name: check(name, layer, x, y))
        for name, layer in network.named_modules()
        if isinstance(layer, LAYER_TYPES)
    ]
    try:
        network(example)
    finally:
        for handle in handles:
            handle.remove()
    return plain_layers


def declared(layer: Layer, x: Tensor) -> Tensor:
    """Return the output (B, N, output spatial...) that a layer's weight, bias and geometry stand for: all that the
    arithmetic of patterns knows of it. ``x`` is its input, (B, C, spatial...).

    >>> layer = nn.Linear(2, 1)
    >>> torch.equal(declared(layer, torch.ones(3, 2)), layer(torch.ones(3, 2)))
    True
    """
    return convolved(x, layer.weight, layer.bias, geometry_of(layer))


def _base(layer: nn.Module) -> Any:
    return next(kind for kind in LAYER_TYPES if isinstance(layer, kind))


def _declares(layer: Layer, x: Tensor, output: Tensor) -> bool:
    try:
        return agree(declared(layer, x), output)
    except RuntimeError:  # an input too small for the kernel, where the layer pads more than it says
        return False


def _declares_at_other_sizes(declaring: Layer, layer: Layer, x: Tensor) -> bool:
    """Return whether what ``declaring`` declares is what ``layer`` computes for inputs smaller than ``x``, whatever is
    left over of a stride. Layers with a forward of their own may pad by the size of their input."""
    if isinstance(layer, nn.Linear) or type(layer).forward is _base(layer).forward:
        return True
    for less in range(1, max(layer.stride)):
        smaller = x
        for dim in range(2, x.ndim):
            smaller = smaller.narrow(dim, 0, max(1, x.shape[dim] - less))
        try:
            output = layer.forward(smaller)
        except RuntimeError:  # too small for it
            continue
        if not _declares(declaring, smaller, output):
            return False
    return True


class _Convolutions(TorchFunctionMode):
    """Record input, weight and bias of every convolution and dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(func) in CONVOLUTIONS:
            self.calls.append({**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


def _written_out(layer: Layer, x: Tensor) -> Layer | None:
    """Return a layer of torch's own with the weight, bias and padding that ``layer`` used on ``x``; None where it did
    something else than one convolution."""
    with _Convolutions() as convolutions:
        layer.forward(x)
    if len(convolutions.calls) != 1:
        return None
    call = convolutions.calls[0]
    weight, bias = call["weight"], call.get("bias")
    with torch.device("meta"):
        plain = _empty(layer, x, call["input"], bias is not None)
    if plain.weight.shape != weight.shape:
        return None
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    if isinstance(plain, PaddedConv2d) and not _declares_at_other_sizes(plain, layer, x):
        plain.same = True
        if not (_declares(plain, x, layer.forward(x)) and _declares_at_other_sizes(plain, layer, x)):
            plain.same, plain.only = False, tuple(x.shape[2:])
    return plain.eval().requires_grad_(False)


def _empty(layer: Layer, x: Tensor, convolved_input: Tensor, bias: bool) -> Layer:
    """Return a layer of torch's own with the settings of ``layer``, which made ``convolved_input`` of ``x``."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias)
    settings: dict[str, Any] = {
        key: getattr(layer, key)
        for key in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
    }
    settings["bias"] = bias
    extra = [b - a for a, b in zip(x.shape[2:], convolved_input.shape[2:], strict=True)]
    own = type(layer).forward is not nn.Conv2d.forward
    if isinstance(layer, nn.Conv2d) and own and not geometry_of(layer).pads:
        return PaddedConv2d(**settings, margins=tuple((e // 2, e - e // 2) for e in extra))
    plain: Layer = _base(layer)(**settings, padding=layer.padding, padding_mode=layer.padding_mode)
    return plain
