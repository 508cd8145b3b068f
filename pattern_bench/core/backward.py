"""Propagate back through a network with other weights, and with other gradients of its ReLUs.

The network itself is neither changed nor copied nor run twice: while ``replaced_weights`` is active, each layer's
``forward`` is shadowed by one that computes the same output and uses another weight in the backward pass; while
``Rectifiers`` is active, every ReLU computes the same output and uses another rule. Pooling switches and every other
operation keep their own gradient.

Shapes: B images, C input channels, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from pattern_bench.core.layers import Geometry, Layer, convolved, geometry_of, pad
from pattern_bench.errors import UserError

# --- layers ---


class _Replaced(torch.autograd.Function):
    """Compute a layer's own output, and back-propagate as if its weight were ``replacement``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        forward: Callable[[Tensor], Tensor],
        replacement: Tensor,
        conserving: bool,
    ) -> Tensor:
        # Kept as an attribute and not by save_for_backward, so that own_weight_in_output_layers can change it.
        ctx.layer, ctx.shape, ctx.replacement, ctx.conserving = layer, x.shape, replacement, conserving
        return forward(x)

    @staticmethod
    @once_differentiable  # what follows the layer was computed with its own weight, so autograd's second would be wrong
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = grad_outputs[0]
        if ctx.conserving:
            grad = grad / _inside(ctx.layer, ctx.replacement, ctx.shape)
        return _transposed(ctx.layer, ctx.replacement, grad, ctx.shape), None, None, None, None


_BACKWARD: Any = getattr(_Replaced, "_backward_cls")  # noqa: B009, the type of the graph's nodes, unknown to mypy


def _transposed(layer: Layer, weight: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient with respect to the layer's input, in its ``shape``, for another weight."""
    if isinstance(layer, nn.Linear):
        return grad @ weight
    geometry = geometry_of(layer)
    if geometry.pads_as_convolutions_do:
        padding = [before for before, _ in geometry.padding]
        return _input_gradient(grad, grad.new_empty(1).expand(shape), weight, geometry, padding)
    with torch.enable_grad():
        x = grad.new_zeros(shape).requires_grad_()
        padded = pad(x, geometry)
    lower = _input_gradient(grad, padded.detach(), weight, geometry, [0] * len(geometry.kernel))
    return torch.autograd.grad(padded, x, lower)[0]


def _inside(layer: Layer, weight: Tensor, shape: torch.Size) -> Tensor:
    """Return the sum of ``weight`` over the taps inside an input of ``shape``, at every position of the output; 1 where
    it is 0. Padding with anything but zeros is made of the input, and counts as inside."""
    geometry = geometry_of(layer)
    if not geometry.kernel or not geometry.pads or geometry.padding_mode != "zeros":
        total = weight.flatten(1).sum(1).view(-1, *[1] * len(geometry.kernel))
    else:
        # All channels of the padding are alike, and summed first.
        one = replace(geometry, groups=1)
        total = convolved(weight.new_ones(1, 1, *shape[2:]), weight.sum(1, keepdim=True), None, one)
    return total.where(total != 0, 1.0)


def _input_gradient(grad: Tensor, like: Tensor, weight: Tensor, geometry: Geometry, padding: list[int]) -> Tensor:
    """Return the convolution's input gradient; of its input, ``like``, only the shape is used."""
    nothing = [0] * len(padding)
    stride, dilation, wanted = list(geometry.stride), list(geometry.dilation), [True, False, False]
    return torch.ops.aten.convolution_backward(
        grad, like, weight, None, stride, padding, dilation, False, nothing, geometry.groups, wanted
    )[0]


@contextmanager
def replaced_weights(
    model: nn.Module, weights: Mapping[str, Tensor | None], conserving: bool = False
) -> Iterator[None]:
    """Back-propagate through the named layers with ``weights`` in the place of their own; a context manager.

    With patterns a₊ as weights this is PatternNet, with w ⊙ a₊ PatternAttribution (Kindermans et al. 2018, section 4).

    Args:
        model: whose outputs stay as they are.
        weights: by the name of the layer, each in the shape of its weight; None refuses a pass through the layer.
        conserving: whether every neuron passes on all that it is given, in proportion to its weights: these are divided
            by their sum over the taps that lie inside the layer's input, which at padded borders are not all. A neuron
            whose weights there are all 0 passes nothing on.

    Raises:
        UserError: on a forward pass through a layer whose weight here is None.

    >>> model, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    >>> with replaced_weights(model, {"": torch.tensor([[3.0, 1.0]])}):
    ...     y = model(x)
    >>> torch.equal(y, model(x)), torch.autograd.grad(y, x)[0].tolist()
    (True, [[3.0, 1.0]])
    """
    shadowed: list[tuple[nn.Module, Any]] = []
    try:
        for name, weight in weights.items():
            layer = model.get_submodule(name)
            shadowed.append((layer, layer.__dict__.get("forward")))
            layer.forward = _shadow(name, layer, weight, conserving)
        yield
    finally:
        for layer, before in reversed(shadowed):
            layer.__dict__.pop("forward", None)
            if before is not None:
                layer.forward = before


def _shadow(name: str, layer: Any, weight: Tensor | None, conserving: bool) -> Callable[[Tensor], Tensor]:
    original = layer.forward

    def forward(x: Tensor) -> Tensor:
        if weight is None:
            raise UserError(
                f"layer {name} ({type(layer).__name__}) runs and has no pattern, and a whole network's explanation "
                "needs the patterns of all its layers: fit patterns with layer=all"
            )
        return _Replaced.apply(x, layer, original, weight, conserving)

    return forward


def own_weight_in_output_layers(output: Tensor) -> None:
    """Give the output layers their own weight again for the backward pass, after a forward pass with replaced weights.

    An output layer is one with no other layer between it and ``output``; a sum of two heads has two.

    >>> model, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    >>> with replaced_weights(model, {"": torch.tensor([[3.0, 1.0]])}):
    ...     y = model(x)
    >>> own_weight_in_output_layers(y)
    >>> torch.equal(torch.autograd.grad(y, x)[0], model.weight)
    True
    """
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, _BACKWARD):
            node.replacement = node.layer.weight.detach()
        else:
            nodes += [before for before, _ in node.next_functions]


# --- ReLUs ---


class _Rectified(torch.autograd.Function):
    """Compute a ReLU's own output, and let back positive values pass, with ``gated`` only where it fired."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
        y = function(x)
        ctx.gated = gated
        if gated:  # a ReLU passes what it puts out unchanged, where it has a gradient
            ctx.save_for_backward((y == x) & (y != 0))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        passed = grad_outputs[0].clamp(min=0)
        return passed * ctx.saved_tensors[0] if ctx.gated else passed, None, None


_RELUS = ("relu", "relu_", "relu6")
_CLAMPS = ("clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_", "hardtanh", "hardtanh_")
_OTHERS = (
    "gelu", "silu", "silu_", "mish", "hardswish", "hardswish_", "leaky_relu", "leaky_relu_", "rrelu", "rrelu_",
    "prelu", "elu", "elu_", "celu", "celu_", "selu", "selu_", "softplus", "threshold", "threshold_",
)  # fmt: skip
_POSITIONS = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max"), "clip": ("min", "max")}


class Rectifiers(TorchFunctionMode):
    """Let only positive values pass back through every ReLU; a context manager for the forward pass.

    ReLUs are recognised where they are computed, so it makes no difference whether they are modules (also one that is
    used several times), functions or methods, in place or not. ReLU6, and a clamp from 0, are ReLUs too. Sigmoid, tanh
    and the like keep their own gradient.

    Args:
        gated: whether values pass only where the ReLU fired (Guided BackProp, Springenberg et al. 2015), or everywhere
            (DeConvNet, Zeiler and Fergus 2014).
        method: the method's name, for errors.

    Raises:
        UserError: where the network rectifies with another function, for which the two methods are not defined.

    >>> x, grad = torch.tensor([1.0, -1.0, 1.0], requires_grad=True), torch.tensor([2.0, 2.0, -2.0])
    >>> with Rectifiers(gated=False, method="deconvnet"):
    ...     y = x.relu()
    >>> torch.autograd.grad(y, x, grad)[0].tolist()
    [2.0, 2.0, 0.0]
    >>> with Rectifiers(gated=True, method="guided_backprop"):
    ...     y = x.relu()
    >>> torch.autograd.grad(y, x, grad)[0].tolist()
    [2.0, 0.0, 0.0]
    """

    def __init__(self, gated: bool, method: str) -> None:
        super().__init__()
        self.gated, self.method = gated, method

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _OTHERS:
            raise UserError(
                f"{self.method} is defined for networks with ReLU or ReLU6, and this one computes {name}: "
                "choose another method or network"
            )
        x = args[0] if args else kwargs.get("input")
        if not (name in _RELUS or (name in _CLAMPS and _from_zero(name, args, kwargs))):
            return func(*args, **kwargs)
        if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)

        in_place = False

        def function(value: Tensor) -> Tensor:
            nonlocal in_place
            value = value.clone()
            y = func(value, *args[1:], **{key: setting for key, setting in kwargs.items() if key != "input"})
            in_place = y is value
            return y

        y = _Rectified.apply(x, function, self.gated)
        return x.copy_(y) if in_place else y  # whoever else reads x must see what the network would have put there


def _from_zero(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a clamp is a ReLU, with or without an upper end."""
    low, high = _POSITIONS.get(name.removesuffix("_"), ("min", "max"))
    bounds = {low: None, high: None, **dict(zip((low, high), args[1:3], strict=False)), **kwargs}
    return isinstance(bounds[low], int | float) and bounds[low] == 0
