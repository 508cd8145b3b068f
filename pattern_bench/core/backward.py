"""Explanations of a whole network: the gradient, with a pattern in the place of each layer's weight.

PatternNet propagates a₊ and PatternAttribution w ⊙ a₊ (Kindermans et al. 2018, section 4). ReLU gates, pooling
switches and every other operation keep their own gradient. The network itself is not changed: while an
explanation runs, each layer's ``forward`` is shadowed by one that computes the same output and remembers
another weight for the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.layers import Layer, geometry_of, pad


class _Replaced(torch.autograd.Function):
    """A layer's own forward; backward as if its weight had been ``replacement``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, replacement: Tensor) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(replacement)
        return type(layer).forward(layer, x)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (replacement,), (grad,) = ctx.saved_tensors, grad_outputs
        return _transposed(ctx.layer, replacement, grad, ctx.shape), None, None


def _transposed(layer: Layer, weight: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of the layer's output with respect to its input, for another weight."""
    if isinstance(layer, nn.Linear):
        return grad @ weight
    geometry = geometry_of(layer)
    with torch.enable_grad():
        x = grad.new_zeros(shape).requires_grad_()
        padded = pad(x, geometry)
    lower = torch.ops.aten.convolution_backward(
        grad,
        padded,
        weight,
        None,
        list(geometry.stride),
        [0] * len(geometry.kernel),
        list(geometry.dilation),
        False,
        [0] * len(geometry.kernel),
        geometry.groups,
        [True, False, False],
    )[0]
    if padded is x:
        return lower
    return torch.autograd.grad(padded, x, lower)[0]


@contextmanager
def replaced_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, back-propagation through the named layers uses ``weights`` (each in its layer's weight's shape)."""
    layers: list[nn.Module] = []
    try:
        for name, weight in weights.items():
            layer = model.get_submodule(name)
            layers.append(layer)

            def forward(x: Tensor, layer: Any = layer, weight: Tensor = weight) -> Tensor:
                return _Replaced.apply(x, layer, weight)

            layer.forward = forward
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def output_of_target(logits: Tensor, target: Tensor | None) -> Tensor:
    """The output (B,) that an explanation starts from: class ``target`` (B,), or the predicted one for None."""
    target = logits.argmax(1) if target is None else target
    return logits.gather(1, target[:, None]).squeeze(1)


class Gradient:
    """The gradient of the target's output with respect to the input."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def attribute(self, inputs: Tensor, target: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = inputs.detach().clone().requires_grad_()
            return torch.autograd.grad(output_of_target(self.model(x), target).sum(), x)[0]


class InputTimesGradient(Gradient):
    """Input ⊙ gradient: S_x in a whole network, LRP's z-rule for ReLU networks."""

    def attribute(self, inputs: Tensor, target: Tensor | None = None) -> Tensor:
        return inputs * super().attribute(inputs, target)


class _PatternMethod:
    """Starts from the target's output y and goes back with another weight in each layer."""

    def __init__(self, model: nn.Module, patterns: Mapping[str, Pattern]) -> None:
        self.model = model
        parameters = {name: getattr(model.get_submodule(name), "weight") for name in patterns}  # noqa: B009
        self.weights = {
            name: self.backward_weight(parameters[name].detach(), pattern.positive.to(parameters[name]))
            for name, pattern in patterns.items()
        }

    @staticmethod
    def backward_weight(weight: Tensor, pattern: Tensor) -> Tensor:
        raise NotImplementedError

    def attribute(self, inputs: Tensor, target: Tensor | None = None) -> Tensor:
        """One value per input value, in the input's shape; ``target`` (B,) or the predicted class."""
        weights = {name: weight.to(inputs.device) for name, weight in self.weights.items()}
        with torch.enable_grad(), replaced_weights(self.model, weights):
            x = inputs.detach().clone().requires_grad_()
            output = output_of_target(self.model(x), target)
            return torch.autograd.grad(output, x, output.detach())[0]


class PatternNet(_PatternMethod):
    """The signal: what the network saw in the input that made it answer so."""

    @staticmethod
    def backward_weight(weight: Tensor, pattern: Tensor) -> Tensor:
        return pattern


class PatternAttribution(_PatternMethod):
    """The attribution: how much each input value's signal contributed to the answer."""

    @staticmethod
    def backward_weight(weight: Tensor, pattern: Tensor) -> Tensor:
        return weight * pattern
